"""Clipping by parameter, or by module."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mllm_vision.training.optim.optimizers import plain_name


def clip_per_parameter_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale every gradient whose norm exceeds `max_norm` to that norm, each on its own, in place.

    Args:
        parameters: those without a gradient are skipped.
        max_norm: of one parameter's gradient.

    Returns:
        0-d: the norm of all gradients together, before clipping.

    Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (2021), official code:
    min(1, max_norm / (norm + 1e-6)) per parameter, with max_norm 3.0.
    """
    return _clip([[parameter] for parameter in parameters if parameter.grad is not None], max_norm)


def clip_per_module_(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients of each of the model's parts (encoder, head, ...) whose norm together exceeds `max_norm`.

    Args:
        model: its children are the parts; a parameter of its own counts with the child called `encoder`.
        max_norm: of a part's gradients together.

    Returns:
        0-d: the norm of all gradients together, before clipping.

    Source: the official code of Oquab et al., "DINOv2" (2023), which clips the backbone and each head, at 3.0.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part, dot, _ = plain_name(name).partition(".")
            parts.setdefault(part if dot else "encoder", []).append(parameter)
    return _clip(list(parts.values()), max_norm)


def _clip(groups: list[list[Tensor]], max_norm: float) -> Tensor:
    norms = [nn.utils.clip_grad_norm_(some, max_norm) for some in groups]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return torch.stack([norm.to(whole[0].device, torch.float32) for norm in whole]).norm() if whole else torch.zeros(())
