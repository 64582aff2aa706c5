"""CLIP's activation with one backward kernel instead of five."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_SCALE = 1.702


class _QuickGelu(torch.autograd.Function):
    """x sigmoid(1.702 x) is silu(1.702 x) / 1.702, and the two factors cancel in the derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scaled = x * _SCALE
        ctx.save_for_backward(scaled)
        return F.silu(scaled).mul_(1 / _SCALE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (scaled,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient, scaled)


class QuickGelu(nn.Module):
    """`x * sigmoid(1.702 x)`, as transformers' `QuickGELUActivation`; training saves one tensor instead of two.

    Evaluation uses transformers' formula, so that features equal those of plain transformers to the last bit.

    Reference:
        Hendrycks and Gimpel, 2016, "Gaussian Error Linear Units", section 2 (https://arxiv.org/abs/1606.08415).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape; elementwise."""
        return _QuickGelu.apply(x) if self.training else x * torch.sigmoid(_SCALE * x)


def use_fast_activations(model: nn.Module) -> None:
    """Replaces transformers' `QuickGELUActivation` by `QuickGelu`, in place; neither has parameters."""
    from transformers.activations import QuickGELUActivation

    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is QuickGELUActivation:
                setattr(module, name, QuickGelu().train(child.training))
