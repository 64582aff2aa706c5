"""VICReg: views agree, every dimension varies, none repeats another; the branches may be different networks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.encoder.sources import build_encoder
from mllm_vision.encoder.stems import zero_last_norms
from mllm_vision.functional.redundancy import vicreg
from mllm_vision.modules.heads import MLPHead
from mllm_vision.objectives.base import ImageObjective, ObjectiveOutput

VARIANCE_EPS = 1e-4


class VICReg(ImageObjective):
    """Invariance, variance and covariance of the two branches' embeddings, over the batch of all ranks.

    Variance and covariance are taken of each branch by itself, so that the branches need nothing in common but the
    width of their embeddings. Both are the encoder as a rule. With `second_encoder` the second view goes through that
    one and an expander of its own: another architecture, trained beside the first; the artifact is the first. With
    `shared_expander=False` alone the encoder is shared and the expanders are two. The expander is the official code's:
    BatchNorm and ReLU between linear layers, the last one without bias (the others' would do nothing before a
    BatchNorm, and are left out).

    Args:
        encoder: to train; any backbone.
        config: see `Config`.

    Raises:
        ValueError: a negative weight, a size below one, or overrides of a second encoder that is not built here.
        FileNotFoundError: a second encoder that does not exist.

    Reference:
        Bardes et al., 2022, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
        section 4 and algorithm 1 (https://arxiv.org/abs/2105.04906).
    """

    citation: ClassVar[str] = r"""@article{bardes2021vicreg,
  title = {VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning},
  author = {Bardes, Adrien and Ponce, Jean and LeCun, Yann},
  journal = {arXiv:2105.04906},
  year = {2021}
}"""

    views: ClassVar[str] = "vicreg"
    loss_parts: ClassVar[tuple[str, ...]] = ("invariance", "variance", "covariance")
    training_defaults: ClassVar[dict[str, Any]] = {
        "optim": "lars",
        "optim_args": "variant=barlow_twins",
        "base_learning_rate": 0.2,
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

        invariance: float = field(default=25.0, metadata={"help": "Weight of the distance between the views."})
        variance: float = field(default=25.0, metadata={"help": "Weight of the variance; without it all collapses."})
        covariance: float = field(default=1.0, metadata={"help": "Weight of the covariance."})
        head_hidden: int = field(default=8192, metadata={"help": "Width in the expander."})
        head_out: int = field(default=8192, metadata={"help": "Width that it expands to."})
        head_layers: int = field(default=3, metadata={"help": "Layers of the expander."})
        zero_init_residual: bool = field(
            default=True, metadata={"help": "Residual blocks of a built ResNet start as the identity, as there."}
        )
        shared_expander: bool = field(default=True, metadata={"help": "One expander for both branches."})
        second_encoder: str | None = field(
            default=None,
            metadata={"help": "Network of the second view (path, Hub id, model type); default: the same."},
        )
        second_encoder_overrides: dict[str, Any] = field(
            default_factory=dict, metadata={"help": "Its config fields, where it is built: hidden_size=128"}
        )

    def __init__(self, encoder: VisionEncoder, config: Config | None = None) -> None:
        super().__init__(encoder, config)
        config = self.config
        weights = {name: getattr(config, name) for name in ("invariance", "variance", "covariance")}
        if min(weights.values()) < 0:
            values = ", ".join(f"{name}={value}" for name, value in weights.items())
            raise ValueError(f"{values}: no weight may be negative; the paper's are 25, 25 and 1")
        self.second_encoder: VisionEncoder | None = None
        if config.second_encoder is not None:
            self.second_encoder = build_encoder(
                config.second_encoder, image_size=encoder.image_size, overrides=config.second_encoder_overrides
            )
            if config.zero_init_residual and not self.second_encoder.pretrained:
                zero_last_norms(self.second_encoder.backbone)
        elif config.second_encoder_overrides:
            raise ValueError("second_encoder_overrides without second_encoder; name the model type to build")
        self.head = self._expander(encoder)
        separate = self.second_encoder is not None or not config.shared_expander
        self.second_head = self._expander(self.second_encoder or encoder) if separate else None

    def _expander(self, encoder: VisionEncoder) -> MLPHead:
        config = self.config
        return MLPHead(encoder.pooled_size, config.head_hidden, config.head_out, config.head_layers, last_bias=False)

    def embed(self, views: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """`views` `[B, 2, 3, H, W]` to `h1` `[B, P]` of the first branch and `h2` `[B, P2]` of the second."""
        if self.second_encoder is None:
            h1, h2 = self.features(self.encoder, views[:, :2], apart=True).unbind(1)
        else:
            self.check_views(views)
            h1 = self.features(self.encoder, views[:, :1], least=1)[:, 0]
            h2 = self.features(self.second_encoder, views[:, 1:2], least=1)[:, 0]
        return {"h1": h1, "h2": h2}

    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        """`embeddings` as `embed` returns them."""
        config = self.config
        z1 = self.head(embeddings["h1"])
        z2 = (self.head if self.second_head is None else self.second_head)(embeddings["h2"])
        weights = {"invariance": config.invariance, "variance": config.variance, "covariance": config.covariance}
        loss, terms = vicreg(z1, z2, **weights, eps=VARIANCE_EPS, return_terms=True)
        metrics = self.collapse_metrics(h=embeddings["h1"], z=z1)
        return ObjectiveOutput(loss=loss, metrics=metrics | {name: t.detach() for name, t in terms._asdict().items()})

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float:
        """What collapsed embeddings cost: the whole of the variance term and nothing else."""
        return self.config.variance * (1 - VARIANCE_EPS**0.5)
