"""SupCon: every view finds the views of its class among all views of the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mllm_vision.distributed import row_counts
from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.functional.engine.tiles import first_row
from mllm_vision.functional.infonce import sup_con
from mllm_vision.modules.heads import MLPHead
from mllm_vision.objectives.base import ImageObjective, ObjectiveOutput


class SupCon(ImageObjective):
    """SimCLR with labels: the positives of a view are all views of its class, over all ranks.

    The form with the sum outside of the logarithm (equation 2). A row labelled -1 has no class: its own other view is
    its only positive, so that a partly labelled set trains too. The official code's head has no BatchNorm, and it
    trains CIFAR-10 at temperature 0.1 (0.07 is its default). Where this differs from it: the loss has no factor
    T / 0.07, and the cosine begins where the warm-up ends and moves with every step.

    Args:
        encoder: to train; any backbone.
        config: see `Config`.

    Raises:
        ValueError: a temperature that is not positive, or a size below one.

    Reference:
        Khosla et al., 2020, "Supervised Contrastive Learning", equation 2 (https://arxiv.org/abs/2004.11362).
    """

    citation: ClassVar[str] = r"""@article{khosla2020supcon,
  title = {Supervised Contrastive Learning},
  author = {Khosla, Prannay and Teterwak, Piotr and Wang, Chen and others},
  journal = {arXiv:2004.11362},
  year = {2020}
}"""

    views: ClassVar[str] = "supcon"
    # the official code's: 0.05 at 256 rows (its recipe for CIFAR-10: 0.5 at 1024), 10 epochs of warm-up of 1000
    training_defaults: ClassVar[dict[str, Any]] = {
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "base_learning_rate": 0.05,
        "lr_scaling": "linear",
        "weight_decay": 1e-4,
        "weight_decay_on": "all",
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.001},
        "warmup_steps": 0.01,
        "max_grad_norm": 0.0,
    }

    @dataclass
    class Config:
        """Flags of the method."""

        temperature: float = field(default=0.07, metadata={"help": "Of the softmax; CIFAR-10: 0.1."})
        head_hidden: int | None = field(default=None, metadata={"help": "Width in the head; default: the encoder's."})
        head_out: int = field(default=128, metadata={"help": "Width that the head projects to."})
        head_layers: int = field(default=2, metadata={"help": "Layers of the head."})

    def __init__(self, encoder: VisionEncoder, config: Config | None = None) -> None:
        super().__init__(encoder, config)
        config, width = self.config, encoder.pooled_size
        if not config.temperature > 0:
            raise ValueError(f"temperature={config.temperature} must be positive; the official code's is 0.07")
        self.head = MLPHead(width, config.head_hidden or width, config.head_out, config.head_layers, norm=None)

    def embed(self, views: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Projections of every view; the head works row by row.

        Args:
            views: `[B, V, 3, H, W]`.
            labels: `[B]` int64, -1 where there is none.

        Returns:
            `h` `[B, V, P]`, `z` `[B, V, D]` and `labels` `[B]`.
        """
        h = self.features(self.encoder, views)
        return {"h": h.detach(), "z": self.head(h), "labels": labels}

    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        """`embeddings` as `embed` returns them."""
        z, labels = embeddings["z"], embeddings["labels"]
        # an unlabelled row gets a class that no row of any rank has
        row = first_row(row_counts(labels), None) + torch.arange(len(labels), device=labels.device)
        classes = torch.where(labels < 0, -1 - row, labels)
        loss = sup_con(z, classes, temperature=self.config.temperature)
        metrics = self.collapse_metrics(h=embeddings["h"][:, 0], z=z[:, 0])
        return ObjectiveOutput(loss=loss, metrics=metrics | {"labelled": (labels >= 0).float().mean()})

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float:
        """ln(2N - 1), however the batch falls into classes: every other view equally likely."""
        return math.log(2 * batch_size - 1)
