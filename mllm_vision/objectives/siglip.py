"""SigLIP: whether an image and a text belong together, asked of every pair by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mllm_vision.distributed import world_size
from mllm_vision.encoder.dual import DualEncoder
from mllm_vision.functional.image_text import related, siglip_loss
from mllm_vision.objectives.base import ObjectiveOutput
from mllm_vision.objectives.image_text import ImageTextObjective, TiledConfig


class SigLIP(ImageTextObjective):
    """Pairwise sigmoid loss over the images and texts of the whole batch, over all ranks.

    Duplicates of a caption or an image within the batch are positives (labelled +1).

    Args:
        dual: image and text tower, made with a logit bias.
        config: see `Config`.

    Raises:
        ValueError: a pair without a logit bias, or a scale that is not positive.

    Reference:
        Zhai et al., 2023, "Sigmoid Loss for Language Image Pre-Training", section 3.2
        (https://arxiv.org/abs/2303.15343).
    """

    citation: ClassVar[str] = r"""@article{zhai2023siglip,
  title = {Sigmoid Loss for Language Image Pre-Training},
  author = {Zhai, Xiaohua and Mustafa, Basil and Kolesnikov, Alexander and Beyer, Lucas},
  journal = {arXiv:2303.15343},
  year = {2023}
}"""

    @dataclass
    class Config(TiledConfig):
        """Flags of the method."""

        initial_logit_scale: float | None = field(
            default=10.0, metadata={"help": "t at the start; 'null' keeps a loaded pair's"}
        )
        initial_logit_bias: float | None = field(
            default=-10.0,
            metadata={"help": "b at the start: -10, or -2.71 for small batches; 'null' keeps a loaded pair's"},
        )

    has_bias = True
    # section 4 of the paper; big_vision's decay of 1e-4 is not times the rate, AdamW's is
    training_defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
    }

    def __init__(self, dual: DualEncoder, config: Config | None = None) -> None:
        super().__init__(dual, config)
        scale = self.config.initial_logit_scale
        if dual.logit_bias is None:
            raise ValueError("the sigmoid loss needs a logit bias; build the pair with logit_bias=-10.0")
        if scale is not None and scale <= 0:
            raise ValueError(f"initial_logit_scale={scale} must be positive")
        self._set(dual.logit_scale, None if scale is None else math.log(scale))
        self._set(dual.logit_bias, self.config.initial_logit_bias)

    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        """`embeddings` as `embed` returns them."""
        bias = self.dual.logit_bias
        assert bias is not None
        loss = siglip_loss(
            embeddings["image"],
            embeddings["text"],
            self.dual.logit_scale.exp(),
            bias,
            relations=embeddings.get("ids"),
            **self.config.engine,
        )
        return ObjectiveOutput(loss=loss, metrics=self.metrics(embeddings))

    @torch.no_grad()
    def metrics(self, embeddings: dict[str, Tensor]) -> dict[str, Tensor]:
        """As for every pair, and what the bias has to settle: how many pairs are positive, and how many are called so.

        `positives` texts belong to an image of the batch (more than one where there are duplicates), and
        `predicted_positives` is the sum of its probabilities; where the bias has its optimum the two are equal.
        Both are estimated from at most 64 images and 1024 texts of this rank.
        """
        metrics = super().metrics(embeddings)
        image, text = embeddings["image"][:64], embeddings["text"][:1024]
        own = torch.zeros(len(image), len(text), dtype=torch.bool, device=image.device)
        own.fill_diagonal_(True)
        ids = embeddings.get("ids")
        positive = own if ids is None else own | related(ids[:64], ids[:1024])
        others = (~own).sum(1).clamp_min(1)
        negatives = len(embeddings["text"]) * world_size() - 1
        for name, values in (
            ("positives", positive.float()),
            ("predicted_positives", self.dual.logits(image, text).sigmoid()),
        ):
            beside = values.masked_fill(own, 0).sum(1) / others * negatives
            metrics[name] = (values.diagonal() + beside).mean()
        return metrics

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float:
        """P ln(N / P) + (N - P) ln(N / (N - P)) for P positives an image; for P = 1 about ln N + 1.

        The best that a model can do that gives every pair the same answer: it says yes with probability P / N.
        """
        rest = batch_size - positives
        if rest <= 0:
            return 0.0
        return positives * math.log(batch_size / positives) + rest * math.log(batch_size / rest)
