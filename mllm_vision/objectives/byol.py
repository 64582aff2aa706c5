"""BYOL: the student predicts what a slow copy of itself makes of the other view; no negatives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.functional.distillation import negative_cosine
from mllm_vision.modules.heads import MLPHead
from mllm_vision.objectives.base import ObjectiveOutput
from mllm_vision.objectives.base_momentum import MomentumObjective


class BYOL(MomentumObjective):
    """Squared distance of unit vectors, 2 - 2 cos, of the prediction of each view to the target of the other, summed.

    What keeps it from the constant solution is the predictor and the target without gradient: without either of
    them it collapses (tests/objectives/test_collapse.py shows it). Heads, LARS and the momentum's rise are those of the
    official code: a bias before the BatchNorm, none behind it.

    Args:
        encoder: to train; any backbone.
        config: see `Config`.

    Attributes:
        predictor: behind the student's head alone.
        stop_gradient: False makes the student's own projection the target, with gradient. To show the collapse.

    Raises:
        ValueError: a size below one, or a momentum out of range.

    Reference:
        Grill et al., 2020, "Bootstrap Your Own Latent", equation 2, sections 3.1 and 3.2
        (https://arxiv.org/abs/2006.07733).
    """

    citation: ClassVar[str] = r"""@article{grill2020byol,
  title = {Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning},
  author = {Grill, Jean-Bastien and Strub, Florian and Altch{\'e}, Florent and others},
  journal = {arXiv:2006.07733},
  year = {2020}
}"""

    views: ClassVar[str] = "byol"
    stop_gradient: bool = True
    training_defaults: ClassVar[dict[str, Any]] = {
        "optim": "lars",
        "optim_args": "variant=barlow_twins",  # BYOL's own: the rate outside of the momentum
        "base_learning_rate": 0.2,
        "lr_scaling": "linear",
        "weight_decay": 1.5e-6,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.01,  # 10 epochs of 1000
        "max_grad_norm": 0.0,
    }

    @dataclass
    class Config:
        """Flags of the method."""

        momentum: float = field(
            default=0.996, metadata={"help": "of the target at the start; rises to 1 (the paper's 300 epochs: 0.99)"}
        )
        momentum_rises: bool = field(default=True, metadata={"help": "to 1 by a cosine; false: it stays"})
        head_hidden: int = field(default=4096, metadata={"help": "width in projector and predictor"})
        head_out: int = field(default=256, metadata={"help": "width of projections and predictions"})

    def __init__(self, encoder: VisionEncoder, config: Config | None = None) -> None:
        super().__init__(encoder, config)
        self.predictor: nn.Module = self._mlp(self.config.head_out)

    def _mlp(self, width: int) -> MLPHead:
        config = self.config
        return MLPHead(width, config.head_hidden, config.head_out, 2, bias=True, last_bias=False)

    def build_head(self, width: int) -> nn.Module:
        """The projector: `[N, width]` to `[N, head_out]`."""
        return self._mlp(width)

    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        """`embeddings` as `embed` returns them; heads take one view at a time."""
        h = embeddings["student"]
        z = [self.head(view) for view in h.unbind(1)]
        predictions = [self.predictor(view) for view in z]
        targets = z
        if self.stop_gradient:
            with torch.no_grad():
                targets = [self.teacher.module["head"](view) for view in embeddings["teacher"].unbind(1)]
        distances = [
            negative_cosine(prediction, target, stop_gradient=self.stop_gradient)
            for prediction, target in zip(predictions, reversed(targets), strict=True)
        ]
        loss = 4 + 2 * torch.stack(distances).sum()
        return ObjectiveOutput(loss=loss, metrics=self.collapse_metrics(h=h[:, 0], z=z[0]))

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float:
        """Predictions at right angles to their targets: 2 - 0 for each direction."""
        return 4.0
