"""Muon for the matrices of hidden layers, AdamW for everything else, in one optimizer.

`torch.optim.Muon` iterates in bf16 on every device (30 times slower on CPUs), matrix by matrix, and is a second
optimizer beside AdamW, where the Trainer has one; the update here is the same (`adjust_lr_fn="match_rms_adamw"`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Quintic iteration of Jordan et al. (2024): steep at zero, so five steps take singular values to about 1 (0.7 to 1.2).
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: Tensor, *, steps: int = 5) -> Tensor:
    """Approximately the nearest semi-orthogonal matrix: singular values become about 1.

    Args:
        matrices: `[..., rows, columns]`.
        steps: Newton-Schulz iterations.

    Returns:
        The same shape and dtype, computed in bf16 on GPUs and in fp32 on CPUs, where bf16 may be 30 times slower.

    Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    """
    x = matrices.to(torch.float32 if matrices.device.type == "cpu" else torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class MuonAdamW(torch.optim.AdamW):
    """AdamW, with Muon for the parameter groups marked `muon=True` (2-D parameters only).

    A Muon step is decoupled weight decay, then Nesterov momentum, then the orthogonalized direction times
    `lr * 0.2 * sqrt(max(rows, columns))`, which gives the update the RMS of an AdamW step: rates carry over.
    Meant for training from scratch, where it needs fewer samples than AdamW; see docs/architecture.md.

    Args:
        params: groups as for AdamW; `muon=True` in a group chooses Muon, `muon_momentum` its momentum.
        kwargs: AdamW's.

    Raises:
        ValueError: a group marked `muon` holds a parameter that is not a matrix.

    Source: Jordan et al. (2024); Liu et al., "Muon is Scalable for LLM Training" (2025), equation 4.
    """

    def __init__(self, params: Any, *, muon_momentum: float = 0.95, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        # With `fused` AdamW's kernel would look for overflows itself (torch 2.13), and the Muon half would not.
        self._step_supports_amp_scaling = False
        for group in self.param_groups:
            group.setdefault("muon", False)
            group.setdefault("muon_momentum", muon_momentum)
            for parameter in group["params"]:
                if group["muon"] and parameter.ndim != 2:
                    raise ValueError(f"Muon is for matrices; a parameter has shape {list(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of all groups; as `torch.optim.Optimizer.step`."""
        everything = self.param_groups
        self.param_groups = [group for group in everything if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = everything
        for group in everything:
            if group["muon"]:
                self._muon_step(group)
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        directions: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["step"] = torch.zeros(())  # AdamW's loading of a state looks for it
                state["momentum_buffer"] = torch.zeros_like(parameter)
            state["step"] += 1
            momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["muon_momentum"])
            direction = parameter.grad.lerp(momentum, group["muon_momentum"])
            directions.setdefault(parameter.shape, []).append((parameter, direction))
        for shape, pairs in directions.items():  # matrices of one shape go through the iteration together
            updates = orthogonalize(torch.stack([direction for _, direction in pairs]))
            for (parameter, _), update in zip(pairs, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)
