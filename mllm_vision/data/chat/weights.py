"""Weights of the supervised tokens: the mean over tokens, over samples, or between the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllm_vision.data.chat.collate import IGNORED
from mllm_vision.data.chat.conversations import ConversationDataset

POWERS = {"token": 0.0, "sample": 1.0, "square_root": 0.5}  # of 1/n
PARTS = ("turns", "segments")  # what numbers the samples of a packed row


@dataclass(frozen=True)
class TokenWeights:
    """The weight of a supervised token, `scale / n**power`, where n counts the supervised tokens of its sample.

    `scale` makes the mean weight over the supervised tokens of a training set 1. The weighted sum of a batch divided
    by its number of supervised tokens is then an unbiased loss, and stays exact under gradient accumulation and over
    ranks, which count tokens.

    Args:
        power: 0 is the mean over tokens, 1 that over samples, 1/2 InternVL 2.5's (arXiv:2412.05271, section 3.2).
        scale: of all weights.
    """

    power: float
    scale: float

    @classmethod
    def of(cls, name: str, samples: ConversationDataset) -> TokenWeights:
        """The weights called "token", "sample" or "square_root" for these training samples.

        With `max_turns` and shuffled questions n differs between epochs; `scale` is that of the written order.

        Raises:
            ValueError: an unknown name.
        """
        if name not in POWERS:
            raise ValueError(f"loss_weights={name!r} is not one of {', '.join(POWERS)}")
        counts, shares = samples.supervised_tokens()
        total = (shares * counts * np.maximum(counts, 1.0) ** -POWERS[name]).sum()
        return cls(POWERS[name], float((shares * counts).sum() / total) if total else 1.0)

    def __call__(self, rows: Sequence[dict[str, Any]], length: int) -> Tensor:
        """float32 `[B, length]` for rows of `ConversationDataset` or packed ones: 0 where nothing is supervised."""
        weights = torch.zeros(len(rows), length)
        for number, row in enumerate(rows):
            supervised = np.asarray(row["labels"]) != IGNORED
            supervised[0] = False  # nothing precedes it
            parts = next((np.asarray(row[name]) for name in PARTS if name in row), np.zeros(len(supervised), np.int64))
            counts = np.bincount(parts[supervised], minlength=int(parts.max()) + 1)
            found = np.where(supervised, self.scale * np.maximum(counts[parts], 1.0) ** -self.power, 0.0)
            weights[number, : len(found)] = torch.from_numpy(found)
        return weights
