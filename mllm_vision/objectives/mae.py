"""MAE: the encoder sees a quarter of the patches, a small decoder predicts the pixels of the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mllm_vision.distributed import row_counts, sum_over_ranks
from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.encoder.families import family_of
from mllm_vision.encoder.features import final_norm, pick_patches
from mllm_vision.encoder.positions import fix_positions, sincos_positions
from mllm_vision.functional.random import uniform
from mllm_vision.functional.reconstruction import masked_reconstruction, patchify, unpatchify
from mllm_vision.modules.patch_decoder import PatchDecoder
from mllm_vision.objectives.base import TOKENS, ImageObjective, ObjectiveOutput

MASKS = 1400  # stream of the masks' random numbers; one more for each view


class MAE(ImageObjective):
    """Masked autoencoding: no pairs, no negatives, an error for each image.

    A random set of patches, another for each image and epoch, goes through the encoder; the others cost nothing
    there. The decoder gets their places and predicts them, and is thrown away afterwards. The loss is computed row by
    row in `embed`, so accumulation and gradient caching change nothing.

    What no gradient would reach leaves the encoder, in place: ViT's pooler, SigLIP's attention-pooling head. The
    pooled vector is then the class token behind the last norm, or the mean of the patches where there is none. An
    encoder whose weights were loaded keeps its positions. Where this differs from the official code: the encoder
    starts with transformers' initialisation, not with Xavier's.

    Args:
        encoder: any transformer backbone; convolutional ones see no separate patches.
        config: see `Config`.

    Raises:
        ValueError: a convolutional backbone, a mask that hides nothing or everything, a decoder whose heads do not
            divide its width.

    Reference:
        He et al., 2022, "Masked Autoencoders Are Scalable Vision Learners" (https://arxiv.org/abs/2111.06377).
    """

    citation: ClassVar[str] = r"""@article{he2021mae,
  title = {Masked Autoencoders Are Scalable Vision Learners},
  author = {He, Kaiming and Chen, Xinlei and Xie, Saining and Li, Yanghao and Doll{\'a}r, Piotr and Girshick, Ross},
  journal = {arXiv:2111.06377},
  year = {2021}
}"""

    views: ClassVar[str] = "mae"
    also_decays: ClassVar[tuple[str, ...]] = TOKENS
    couples_batch: ClassVar[bool] = False
    least_views: ClassVar[int] = 1
    # Table 8 of the paper: 800 epochs, 40 of warm-up
    training_defaults: ClassVar[dict[str, Any]] = {
        "base_learning_rate": 1.5e-4,
        "lr_scaling": "linear",
        "weight_decay": 0.05,
        "adam_beta2": 0.95,
        "warmup_steps": 0.05,
        "max_grad_norm": 0.0,
    }

    @dataclass
    class Config:
        """Flags of the method."""

        mask_ratio: float = field(default=0.75, metadata={"help": "share of the patches that the encoder does not see"})
        decoder_width: int = field(default=512, metadata={"help": "width of the decoder, divisible by 4"})
        decoder_layers: int = field(default=8, metadata={"help": "blocks of the decoder"})
        decoder_heads: int = field(default=16, metadata={"help": "attention heads of the decoder"})
        normalize_pixels: bool = field(
            default=True, metadata={"help": "predict each patch with mean 0 and variance 1 (better); else its pixels"}
        )
        sincos_positions: bool = field(
            default=True, metadata={"help": "fixed sine-cosine positions, in an encoder with random weights"}
        )

    def __init__(self, encoder: VisionEncoder, config: Config | None = None) -> None:
        super().__init__(encoder, config)
        config, backbone = self.config, encoder.backbone
        family = family_of(backbone)
        if family.convolutional:
            raise ValueError(
                f"MAE hides patches, and {family.model_type} is convolutional; use a transformer (--encoder vit), "
                "or another --objective"
            )
        side = encoder.image_size // encoder.patch_size
        self.visible = int(side * side * (1 - config.mask_ratio))  # as the official code rounds
        if not 0 < self.visible < side * side:
            raise ValueError(
                f"mask_ratio={config.mask_ratio} leaves {self.visible} of {side * side} patches visible; "
                "use a ratio that hides some and shows some (the paper's is 0.75)"
            )
        _drop_pooler(backbone)
        if config.sincos_positions and not encoder.pretrained:
            fix_positions(backbone)
        prefix = encoder.num_prefix_tokens
        self.decoder = PatchDecoder(
            backbone.config.hidden_size,
            sincos_positions(side, side, config.decoder_width, prefix=prefix),
            3 * encoder.patch_size**2,
            prefix=prefix,
            layers=config.decoder_layers,
            heads=config.decoder_heads,
        )

    def embed(self, views: Tensor, seeds: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """The error of every image.

        Args:
            views: `[B, V, 3, H, W]` of the encoder's image size; V = 1 as a rule.
            seeds: `[B]` int64, the key of each row's masks.

        Returns:
            `error` `[B]`, the mean over views.

        Raises:
            ValueError: images of another size than the encoder's.
        """
        predicted, target, visible = self.reconstruct(views, seeds)
        mask = torch.ones(target.shape[:2], dtype=torch.bool, device=target.device).scatter(1, visible, False)
        errors = masked_reconstruction(predicted, target, mask, normalize=self.config.normalize_pixels)
        return {"error": errors.view(views.shape[:2]).mean(1)}

    def reconstruct(self, views: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(predicted patches `[B V, N, P]`, true ones `[B V, N, P]`, the visible ones' numbers `[B V, K]`)."""
        backbone, size = self.encoder.backbone, self.encoder.image_size
        self.check_views(views)
        if views.shape[-2:] != (size, size):
            raise ValueError(f"views {list(views.shape)} are not of the encoder's size; make them {size} x {size}")
        target = patchify(views.flatten(0, 1), self.encoder.patch_size)
        keys = [uniform(seeds, MASKS + view, target.shape[1]) for view in range(views.shape[1])]
        visible = torch.stack(keys, 1).flatten(0, 1).argsort(dim=1, stable=True)[:, : self.visible]
        family, prefix = family_of(backbone), self.encoder.num_prefix_tokens
        hidden, arguments = family.embed(backbone, views.flatten(0, 1).to(backbone.dtype))
        hidden, arguments = pick_patches(hidden, arguments, visible, prefix)
        for layer in family.layers(backbone):
            hidden = layer(hidden, **arguments)
        return self.decoder(final_norm(backbone)(hidden), visible), target, visible

    def images(self, patches: Tensor) -> Tensor:
        """Patches of `reconstruct` as images again: `[N, P, 3 p p]` to `[N, 3, H, W]`."""
        return unpatchify(patches, self.encoder.patch_size, self.encoder.image_size)

    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        """The mean error over the rows of all ranks."""
        errors = embeddings["error"]
        loss = sum_over_ranks(errors.sum()) / sum(row_counts(errors))
        return ObjectiveOutput(loss=loss, metrics={})

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float | None:
        """1 - 1/P with normalised pixels: the mean of every patch, and nothing of what it shows."""
        return 1 - 1 / self.decoder.predict.out_features if self.config.normalize_pixels else None


def _drop_pooler(backbone: Any) -> None:
    """Without what would stay untrained beside the trained layers and pass for the image vector."""
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    if getattr(backbone, "use_head", False):
        del backbone.head
        backbone.use_head = backbone.config.vision_use_head = False
