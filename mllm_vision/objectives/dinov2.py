"""DINOv2: DINO's image vectors, iBOT's masked patches, and KoLeo that spreads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.encoder.masking import mask_token, masked_features, patch_embedding
from mllm_vision.functional.distillation import ibot_loss, koleo
from mllm_vision.functional.masking import block_masks, draws_of_blocks, random_masks
from mllm_vision.functional.random import uniform
from mllm_vision.modules.momentum import MomentumTeacher
from mllm_vision.objectives.base import POSITIONS, TOKENS, ObjectiveOutput
from mllm_vision.objectives.base_dino import DINOConfig, DINOObjective

MASKS = 1600  # stream of the masks' random numbers; two for each global crop


class DINOv2(DINOObjective):
    """Half of the global crops lose patches, and the student says what the teacher sees there; DINO beside it.

    The loss is DINO's over the image vectors, iBOT's over the masked patches, and 0.1 times KoLeo over the image
    vectors of each global crop, before the head. Sinkhorn-Knopp balances the teacher's vectors of all global crops
    together, and its masked patches by themselves. Where this differs from the official code: each crop draws the
    share of its patches by itself (there one list of shares is dealt out over the batch), and the neighbours of KoLeo
    come from all ranks. Gradients of encoder and heads are clipped each by the norm of its own, as there.
    Sinkhorn-Knopp is the paper's, and its large models' config; the official code's default config centres.

    Args:
        encoder: any transformer backbone. Its own mask token is trained where it has one; otherwise the method's,
            which is not part of the saved encoder.
        config: see `Config`.

    Raises:
        ValueError: a convolutional backbone, a probability, ratio or weight out of range, and what `DINOObjective`
            refuses.

    Reference:
        Oquab et al., 2023, "DINOv2: Learning Robust Visual Features without Supervision", section 4
        (https://arxiv.org/abs/2304.07193); Zhou et al., 2022, "iBOT" (https://arxiv.org/abs/2111.07832).
    """

    citation: ClassVar[str] = r"""@article{oquab2023dinov2,
  title = {DINOv2: Learning Robust Visual Features without Supervision},
  author = {Oquab, Maxime and Darcet, Timoth{\'e}e and Moutakanni, Th{\'e}o and others},
  journal = {arXiv:2304.07193},
  year = {2023}
}"""

    views: ClassVar[str] = "dinov2"
    loss_parts: ClassVar[tuple[str, ...]] = ("dino", "ibot", "koleo")
    training_defaults: ClassVar[dict[str, Any]] = {
        "optim": "adamw_torch",
        "base_learning_rate": 4e-3,
        "lr_scaling": "sqrt",
        "lr_scaling_batch_size": 1024,
        "layer_decay": 0.9,
        "patch_embedding_lr_scale": 0.2,
        "weight_decay": 0.04,
        "weight_decay_end": 0.4,
        "lr_scheduler_type": "exact_cosine",
        "lr_scheduler_kwargs": {"min_lr": 1e-6, "inclusive_warmup": True},
        "warmup_steps": 0.1,  # the official 10 epochs, of 100
        "gradient_clipping": "per_module",
        "max_grad_norm": 3.0,
    }
    learn_prototype_norm = True  # as in the official code, unlike DINO's
    also_decays: ClassVar[tuple[str, ...]] = (*TOKENS, *POSITIONS, "last_layer.norm")

    @dataclass
    class Config(DINOConfig):
        """Flags of the method, beside DINO's."""

        momentum: float = field(default=0.992, metadata={"help": "of the teacher at the start; rises to 1 by a cosine"})
        centring: str = field(default="sinkhorn", metadata={"help": "of the teacher: sinkhorn, centre or none"})
        mask_probability: float = field(default=0.5, metadata={"help": "share of the global crops that lose patches"})
        mask_ratio_min: float = field(default=0.1, metadata={"help": "least share of the patches that they lose"})
        mask_ratio_max: float = field(default=0.5, metadata={"help": "largest share of the patches that they lose"})
        mask_shape: str = field(default="block", metadata={"help": "block (rectangles) or random (single patches)"})
        ibot_weight: float = field(default=1.0, metadata={"help": "of the masked patches' loss"})
        koleo_weight: float = field(default=0.1, metadata={"help": "of KoLeo"})
        separate_patch_head: bool = field(
            default=False, metadata={"help": "prototypes of their own for the patches (the official large models)"}
        )

    def __init__(self, encoder: VisionEncoder, config: Config | None = None) -> None:
        patch_embedding(encoder.backbone)  # refuses convolutional networks
        super().__init__(encoder, config)
        config = self.config
        _check(config)
        width = encoder.backbone.config.hidden_size
        if not config.separate_patch_head and width != encoder.pooled_size:
            raise ValueError(
                f"patches of width {width} do not fit the head of the image vector, of width {encoder.pooled_size}; "
                "use --separate_patch_head true"
            )
        own = mask_token(encoder.backbone)
        self.mask_token = nn.Parameter(torch.zeros(width)) if own is None else None
        if own is not None:
            own.requires_grad_(True)  # switched off for methods that mask nothing
        self._add_patch_side()

    def _add_patch_side(self) -> None:
        self.patch_head: Any = None
        if self.config.separate_patch_head:
            self.patch_head = self.build_head(self.encoder.backbone.config.hidden_size).to(self.encoder.device)
            self.teacher = MomentumTeacher(self.student, self.config.momentum, batch_statistics=True)
        self.patch_centring = self.build_centring().to(self.encoder.device)

    @property
    def student(self) -> nn.ModuleDict:
        parts = super().student
        if getattr(self, "patch_head", None) is not None:
            parts["patch_head"] = self.patch_head
        return parts

    def rebuild_heads(self) -> None:
        self.patch_head = None
        super().rebuild_heads()
        self._add_patch_side()

    def rates(self) -> dict[str, float | str]:
        """The prototypes, the patches' too, have no rate for the first epoch; the optimizer sees their gradients."""
        epochs, heads = self.config.freeze_last_layer_epochs, ["head"] + ["patch_head"] * (self.patch_head is not None)
        return {f"{head}.last_layer": f"still:{epochs:g}" for head in heads} if epochs else {}

    def masks(self, seeds: Tensor, crops: int) -> Tensor:
        """Which patches the student does not see: bool `[B, crops, N]`, from the rows' `seeds` `[B]` alone."""
        config, side = self.config, self.encoder.image_size // self.encoder.patch_size
        blocks = config.mask_shape == "block"
        found = []
        for crop in range(crops):
            whether, share = uniform(seeds, MASKS + 2 * crop, 2).unbind(1)
            ratio = config.mask_ratio_min + share * (config.mask_ratio_max - config.mask_ratio_min)
            ratio = torch.where(whether < config.mask_probability, ratio, torch.zeros_like(ratio))
            draws = uniform(seeds, MASKS + 2 * crop + 1, draws_of_blocks(side, side) if blocks else side * side)
            found.append(block_masks(draws, ratio, side, side) if blocks else random_masks(draws, ratio))
        return torch.stack(found, dim=1)

    def embed(  # type: ignore[override]
        self, views: Tensor, seeds: Tensor, local_views: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Image vectors, and the masked patches of the global crops.

        Args:
            views: `[B, G, 3, H, W]` global crops of the encoder's image size.
            seeds: int64 `[B]`, the key of each row's masks.
            local_views: `[B, L, 3, h, w]`, which only the student sees, whole.

        Returns:
            `student` `[B, G + L, P]`, `student_patches` `[B, G, M, D]` with room for M masked patches of a crop; and,
            but in gradient caching's second pass, `teacher` `[B, G, P]`, `teacher_patches` `[B, G, M, D]` and
            `masked` bool `[B, G, M]`, which of them are there.
        """
        size = self.encoder.image_size
        if views.ndim != 5 or views.shape[1] < self.least_views or views.shape[-2:] != (size, size):
            raise ValueError(
                f"DINOv2 needs views [B, V, 3, {size}, {size}] with V >= {self.least_views}, got {list(views.shape)}; "
                f"the view policy {self.views!r} makes them (data/views/views.py)"
            )
        rows, crops = views.shape[:2]
        mask = self.masks(seeds, crops).flatten(0, 1)
        room = max(1, int(self.config.mask_ratio_max * mask.shape[1] + 1e-6))
        places = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :room]  # masked ones first
        backbone, pixels = self.encoder.backbone, views.flatten(0, 1)
        token = mask_token(backbone) if self.mask_token is None else self.mask_token
        vectors, patches = masked_features(backbone, pixels, mask, token)
        student = vectors.unflatten(0, (rows, crops))
        if local_views is not None:
            student = torch.cat([student, self.features(self.encoder, local_views, least=1)], dim=1)
        found = {"student": student, "student_patches": _pick(patches, places).unflatten(0, (rows, crops))}
        if self.replaying:
            return found
        with torch.no_grad():
            vectors, patches = masked_features(self.teacher.module["encoder"].backbone, pixels)
        found["teacher"] = vectors.unflatten(0, (rows, crops))
        found["teacher_patches"] = _pick(patches, places).unflatten(0, (rows, crops))
        return found | {"masked": mask.gather(1, places).unflatten(0, (rows, crops))}

    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        """`embeddings` as `embed` returns them."""
        config, crops = self.config, embeddings["teacher"].shape[1]
        found = super().loss(embeddings)
        masked = embeddings["masked"]
        head = self.head if self.patch_head is None else self.patch_head
        with torch.no_grad():
            teacher_head = self.teacher.module["head" if self.patch_head is None else "patch_head"]
            # with the room that is left over: how many patches are masked only the device knows
            logits = teacher_head(embeddings["teacher_patches"]).flatten(0, 2)
            targets = self.patch_centring(logits, self.teacher_temperature, counted=masked.flatten())
        said = head(embeddings["student_patches"]).flatten(0, 1)
        patches = ibot_loss(said, targets.view_as(said), masked.flatten(0, 1), temperature=config.student_temperature)
        vectors = embeddings["student"][:, :crops]
        spread = torch.stack([koleo(vector) for vector in vectors.unbind(1)]).sum()
        metrics = {**found.metrics, "dino": found.loss.detach(), "ibot": patches.detach(), "koleo": spread.detach()}
        loss = found.loss + config.ibot_weight * patches + config.koleo_weight * spread
        return ObjectiveOutput(loss=loss, metrics=metrics)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Both centres move, the teacher follows."""
        self.patch_centring.update()
        super().after_step(progress)

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float | None:
        """None: KoLeo has no value of its own for a model that knows nothing."""
        return None


def _pick(patches: Tensor, places: Tensor) -> Tensor:
    """`[B, N, D]` and `[B, M]` to `[B, M, D]`."""
    return patches.gather(1, places[..., None].expand(-1, -1, patches.shape[-1]))


def _check(config: DINOv2.Config) -> None:
    low, high = config.mask_ratio_min, config.mask_ratio_max
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"mask_ratio_min={low} and mask_ratio_max={high} must be 0 <= min <= max <= 1; use 0.1 and 0.5"
        )
    if not 0 <= config.mask_probability <= 1:
        raise ValueError(f"mask_probability={config.mask_probability} is not between 0 and 1; the paper's is 0.5")
    if config.mask_shape not in ("block", "random"):
        raise ValueError(f"mask_shape={config.mask_shape!r} must be 'block' or 'random'")
    if config.ibot_weight < 0 or config.koleo_weight < 0:
        values = f"ibot_weight={config.ibot_weight} and koleo_weight={config.koleo_weight}"
        raise ValueError(f"{values} must not be negative; the paper's are 1 and 0.1")
