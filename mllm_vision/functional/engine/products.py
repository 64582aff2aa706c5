"""The matrix products of the tiled losses, by the fastest exact route of the machine.

On a CPU torch hands fp32 products to MKL, which on some processors with AVX-512 runs at half of what they can do;
oneDNN, which torch also carries, runs at full speed there (docs/engine.md has figures). Both compute in fp32. The
choice depends on the processor and on the shape alone, so a run repeats itself bit by bit.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

SMALLEST = 64  # rows, columns and depth below which the call itself costs more than it saves


@functools.cache
def _has_onednn() -> bool:
    """Whether torch's oneDNN linear layer is there and made for AVX-512, where it was measured to be faster."""
    if not torch.backends.mkldnn.is_available() or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    try:
        one = torch.eye(2)
        return torch.equal(_linear(one, 2 * one), 2 * one)
    except (AttributeError, RuntimeError, TypeError):  # an operator of torch's own compiler, without a promise
        return False


def _linear(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T` by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def _suits_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == torch.float32 and a.device.type == "cpu" and min(*a.shape, b.shape[1]) >= SMALLEST and _has_onednn()
    )


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """`a @ b`, `[r, k]` by `[k, c]`: written to `out` `[r, c]`, or in memory of its own where that is faster."""
    return _linear(a, b.T) if _suits_onednn(a, b) else torch.mm(a, b, out=out)


def add_product(target: Tensor, a: Tensor, b: Tensor) -> None:
    """`target += a @ b`."""
    if _suits_onednn(a, b):
        target += _linear(a, b.T)
    else:
        target.addmm_(a, b)
