"""ITC: image-text contrast against momentum towers and a queue, with soft targets, as in ALBEF and BLIP."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm_vision.encoder.dual import DualEncoder
from mllm_vision.functional.momentum_contrast import momentum_contrast
from mllm_vision.modules.momentum import MomentumTeacher
from mllm_vision.modules.queue import FeatureQueue
from mllm_vision.objectives.base import POSITIONS, TOKENS, ObjectiveOutput
from mllm_vision.objectives.image_text import ImageTextConfig, ImageTextObjective

MIN_LOGIT_SCALE = 2.0  # the official code keeps the temperature below 0.5


class ITC(ImageTextObjective):
    """Images and texts find the momentum features of one another among the batch of all ranks and a queue.

    The targets are a mixture of the true pair (and its duplicates, in the batch and in the queue) and of what the
    momentum towers believe, with a weight that rises to `alpha` over the first epoch.

    Where this differs from the official code: batch columns are gathered over ranks, so that two ranks compute what
    one does; the queue starts empty instead of with random vectors, and takes any batch size; the momentum towers
    run without dropout. The order of a step is theirs: towers follow, momentum features, loss, enqueue.

    Args:
        dual: image and text tower; a pair made for the sigmoid loss is refused.
        config: see `Config`.

    Attributes:
        temperature: learnt in place of `dual.logit_scale`, which follows it; None with `learn_temperature=False`.
        teacher: the momentum copy of the pair; part of checkpoints, not of the saved pair.
        queue: the last momentum features of images and texts, side by side in a row, with caption and image ids.
        epoch: how many epochs are done; the trainer keeps it up to date. None (a loop that does not) makes the
            whole training count as one.

    Raises:
        ValueError: a pair with a logit bias; an alpha, momentum, queue size, ramp or scale out of range.

    Reference:
        Li et al., 2021, "Align before Fuse", sections 3.2 and 3.3, equations 1, 2 and 6
        (https://arxiv.org/abs/2107.07651); Li et al., 2022, "BLIP" (https://arxiv.org/abs/2201.12086).
    """

    citation: ClassVar[str] = r"""@article{li2021albef,
  title = {Align before Fuse: Vision and Language Representation Learning with Momentum Distillation},
  author = {Li, Junnan and Selvaraju, Ramprasaath R. and Gotmare, Akhilesh Deepak and others},
  journal = {arXiv:2107.07651},
  year = {2021}
}"""

    also_decays: ClassVar[tuple[str, ...]] = ("temperature", *TOKENS, *POSITIONS)
    # of ALBEF's Pretrain.yaml; its warm-up is 2000 iterations of 30 epochs
    training_defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": 1e-4,
        "weight_decay": 0.02,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 0.0,
    }

    @dataclass
    class Config(ImageTextConfig):
        """Flags of the method."""

        alpha: float = field(default=0.4, metadata={"help": "weight of the momentum towers' soft targets"})
        alpha_ramp_epochs: float = field(
            default=1.0, metadata={"help": "alpha rises from 0 over so many epochs (BLIP's code: 2); 0 for at once"}
        )
        momentum: float = field(default=0.995, metadata={"help": "of the momentum towers, in [0, 1]"})
        queue_size: int = field(
            default=65536,
            metadata={"help": "momentum features kept from earlier batches (BLIP: 57600); any number, 0 for none"},
        )  # fmt: skip
        learn_temperature: bool = field(
            default=True, metadata={"help": "the temperature itself is learnt, as there; else the log of the scale"}
        )
        max_logit_scale: float = field(
            default=1000.0, metadata={"help": "the logit scale is clamped to [2, this] after each step"}
        )

    alpha_share: Tensor

    def __init__(self, dual: DualEncoder, config: Config | None = None) -> None:
        super().__init__(dual, config)
        self._check()
        self._start_softmax(MIN_LOGIT_SCALE, self.config.max_logit_scale)
        self.temperature: nn.Parameter | None = None
        if self.config.learn_temperature:
            self.temperature = nn.Parameter(dual.logit_scale.detach().neg().exp())
            dual.logit_scale.requires_grad_(False)  # follows after each step: what is saved and evaluated
        self.teacher = MomentumTeacher(dual, self.config.momentum)
        size = self.config.queue_size
        self.queue = FeatureQueue(size, 2 * dual.embed_dim, id_columns=2) if size else None
        self._alpha_share = 0.0 if self.config.alpha_ramp_epochs else 1.0  # for the host; the buffer for checkpoints
        self.register_buffer("alpha_share", torch.tensor(self._alpha_share))
        self.register_load_state_dict_post_hook(_read_alpha_share)
        self.epoch: float | None = None
        self._pending: tuple[Tensor, Tensor | None] | None = None
        if self.queue is not None:  # equal on every rank by itself: DistributedDataParallel need not send it each step
            self._ddp_params_and_buffers_to_ignore = [f"queue.{name}" for name, _ in self.queue.named_buffers()]

    def _check(self) -> None:
        config = self.config
        if not 0 <= config.alpha <= 1:
            raise ValueError(f"alpha={config.alpha} is not between 0 and 1; the papers use 0.4")
        if config.alpha_ramp_epochs < 0 or config.queue_size < 0:
            values = f"alpha_ramp_epochs={config.alpha_ramp_epochs} and queue_size={config.queue_size}"
            raise ValueError(f"{values} must not be negative; 0 stands for no ramp and no queue")

    @property
    def momentum_dual(self) -> DualEncoder:
        """The momentum towers."""
        return cast(DualEncoder, self.teacher.module)

    @property
    def alpha(self) -> float:
        """Weight of the soft targets at this step."""
        return self.config.alpha * self._alpha_share

    def embed(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        caption_ids: Tensor | None = None,
        image_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """As `ImageTextObjective.embed`, with the momentum features and two id columns (-1 where none was given).

        Returns:
            `image`, `text`, `image_momentum` and `text_momentum` `[B, E]`, and `ids` `[B, 2]` unless duplicates
            are not positives.
        """
        embeddings = super().embed(pixel_values, input_ids, attention_mask)
        if self.replaying:  # gradient caching asks again for what has a gradient, and these have none
            return embeddings
        with torch.no_grad():
            embeddings["image_momentum"] = self.momentum_dual.image_features(pixel_values)
            embeddings["text_momentum"] = self.momentum_dual.text_features(input_ids, attention_mask)
        if self.config.duplicate_positives:
            unknown = torch.full((len(input_ids),), -1, dtype=torch.int64, device=input_ids.device)
            ids = [unknown if column is None else column for column in (caption_ids, image_ids)]
            embeddings["ids"] = torch.stack(ids, dim=1)
        return embeddings

    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        """`embeddings` as `embed` returns them; what the queue takes after the step is kept until then."""
        image_keys, text_keys = _unit(embeddings["image_momentum"]), _unit(embeddings["text_momentum"])
        ids = embeddings.get("ids")
        queued = self.queue if self.queue is not None and len(self.queue) else None
        image_queue, text_queue = (None, None) if queued is None else queued.rows.chunk(2, dim=1)
        loss = momentum_contrast(
            embeddings["image"],
            embeddings["text"],
            image_keys,
            text_keys,
            self.dual.logit_scale.exp() if self.temperature is None else 1 / self.temperature,
            alpha=self.alpha,
            image_queue=image_queue,
            text_queue=text_queue,
            ids=ids,
            queue_ids=None if queued is None or ids is None else queued.ids,
        )
        if self.training:
            self._pending = torch.cat([image_keys, text_keys], dim=1), ids
        metrics = self.metrics(embeddings)
        metrics["alpha"] = loss.new_tensor(self.alpha)
        metrics["queue_rows"] = loss.new_tensor(float(len(queued or ())))
        return ObjectiveOutput(loss=loss, metrics=metrics)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Clamps the scale, puts the step's momentum features into the queue, lets the momentum towers follow."""
        if self.temperature is None:
            self.dual.logit_scale.clamp_(math.log(MIN_LOGIT_SCALE), math.log(self.config.max_logit_scale))
        else:
            self.temperature.clamp_(1 / self.config.max_logit_scale, 1 / MIN_LOGIT_SCALE)
            self.dual.logit_scale.copy_(-self.temperature.log())
        if self.queue is not None and self._pending is not None:
            self.queue.enqueue(*self._pending)
        self._pending = None
        self.teacher.update(self.dual)
        if self.config.alpha_ramp_epochs:
            done = progress if self.epoch is None else self.epoch
            self._alpha_share = min(1.0, done / self.config.alpha_ramp_epochs)
            self.alpha_share.fill_(self._alpha_share)

    def negatives(self, batch_size: int) -> int:
        """The rest of the batch, and the queue once it is full."""
        return batch_size - 1 + self.config.queue_size

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float:
        """ln of the number of columns, those of the batch and what the queue holds by now, whatever the targets."""
        return math.log(batch_size + (0 if self.queue is None else len(self.queue)))

    @property
    def scale_limits(self) -> tuple[float, float]:
        return MIN_LOGIT_SCALE, self.config.max_logit_scale


def _read_alpha_share(objective: ITC, _: Any) -> None:
    objective._alpha_share = float(objective.alpha_share)


def _unit(rows: Tensor) -> Tensor:
    """Rows of unit length, without gradient, in fp32 or better."""
    return F.normalize(rows.detach().to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)
