"""What DINO and DINOv2 share: multi-crop, heads of prototypes, a centred and sharpened teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mllm_vision.distributed import all_reduce
from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.errors import unknown_name
from mllm_vision.functional.distillation import dino_loss
from mllm_vision.modules.centring import Centring
from mllm_vision.modules.heads import DINOHead
from mllm_vision.objectives.base import POSITIONS, TOKENS, ObjectiveOutput
from mllm_vision.objectives.base_momentum import MomentumObjective

SMALL_DATA, SMALL_OUT, LARGE_OUT = 20_000, 1024, 65536
ARTIFACTS = ("teacher", "student")


@dataclass
class DINOConfig:
    """Flags of both methods."""

    out_dim: int | None = field(
        default=None, metadata={"help": "prototypes; default 65536, and 1024 for data of under 20,000 images"}
    )
    head_hidden: int = field(default=2048, metadata={"help": "width in the head"})
    head_bottleneck: int = field(default=256, metadata={"help": "width before the prototypes"})
    head_layers: int = field(default=3, metadata={"help": "layers before the prototypes"})
    head_batch_norm: bool = field(default=False, metadata={"help": "BatchNorm in the head (for a ResNet: true)"})
    student_temperature: float = field(default=0.1, metadata={"help": "of the student's softmax"})
    teacher_temperature: float = field(default=0.07, metadata={"help": "of the teacher's, after its warm-up"})
    teacher_temperature_start: float = field(default=0.04, metadata={"help": "of the teacher's, at the start"})
    teacher_temperature_warmup_epochs: float = field(
        default=30.0, metadata={"help": "epochs in which it rises; less for short trainings, 0 for at once"}
    )
    momentum: float = field(default=0.996, metadata={"help": "of the teacher at the start; rises to 1 by a cosine"})
    momentum_rises: bool = field(default=True, metadata={"help": "to 1 by a cosine; false: it stays"})
    centring: str = field(
        default="centre",
        metadata={"help": "of the teacher's logits: centre (moving average), sinkhorn, or none (which collapses)"},
    )
    centre_momentum: float = field(default=0.9, metadata={"help": "of the moving average"})
    freeze_last_layer_epochs: float = field(default=1.0, metadata={"help": "epochs without a step of the prototypes"})
    artifact: str = field(
        default="teacher", metadata={"help": "whose encoder is saved and evaluated: teacher (as there), or student"}
    )


class DINOObjective(MomentumObjective):
    """A student that sees all crops learns what a teacher says of the global ones.

    What a run saves and evaluates is the teacher's encoder, as in the official codes; `artifact="student"` keeps the
    student's. The temperature of the teacher rises linearly over the warm-up, whose last step has all of it; DINO moves
    it once an epoch (and the flags of its code leave it at 0.04 unless asked), DINOv2 with every step. The centre is a
    buffer and moves after the step with the mean of all ranks. Their drop path (0.1 in DINO, 0.3 in DINOv2; of the
    student alone) is the encoder's `drop_path_rate`, where its config has one.

    Args:
        encoder: to train.
        config: see `Config`.

    Attributes:
        head: prototypes over the student's image vector; the teacher has its own, `teacher.module["head"]`.
        centring: makes probabilities of the teacher's logits.
        temperature_by_epoch: the temperature rises once an epoch, where the warm-up is a whole number of them.

    Raises:
        ValueError: a temperature that is not positive, a size below one, an unknown centring or artifact, a
            momentum out of range, or negative epochs.
    """

    learn_prototype_norm = False
    temperature_by_epoch: ClassVar[bool] = False
    # the official codes leave out biases and what has one dimension, and nothing else
    also_decays: ClassVar[tuple[str, ...]] = (*TOKENS, *POSITIONS)

    def __init__(self, encoder: VisionEncoder, config: Any = None) -> None:
        super().__init__(encoder, config)
        config = self.config
        for name in ("student_temperature", "teacher_temperature", "teacher_temperature_start"):
            if not getattr(config, name) > 0:
                raise ValueError(f"{name}={getattr(config, name)} must be positive; the paper has 0.1, 0.07 and 0.04")
        for name in ("teacher_temperature_warmup_epochs", "freeze_last_layer_epochs"):
            if not getattr(config, name) >= 0:
                raise ValueError(f"{name}={getattr(config, name)} must not be negative; use 0 for none")
        if config.artifact not in ARTIFACTS:
            raise ValueError(unknown_name("artifact", str(config.artifact), ARTIFACTS))
        self.centring = self.build_centring()

    @property
    def artifact_encoder(self) -> VisionEncoder:
        """The teacher's, which the official codes save and evaluate; with `artifact="student"` the student's."""
        return self.encoder if self.config.artifact == "student" else self.teacher.module["encoder"]

    @property
    def artifact_is(self) -> str:
        return f"the {self.config.artifact}'s encoder"

    @property
    def out_dim(self) -> int:
        """How many prototypes there are."""
        return int(self.head.out_features)  # type: ignore[arg-type]

    def build_head(self, width: int) -> DINOHead:
        config = self.config
        return DINOHead(
            width,
            LARGE_OUT if config.out_dim is None else config.out_dim,
            config.head_hidden,
            config.head_bottleneck,
            config.head_layers,
            norm="batch" if config.head_batch_norm else None,
            learn_norm=self.learn_prototype_norm,
        )

    def build_centring(self) -> Centring:
        return Centring(self.out_dim, self.config.centring, momentum=self.config.centre_momentum)

    def rates(self) -> dict[str, float | str]:
        """The prototypes stand still for the first epoch."""
        epochs = self.config.freeze_last_layer_epochs
        return {"head.last_layer": f"frozen:{epochs:g}"} if epochs else {}

    def before_training(self, rows: int | None, batch_size: int) -> None:
        """Data of under 20,000 images get heads of 1024 prototypes, unless `out_dim` says otherwise."""
        super().before_training(rows, batch_size)
        if self.config.out_dim is None and rows is not None and rows < SMALL_DATA and self.out_dim != SMALL_OUT:
            self.config.out_dim = SMALL_OUT
            self.rebuild_heads()

    def rebuild_heads(self) -> None:
        """Heads of the student and the teacher, and the centre, after `out_dim` changed; not during training."""
        device = self.encoder.device
        self.head = self.build_head(self.encoder.pooled_size).to(device)
        self.teacher = type(self.teacher)(self.student, self.config.momentum, batch_statistics=True)
        self.centring = self.build_centring().to(device)

    @property
    def teacher_temperature(self) -> float:
        """Of this step."""
        config = self.config
        epochs, start = config.teacher_temperature_warmup_epochs, config.teacher_temperature_start
        now, last = self.epoch, epochs - self.epochs_a_step  # the last step of the warm-up has the whole of it
        if self.temperature_by_epoch and epochs == int(epochs):
            now, last = float(math.floor(self.epoch + 1e-9)), epochs - 1
        done = now >= epochs or (last > 0 and now / last)
        return start + (config.teacher_temperature - start) * min(float(done), 1.0)

    def embed(self, views: Tensor, local_views: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        """Image vectors, before the heads.

        Args:
            views: `[B, G, 3, H, W]` global crops.
            local_views: `[B, L, 3, h, w]`, which only the student sees.

        Returns:
            `student` `[B, G + L, P]` and `teacher` `[B, G, P]`; gradient caching's second pass leaves the latter out.
        """
        student = self.features(self.encoder, views)
        if local_views is not None:
            student = torch.cat([student, self.features(self.encoder, local_views, least=1)], dim=1)
        if self.replaying:
            return {"student": student}
        with torch.no_grad():
            return {"student": student, "teacher": self.features(self.teacher.module["encoder"], views)}

    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        """`embeddings` as `embed` returns them."""
        temperature = self.teacher_temperature
        with torch.no_grad():
            logits = self.teacher.module["head"](embeddings["teacher"])
            targets = self.centring(logits.flatten(0, 1), temperature).view(logits.shape)
        student = self.head(embeddings["student"])
        loss = dino_loss(student, targets, temperature=self.config.student_temperature)
        metrics = self.collapse_metrics(h=embeddings["student"][:, 0]) | _entropies(targets, loss)
        metrics["teacher_temperature"] = loss.new_tensor(temperature)
        return ObjectiveOutput(loss=loss, metrics=metrics)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """The centre moves, the teacher follows."""
        self.centring.update()
        super().after_step(progress)

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float | None:
        """ln K: every prototype equally likely, which a collapse to uniform outputs also gives."""
        return math.log(self.out_dim)


@torch.no_grad()
def _entropies(targets: Tensor, loss: Tensor) -> dict[str, Tensor]:
    """How sure the teacher is of a view, how evenly it uses its prototypes, and what is left to learn.

    A collapse to one prototype takes `prototype_entropy` to 0, one to uniform outputs `teacher_entropy` to ln K;
    either takes the divergence to 0 (figure 7 of the paper).
    """
    sure = torch.special.entr(targets).sum(-1).mean()
    sums = torch.cat([targets.sum((0, 1)), targets.new_tensor([float(targets[..., 0].numel())])])
    sums = all_reduce(sums)
    used = torch.special.entr(sums[:-1] / sums[-1]).sum()
    return {"teacher_entropy": sure, "prototype_entropy": used, "divergence": loss.detach() - sure}
