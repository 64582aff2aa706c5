"""Barlow Twins: two views agree in every dimension, and no dimension says what another says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.functional.redundancy import barlow_twins, invariance_term
from mllm_vision.modules.heads import MLPHead
from mllm_vision.objectives.base import ImageObjective, ObjectiveOutput


class BarlowTwins(ImageObjective):
    """The cross-correlation of the two views' projections, over the batch of all ranks, driven to the identity.

    No negatives, no teacher, no predictor. The projector is the official code's: BatchNorm and ReLU between linear
    layers, none of which has a bias; each view is a batch of its own for its statistics. The rates of training are
    the official code's too, cosine to a thousandth included.

    Args:
        encoder: to train; any backbone.
        config: see `Config`.

    Raises:
        ValueError: a negative `lambd`, or a size below one.

    Reference:
        Zbontar et al., 2021, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", section 2
        (https://arxiv.org/abs/2103.03230).
    """

    citation: ClassVar[str] = r"""@article{zbontar2021barlow,
  title = {Barlow Twins: Self-Supervised Learning via Redundancy Reduction},
  author = {Zbontar, Jure and Jing, Li and Misra, Ishan and LeCun, Yann and Deny, St{\'e}phane},
  journal = {arXiv:2103.03230},
  year = {2021}
}"""

    views: ClassVar[str] = "barlow_twins"
    loss_parts: ClassVar[tuple[str, ...]] = ("invariance",)
    training_defaults: ClassVar[dict[str, Any]] = {
        "optim": "lars",
        "optim_args": "variant=barlow_twins",
        "base_learning_rate": 0.2,
        "base_bias_learning_rate": 0.0048,
        "lr_scaling": "linear",
        "weight_decay": 1e-6,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.001},
        "warmup_steps": 0.01,  # 10 epochs of 1000
        "max_grad_norm": 0.0,
    }

    @dataclass
    class Config:
        """Flags of the method."""

        lambd: float = field(default=0.0051, metadata={"help": "Weight of the off-diagonal terms."})
        head_hidden: int = field(default=8192, metadata={"help": "Width in the projector."})
        head_out: int = field(default=8192, metadata={"help": "Width that it projects to; wide is better here."})
        head_layers: int = field(default=3, metadata={"help": "Layers of the projector."})
        zero_init_residual: bool = field(
            default=True, metadata={"help": "Residual blocks of a built ResNet start as the identity, as there."}
        )

    def __init__(self, encoder: VisionEncoder, config: Config | None = None) -> None:
        super().__init__(encoder, config)
        config = self.config
        if config.lambd < 0:
            raise ValueError(f"lambd={config.lambd} must not be negative; the paper has 0.0051")
        self.head = MLPHead(
            encoder.pooled_size, config.head_hidden, config.head_out, config.head_layers, last_bias=False
        )

    def embed(self, views: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """`views` `[B, 2, 3, H, W]` to `h` `[B, 2, P]`."""
        return {"h": self.features(self.encoder, views[:, :2], apart=True)}

    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        """`embeddings` as `embed` returns them."""
        h = embeddings["h"]
        z1, z2 = (self.head(view) for view in h.unbind(1))
        loss = barlow_twins(z1, z2, lambd=self.config.lambd)
        metrics = self.collapse_metrics(h=h[:, 0], z=z1)
        with torch.no_grad():
            metrics["invariance"] = invariance_term(z1, z2)
        return ObjectiveOutput(loss=loss, metrics=metrics)

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float:
        """D: collapsed projections, or views that know nothing of one another, correlate in no dimension."""
        return float(self.config.head_out)
