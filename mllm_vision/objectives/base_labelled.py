"""What the methods share that learn from labelled images: views, a head, and classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mllm_vision.distributed import row_counts
from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.functional.engine.tiles import first_row
from mllm_vision.modules.heads import MLPHead
from mllm_vision.objectives.base import ImageObjective


@dataclass
class LabelledConfig:
    """Flags of every method on labelled images; a method's `Config` inherits them and adds its own."""

    head_hidden: int | None = field(default=None, metadata={"help": "Width in the head; default: the encoder's."})
    head_out: int = field(default=128, metadata={"help": "Width that the head projects to."})
    head_layers: int = field(default=2, metadata={"help": "Layers of the head."})


class LabelledObjective(ImageObjective):
    """An encoder with a head without BatchNorm, on views of labelled images; a row labelled -1 is a class of its own.

    Args:
        encoder: to train; any backbone.
        config: the method's `Config`, a `LabelledConfig`.

    Raises:
        ValueError: a size below one.
    """

    views: ClassVar[str] = "supcon"
    # SupCon's: 0.05 at 256 rows (its recipe for CIFAR-10: 0.5 at 1024), 10 epochs of warm-up of 1000
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

    def __init__(self, encoder: VisionEncoder, config: Any = None) -> None:
        super().__init__(encoder, config)
        config, width = self.config, encoder.pooled_size
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

    @staticmethod
    def classes(labels: Tensor) -> Tensor:
        """`labels` `[B]`, where a row without one gets a class that no row of any rank has."""
        row = first_row(row_counts(labels), None) + torch.arange(len(labels), device=labels.device)
        return torch.where(labels < 0, -1 - row, labels)

    def labelled_metrics(self, embeddings: dict[str, Tensor]) -> dict[str, Tensor]:
        """The share of labelled rows, and spread and rank of the first views."""
        found = self.collapse_metrics(h=embeddings["h"][:, 0], z=embeddings["z"][:, 0])
        return found | {"labelled": (embeddings["labels"] >= 0).float().mean()}
