"""The precision of the losses: fp32 products, whatever autocast and TF32 settings surround them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def full_fp32(device: torch.device) -> Any:
    """A context in which autocast is off and fp32 products keep all 24 bits.

    `--tf32 true` and `torch.set_float32_matmul_precision("high")` let matrix products round their factors to 11 bits
    (TF32 on GPUs, a similar mode on CPUs). Networks tolerate that; a softmax at scale 100 loses its third digit.
    """
    off = torch.autocast(device_type=device.type, enabled=False)
    if torch.compiler.is_compiling():  # the switch cannot be traced
        return off
    owner = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(device.type)
    switch = getattr(owner, "matmul", None)
    return _FullFp32(off, switch) if hasattr(switch, "fp32_precision") else off  # torch has it from 2.9 on


class _FullFp32:
    def __init__(self, autocast: Any, switch: Any) -> None:
        self._autocast, self._switch = autocast, switch
        self._before: str | None = None

    def __enter__(self) -> None:
        self._autocast.__enter__()
        if self._switch.fp32_precision != "ieee":
            self._before, self._switch.fp32_precision = self._switch.fp32_precision, "ieee"

    def __exit__(self, *error: Any) -> None:
        if self._before is not None:
            self._switch.fp32_precision = self._before
        self._autocast.__exit__(*error)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The type of long sums on the device of `x`: fp64, because fp32 totals lose small terms; fp32 on MPS."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def full_precision(value: Tensor | float, like: Tensor) -> Tensor:
    """`value` as a 0-d tensor of the type and on the device of `like`."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=like.dtype, device=like.device)  # written by the device, not copied to it
    return value.to(like).reshape(())


def at_least_fp32(*features: Tensor) -> list[Tensor]:
    """Half-precision features in fp32, the others in the widest type among them."""
    precision = torch.float32
    for feature in features:
        precision = torch.promote_types(precision, feature.dtype)
    return [feature.to(precision) for feature in features]
