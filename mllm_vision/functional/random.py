"""Counter-based random numbers: a function of key and position, the same on every device, batch and rank.

Number `i` of stream `s` of a row is `splitmix64` of (the row's seed, s, i); there is no generator state.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniform(seeds: Tensor, stream: int, count: int) -> Tensor:
    """`[B, count]` float32 in [0, 1), on the device of `seeds`.

    Args:
        seeds: `[B]` int64, one key per row (the batch's `seeds` column).
        stream: which sequence of the row, one per purpose. Views use streams below 1000, methods (masks, noise) those
            from 1000 on.
        count: how many numbers; the first ones do not depend on it.

    Raises:
        ValueError: wrong shape or type of seeds, a negative stream or count.

    >>> seeds = torch.tensor([3, 4])
    >>> torch.equal(uniform(seeds, 1000, 5)[1:, :2], uniform(seeds[1:], 1000, 2))
    True

    Reference: Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators".
    """
    if seeds.ndim != 1 or seeds.dtype != torch.int64:
        raise ValueError(f"seeds must be [B] int64, got {list(seeds.shape)} {seeds.dtype}")
    if stream < 0 or count < 0:
        raise ValueError(f"stream={stream} and count={count} must not be negative")
    start = _mixed(seeds + _signed(_GOLDEN * (stream + 1)))
    steps = torch.arange(1, count + 1, device=seeds.device) * _signed(_GOLDEN)  # wraps around, as intended
    bits = _mixed(start[:, None] + steps)
    return _shifted(bits, 40).to(torch.float32) * 2.0**-24  # 24 bits: exact in float32, and never 1.0


def _mixed(state: Tensor) -> Tensor:
    """The output function of splitmix64 on int64, whose products wrap as unsigned ones do."""
    state = (state ^ _shifted(state, 30)) * _signed(_FIRST)
    state = (state ^ _shifted(state, 27)) * _signed(_SECOND)
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Logical right shift."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the lowest 64 bits of `value`."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
