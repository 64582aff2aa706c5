"""What LARS and LAMB share: a step group by group, with a rate for each matrix from its own norms."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class LayerAdaptiveOptimizer(torch.optim.Optimizer):
    """An optimizer whose update is scaled weight by weight; `step_group` says what the update is."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step; as `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            learning = [parameter for parameter in group["params"] if parameter.grad is not None]
            if learning:
                self.step_group(group, learning)
        return loss

    @abstractmethod
    def step_group(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        """One step of the weights of a group that have a gradient."""


def adapted(group: dict[str, Any], weights: Sequence[Tensor]) -> list[bool]:
    """Which weights have a rate of their own: matrices and kernels, unless the group is marked `decays=False`."""
    return [weight.ndim > 1 and group["decays"] for weight in weights]


def tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norms `[P]` of P tensors, in fp32 at least; of a `DTensor` the norm of the whole."""
    low = tensors[0].dtype in (torch.float16, torch.bfloat16)
    norms = torch._foreach_norm(list(tensors), 2, torch.float32 if low else None)
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return torch.stack([norm.to(whole[0].device) for norm in whole])


def adapt_(
    updates: Sequence[Tensor], chosen: Sequence[bool], weight_norms: Tensor, norms: Tensor, trust: float = 1.0
) -> None:
    """Multiplies the chosen updates by trust |w| / norm, in place; by 1 where one of the two norms is zero."""
    ratios = torch.where((weight_norms > 0) & (norms > 0), trust * weight_norms / norms, 1.0)
    for update, ratio, choose in zip(updates, ratios, chosen, strict=True):
        if choose:
            update.mul_(ratio.to(update.dtype))
