"""The claims of collapse.py that need no training of their own: the temperature's weights and the bound of InfoNCE."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_vision.functional.infonce import info_nce, mutual_information_bound

TEMPERATURES = (0.05, 0.07, 0.1, 0.2, 0.5, 1.0, 2.0)


def hard_shares(embeddings: Tensor, temperatures: tuple[float, ...] = TEMPERATURES) -> list[dict[str, Any]]:
    """How InfoNCE's gradient is shared out among an anchor's negatives.

    A negative's weight is exp(s / t) over the sum of all negatives'. With them ordered from the most similar on, a
    record holds the share of the hardest hundredth and tenth, the number of negatives that count (exp of the
    weights' entropy), and the cumulated share by rank.

    Args:
        embeddings: `[N, D]`, one view each of N samples; averaged over anchors.
    """
    unit = F.normalize(embeddings.double(), dim=1)
    cosine = unit @ unit.T
    count = len(unit) - 1
    negatives = cosine[~torch.eye(len(unit), dtype=torch.bool)].view(len(unit), count).sort(1, descending=True).values
    found = []
    for temperature in temperatures:
        weights = (negatives / temperature).softmax(1)
        cumulated = weights.cumsum(1).mean(0)
        found.append(
            {
                "temperature": temperature,
                "hardest_hundredth": cumulated[max(1, round(count / 100)) - 1].item(),
                "hardest_tenth": cumulated[max(1, round(count / 10)) - 1].item(),
                "negatives_that_count": torch.special.entr(weights).sum(1).exp().mean().item(),
                "cumulated": cumulated.tolist(),
            }
        )
    return found


def gaussian_pairs(
    count: int, information: float, dimensions: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """x and y `[count, 2 + dimensions]` of correlated Gaussians, as features whose inner product is the best critic.

    With correlation r in each dimension the mutual information is -dimensions/2 ln(1 - r^2), and up to a constant
    ln p(y|x)/p(y) = (r <x, y> - r^2 (|x|^2 + |y|^2) / 2) / (1 - r^2): an inner product of (x, |x|^2, 1) and
    (y, 1, |y|^2), suitably scaled. No critic gives a larger bound.
    """
    squared = 1 - math.exp(-2 * information / dimensions)
    r, rest = math.sqrt(squared), 1 - squared
    x = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    y = r * x + math.sqrt(rest) * noise
    one = torch.ones(count, 1, dtype=torch.float64)
    half = squared / 2 / rest
    lengths = [rows.square().sum(1, keepdim=True) for rows in (x, y)]
    return torch.cat([r / rest * x, -half * lengths[0], one], 1), torch.cat([y, one, -half * lengths[1]], 1)


def bounds(
    informations: list[float],
    candidates: list[int],
    *,
    dimensions: int = 20,
    samples: int = 8192,
    batches: int = 100,
    seed: int = 0,
) -> list[dict[str, float]]:
    """The bound ln N - loss for Gaussians of known information, by the number N of candidates.

    Each record holds the mean over `samples` / N batches, at most `batches`, and the highest single batch.
    """
    found = []
    for information in informations:
        for count in candidates:
            generator = torch.Generator().manual_seed(seed)
            values = []
            for _ in range(max(1, min(batches, samples // count))):
                x, y = gaussian_pairs(count, information, dimensions, generator)
                loss = info_nce(x, y, temperature=1.0, normalize=False)
                values.append(float(mutual_information_bound(loss, count - 1)))
            found.append(
                {
                    "information": information,
                    "candidates": count,
                    "bound": sum(values) / len(values),
                    "highest": max(values),
                    "limit": math.log(count),
                }
            )
    return found
