"""The precision that losses promise: fp32 products, whatever autocast and TF32 do around them."""

from __future__ import annotations

from typing import Any

import torch


def full_fp32(device: torch.device) -> Any:
    """A context in which autocast is off and fp32 products keep all 24 bits.

    `--tf32 true` and `torch.set_float32_matmul_precision("high")` let matrix products round their factors to 11 bits
    (TF32 on GPUs; CPUs have the like). A network may be trained so; a softmax at scale 100 loses its third digit.

    Args:
        device: on which the products run.
    """
    off = torch.autocast(device_type=device.type, enabled=False)
    if torch.compiler.is_compiling():  # a compiled product has the precision of its making; the switch is not traced
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


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """What long sums are carried in where `x` lies: fp64, as fp32 totals would lose small terms; MPS has none."""
    return torch.float32 if x.device.type == "mps" else torch.float64
