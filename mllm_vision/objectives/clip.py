"""CLIP: images and texts of a batch find one another by softmax over all pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mllm_vision.encoder.dual import DualEncoder
from mllm_vision.functional.image_text import clip_loss
from mllm_vision.objectives.base import ObjectiveOutput
from mllm_vision.objectives.image_text import ImageTextObjective, TiledConfig


class CLIP(ImageTextObjective):
    """Symmetric softmax contrast of the images and texts of the whole batch, over all ranks.

    Duplicates of a caption or an image within the batch are positives: their targets share the row.

    Args:
        dual: image and text tower; a pair made for the sigmoid loss is refused.
        config: see `Config`.

    Raises:
        ValueError: a pair with a logit bias, or a scale outside [1, max_logit_scale].

    Reference:
        Radford et al., 2021, "Learning Transferable Visual Models From Natural Language Supervision",
        sections 2.3-2.5 (https://arxiv.org/abs/2103.00020).
    """

    citation: ClassVar[str] = r"""@article{radford2021clip,
  title = {Learning Transferable Visual Models From Natural Language Supervision},
  author = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and others},
  journal = {arXiv:2103.00020},
  year = {2021}
}"""

    @dataclass
    class Config(TiledConfig):
        """Flags of the method."""

        max_logit_scale: float = field(
            default=100.0, metadata={"help": "the logit scale is clamped to [1, this] after each step"}
        )

    def __init__(self, dual: DualEncoder, config: Config | None = None) -> None:
        super().__init__(dual, config)
        self._start_softmax(1.0, self.config.max_logit_scale)

    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        """`embeddings` as `embed` returns them."""
        loss = clip_loss(
            embeddings["image"],
            embeddings["text"],
            self.dual.logit_scale.exp(),
            relations=embeddings.get("ids"),
            **self.config.engine,
        )
        return ObjectiveOutput(loss=loss, metrics=self.metrics(embeddings))

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Keeps the scale in [1, max_logit_scale], as the paper does to prevent instability."""
        self.dual.logit_scale.clamp_(0.0, math.log(self.config.max_logit_scale))

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float:
        """ln N: every text equally likely, however many of them are positives."""
        return math.log(batch_size)

    @property
    def scale_limits(self) -> tuple[float, float]:
        return 1.0, self.config.max_logit_scale
