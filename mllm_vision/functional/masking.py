"""Masks for masked-image objectives: rectangles as in BEiT, iBOT and DINOv2, or single patches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mllm_vision.functional.precision import wide_dtype

__all__ = ["block_masks", "draws_of_blocks", "random_masks"]

_ATTEMPTS = 16  # rectangles tried for a view
_LEAST_PATCHES = 4  # of a rectangle
_LEAST_ASPECT = 0.3


def draws_of_blocks(height: int, width: int) -> int:
    """How many numbers in [0, 1) `block_masks` needs for a view."""
    return 4 * _ATTEMPTS + height * width


def random_masks(draws: Tensor, ratio: Tensor) -> Tensor:
    """Hides floor(ratio P) patches of each view, those with the smallest draws.

    Args:
        draws: `[N, P]` in [0, 1).
        ratio: `[N]` in [0, 1].

    Returns:
        bool `[N, P]`, True where hidden.

    Raises:
        ValueError: mismatched shapes.

    Example:
        >>> random_masks(torch.tensor([[0.3, 0.1, 0.9, 0.5]]), torch.tensor([0.5])).tolist()
        [[True, True, False, False]]
    """
    if draws.ndim != 2 or ratio.shape != draws.shape[:1]:
        raise ValueError(f"draws must be [N, P] and ratio [N], got {list(draws.shape)} and {list(ratio.shape)}")
    return _smallest(draws, _counts(ratio, draws.shape[1]))


def block_masks(draws: Tensor, ratio: Tensor, height: int, width: int) -> Tensor:
    """Hides floor(ratio H W) patches of each view, most of them in rectangles.

    A rectangle has an area between 4 patches and the number left to hide (at most half of the view), and an aspect
    ratio between 0.3 and 1 / 0.3; it is kept if it hides new patches and not too many. Single patches fill the rest, as
    in DINOv3's code (DINOv2's may hide fewer). A view's mask depends on its own draws only.

    Args:
        draws: `[N, draws_of_blocks(height, width)]` in [0, 1).
        ratio: `[N]` in [0, 1].
        height, width: of the grid of patches.

    Returns:
        bool `[N, height * width]`, True where hidden.

    Raises:
        ValueError: mismatched shapes.

    Reference:
        Bao et al., 2022, "BEiT: BERT Pre-Training of Image Transformers", algorithm 1
        (https://arxiv.org/abs/2106.08254).

    Example:
        >>> block_masks(torch.rand(3, draws_of_blocks(6, 6)), torch.tensor([0.0, 0.25, 0.5]), 6, 6).sum(1).tolist()
        [0, 9, 18]
    """
    if draws.ndim != 2 or draws.shape[1] != draws_of_blocks(height, width) or ratio.shape != draws.shape[:1]:
        raise ValueError(
            f"draws must be [N, {draws_of_blocks(height, width)}] for {height} x {width} patches and ratio [N], got "
            f"{list(draws.shape)} and {list(ratio.shape)}"
        )
    patches = height * width
    wanted = _counts(ratio, patches)
    rectangles = draws[:, : 4 * _ATTEMPTS].unflatten(1, (_ATTEMPTS, 4))
    down = torch.arange(height, device=draws.device)[:, None]
    across = torch.arange(width, device=draws.device)[None, :]
    mask = torch.zeros(len(draws), height, width, dtype=torch.bool, device=draws.device)
    left = wanted.clone()
    for area, aspect, top, start in (attempt.unbind(1) for attempt in rectangles.unbind(1)):
        largest = left.clamp(_LEAST_PATCHES, max(_LEAST_PATCHES, patches // 2)).to(draws.dtype)
        size = _LEAST_PATCHES + area * (largest - _LEAST_PATCHES)
        shape = torch.exp((2 * aspect - 1) * -math.log(_LEAST_ASPECT))
        h = (size * shape).sqrt().round().clamp(1, height)
        w = (size / shape).sqrt().round().clamp(1, width)
        y = (top * (height - h + 1)).floor()[:, None, None]
        x = (start * (width - w + 1)).floor()[:, None, None]
        inside = (down >= y) & (down < y + h[:, None, None]) & (across >= x) & (across < x + w[:, None, None])
        fresh = (inside & ~mask).sum((1, 2))
        taken = (fresh > 0) & (fresh <= left)
        mask |= inside & taken[:, None, None]
        left -= torch.where(taken, fresh, 0)
    rest = torch.where(mask.flatten(1), -1.0, draws[:, 4 * _ATTEMPTS :])
    return _smallest(rest, wanted)


def _counts(ratio: Tensor, patches: int) -> Tensor:
    # 0.7 of 10 patches must be 7, although fp32's 0.7 may be slightly smaller
    return (ratio.to(wide_dtype(ratio)) * patches * (1 + 1e-6)).floor().clamp(0, patches).to(torch.int64)


def _smallest(values: Tensor, counts: Tensor) -> Tensor:
    """True at the `counts[i]` smallest values of row i."""
    order = values.argsort(dim=1, stable=True)
    first = torch.arange(values.shape[1], device=values.device)[None, :] < counts[:, None]
    return torch.zeros_like(first).scatter(1, order, first)
