"""SimCLR: two views of an image find one another among all other views of the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mllm_vision.distributed import world_size
from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.functional.infonce import dcl, mutual_information_bound, nt_xent
from mllm_vision.modules.heads import MLPHead
from mllm_vision.objectives.base import ImageObjective, ObjectiveOutput


class SimCLR(ImageObjective):
    """NT-Xent over the 2N views of the whole batch, over all ranks, behind a projection head.

    The head is the official code's: a BatchNorm (of all ranks) after every layer, the last one without bias; the
    evaluation uses h, before the head. The loss is the mean over the first views plus that over the second, as there:
    twice equation 3, which LARS does not see in matrices, but in biases and norms. The temperature is the paper's for
    CIFAR-10 and for small batches; the official code's flag says 0.1, which suits ImageNet and long trainings.
    With `decoupled` the positive leaves the denominator (DCL), with `dcl_sigma` pairs that disagree weigh more (DCLW).

    Args:
        encoder: to train; any backbone.
        config: see `Config`.

    Raises:
        ValueError: a temperature or `dcl_sigma` that is not positive, `dcl_sigma` without `decoupled`, or a size
            below one.

    Reference:
        Chen et al., 2020, "A Simple Framework for Contrastive Learning of Visual Representations", sections 2 and 4,
        equation 1 (https://arxiv.org/abs/2002.05709); Yeh et al., 2022, "Decoupled Contrastive Learning", equations 6
        and 7 (https://arxiv.org/abs/2110.06848).
    """

    citation: ClassVar[str] = r"""@article{chen2020simclr,
  title = {A Simple Framework for Contrastive Learning of Visual Representations},
  author = {Chen, Ting and Kornblith, Simon and Norouzi, Mohammad and Hinton, Geoffrey},
  journal = {arXiv:2002.05709},
  year = {2020}
}"""

    views: ClassVar[str] = "simclr"
    training_defaults: ClassVar[dict[str, Any]] = {
        "optim": "lars",
        "optim_args": "variant=simclr",
        "base_learning_rate": 0.3,
        "lr_scaling": "linear",
        "weight_decay": 1e-6,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,  # the paper's 10 epochs, of 100
        "max_grad_norm": 0.0,
    }

    @dataclass
    class Config:
        """Flags of the method."""

        temperature: float = field(default=0.5, metadata={"help": "Of the softmax; 0.1 suits long trainings too."})
        head_hidden: int | None = field(default=None, metadata={"help": "Width in the head; default: the encoder's."})
        head_out: int = field(default=128, metadata={"help": "Width that the head projects to."})
        head_layers: int = field(default=2, metadata={"help": "Layers of the head; SimCLR v2 has 3."})
        head_last_norm: str = field(
            default="batch_no_bias",
            metadata={"help": "After the last layer: batch_no_bias, batch or batch_no_affine."},
        )
        sum_of_views: bool = field(
            default=True,
            metadata={"help": "The losses of the two views are added, as in the official code."},
        )
        decoupled: bool = field(default=False, metadata={"help": "DCL: no positive in the denominator."})
        dcl_sigma: float | None = field(
            default=None, metadata={"help": "Of the weighted form, DCLW: 0.5; default: not weighted."}
        )

    def __init__(self, encoder: VisionEncoder, config: Config | None = None) -> None:
        super().__init__(encoder, config)
        if not self.config.temperature > 0:
            raise ValueError(f"temperature={self.config.temperature} must be positive; the paper's is 0.5")
        sigma = self.config.dcl_sigma
        if sigma is not None and not (sigma > 0 and self.config.decoupled):
            raise ValueError(f"dcl_sigma={sigma} must be positive, and belongs to --decoupled; the paper's is 0.5")
        width = encoder.pooled_size
        self.head = MLPHead(
            width,
            self.config.head_hidden or width,
            self.config.head_out,
            self.config.head_layers,
            last_norm=self.config.head_last_norm,
        )

    def embed(self, views: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """`views` `[B, 2, 3, H, W]` to `h` `[B, 2, P]`."""
        return {"h": self.features(self.encoder, views)}

    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        """`embeddings` as `embed` returns them."""
        h = embeddings["h"]
        z1, z2 = self.head(h).unbind(1)
        metrics, config = self.collapse_metrics(h=h[:, 0], z=z1), self.config
        if config.decoupled:
            mean = dcl(z1, z2, temperature=config.temperature, sigma=config.dcl_sigma)
            return ObjectiveOutput(loss=self._terms * mean, metrics=metrics)
        mean = nt_xent(z1, z2, temperature=config.temperature)
        negatives = 2 * len(z1) * world_size() - 2
        if negatives > 0:
            metrics["information_bound"] = torch.as_tensor(mutual_information_bound(mean.detach(), negatives))
        return ObjectiveOutput(loss=self._terms * mean, metrics=metrics)

    @property
    def _terms(self) -> int:
        return 2 if self.config.sum_of_views else 1

    def negatives(self, batch_size: int) -> int:
        """Both views of every other image."""
        return 2 * batch_size - 2

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float:
        """2 ln(2N - 1), once for each view's mean: every other view equally likely; with `decoupled` 2 ln(2N - 2)."""
        return self._terms * math.log(2 * batch_size - 1 - self.config.decoupled)
