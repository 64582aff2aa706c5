"""SimSiam: each view predicts the other's projection, which stands still while it does; no teacher, no negatives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.functional.distillation import negative_cosine
from mllm_vision.modules.heads import MLPHead
from mllm_vision.objectives.base import ImageObjective, ObjectiveOutput


class SimSiam(ImageObjective):
    """Half of the two negative cosines between the prediction of each view and the projection of the other.

    The predictor's learning rate stays at its peak while the others fall (the official code's `--fix-pred-lr`). Without
    predictor or stop-gradient the outputs collapse to one vector.

    Args:
        encoder: to train; any backbone.
        config: see `Config`.

    Attributes:
        head: the projector. predictor: behind it.
        stop_gradient: False lets the gradient into the targets too. To show the collapse.

    Raises:
        ValueError: a size below one.

    Reference:
        Chen and He, 2021, "Exploring Simple Siamese Representation Learning", algorithm 1, equations 1-4
        (https://arxiv.org/abs/2011.10566).
    """

    citation: ClassVar[str] = r"""@article{chen2020simsiam,
  title = {Exploring Simple Siamese Representation Learning},
  author = {Chen, Xinlei and He, Kaiming},
  journal = {arXiv:2011.10566},
  year = {2020}
}"""

    views: ClassVar[str] = "simsiam"
    stop_gradient: bool = True
    training_defaults: ClassVar[dict[str, Any]] = {
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "base_learning_rate": 0.05,
        "lr_scaling": "linear",
        "weight_decay": 1e-4,
        "weight_decay_on": "all",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
    }

    @dataclass
    class Config:
        """Flags of the method."""

        head_hidden: int = field(default=2048, metadata={"help": "width in the projector"})
        head_out: int = field(default=2048, metadata={"help": "width of projections and predictions"})
        head_layers: int = field(default=3, metadata={"help": "layers of the projector; the paper's CIFAR runs: 2"})
        predictor_hidden: int = field(default=512, metadata={"help": "width in the predictor, the narrower part"})
        zero_init_residual: bool = field(
            default=True, metadata={"help": "residual blocks of a built ResNet start as the identity, as there"}
        )
        head_last_norm: str = field(
            default="batch_no_affine",
            metadata={"help": "after the projector: batch_no_affine, batch or batch_no_bias"},
        )
        fixed_predictor_rate: bool = field(
            default=True, metadata={"help": "the predictor's learning rate does not decay"}
        )

    def __init__(self, encoder: VisionEncoder, config: Config | None = None) -> None:
        super().__init__(encoder, config)
        config = self.config
        sizes = (encoder.pooled_size, config.head_hidden, config.head_out, config.head_layers)
        self.head = MLPHead(*sizes, last_norm=config.head_last_norm)
        self.predictor: nn.Module = MLPHead(config.head_out, config.predictor_hidden, config.head_out, 2)

    def rates(self) -> dict[str, float | str]:
        """The predictor's rate is constant."""
        fixed = self.config.fixed_predictor_rate and any(True for _ in self.predictor.parameters())
        return {"predictor": "constant"} if fixed else {}

    def embed(self, views: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """`views` `[B, 2, 3, H, W]` to `h` `[B, 2, P]`."""
        return {"h": self.features(self.encoder, views[:, :2], apart=True)}

    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        """`embeddings` as `embed` returns them; heads take one view at a time."""
        h = embeddings["h"]
        z = [self.head(view) for view in h.unbind(1)]
        cosines = [
            negative_cosine(self.predictor(view), other, stop_gradient=self.stop_gradient)
            for view, other in zip(z, reversed(z), strict=True)
        ]
        loss = torch.stack(cosines).mean()
        return ObjectiveOutput(loss=loss, metrics=self.collapse_metrics(h=h[:, 0], z=z[0]))

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float:
        """Predictions at right angles to their targets."""
        return 0.0
