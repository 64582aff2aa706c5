"""Classification: an encoder and a linear layer learn labels together (fine-tuning, recipes/finetune.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.objectives.base import ImageObjective, ObjectiveOutput


class Classification(ImageObjective):
    """Cross-entropy of a linear layer on the encoder's pooled vector; every row by itself, so batches may be split.

    It is not a method of stage zero (it learns labels) but their measure: `load_objective` does not list it.

    Args:
        encoder: to fine-tune.
        config: see `Config`.

    Raises:
        ValueError: fewer than two classes, or label smoothing outside [0, 1).
    """

    views: ClassVar[str] = "mae"
    couples_batch: ClassVar[bool] = False
    least_views: ClassVar[int] = 1
    training_defaults: ClassVar[dict[str, Any]] = {}

    @dataclass
    class Config:
        """Flags of fine-tuning."""

        label_smoothing: float = field(default=0.1, metadata={"help": "Share of the target spread over all classes."})
        classes: int | None = field(default=None, metadata={"help": "Classes; default: those of the training labels."})

    def __init__(self, encoder: VisionEncoder, config: Config | None = None) -> None:
        super().__init__(encoder, config)
        if self.config.classes is None or self.config.classes < 2:
            raise ValueError(f"classes={self.config.classes}: a classifier needs two classes or more")
        if not 0 <= self.config.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.config.label_smoothing} must lie in [0, 1); 0.1 is usual")
        self.head = nn.Linear(encoder.pooled_size, self.config.classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def embed(self, views: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """`views` `[B, V, 3, H, W]` and `labels` `[B]` to `losses` and `right`, `[B, V]`."""
        logits = self.head(self.features(self.encoder, views)).float()
        wanted = labels[:, None].expand(logits.shape[:2])
        losses = F.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), reduction="none", label_smoothing=self.config.label_smoothing
        )
        return {"losses": losses.view(wanted.shape), "right": (logits.detach().argmax(-1) == wanted).float()}

    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        """`embeddings` as `embed` returns them."""
        return ObjectiveOutput(loss=embeddings["losses"].mean(), metrics={"train_accuracy": embeddings["right"].mean()})

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float:
        """ln C: every class equally likely."""
        return math.log(self.config.classes)

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Classes `[N]` of pooled vectors `[N, P]`."""
        return self.head(features.to(self.head.weight.dtype)).argmax(dim=-1)
