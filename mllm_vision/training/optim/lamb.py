"""LAMB: Adam's direction, scaled layer by layer to the norm of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllm_vision.errors import unknown_name
from mllm_vision.training.optim.layer_adaptation import LayerAdaptiveOptimizer, adapt_, adapted, tensor_norms

VARIANTS = ("paper", "bert")


class LAMB(LayerAdaptiveOptimizer):
    """Layer-wise adaptive moments. With Adam's moments m and v, weights w and decay b:

    - `paper` (default; Algorithm 2): u = m' / (sqrt(v') + eps) + b w with the bias-corrected m' and v';
      w = w - lr |w| / |u| u. The scaling function is the identity.
    - `bert` (the authors' code for BERT): the same without bias correction.

    |w| / |u| is 1 where a norm is zero, for parameters with one dimension or none (biases, norms, scales), and in
    groups marked `decays=False` (`training.optim.optimizers.parameter_groups` makes one, with b = 0). NVIDIA's
    LAMB, which EVA-CLIP used, also divides the gradients by their global norm where that exceeds 1:
    `--max_grad_norm 1.0` does so.

    Args:
        params: parameters or groups.
        lr: of the whole; the step of a matrix is lr times its norm (EVA-CLIP: 2e-4 to 1e-3).
        betas: of the two moments.
        eps: added to the root.
        weight_decay: b.
        variant: one of the above.

    Raises:
        ValueError: an unknown variant or a value out of range.

    Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (2020),
    arXiv:1904.00962.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        variant: str = "paper",
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(unknown_name("variant of LAMB", variant, VARIANTS))
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} of LAMB must lie in [0, 1), e.g. (0.9, 0.999)")
        if lr < 0 or weight_decay < 0 or eps < 0:
            raise ValueError(f"lr={lr}, weight_decay={weight_decay} and eps={eps} must not be negative")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "variant": variant,
            "decays": True,
        }
        super().__init__(params, defaults)

    def step_group(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        """One step of the weights of a group that have a gradient."""
        # parameters may get their first gradient later than others: the correction follows each one's own count
        by_count: dict[int, list[Tensor]] = {}
        for weight in weights:
            state = self.state[weight]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(weight)
                state["exp_avg_sq"] = torch.zeros_like(weight)
            state["step"] += 1
            by_count.setdefault(int(state["step"]), []).append(weight)
        for count, some in by_count.items():
            self._step_some(group, some, count)

    def _step_some(self, group: dict[str, Any], weights: list[Tensor], count: int) -> None:
        beta1, beta2 = group["betas"]
        first = [self.state[weight]["exp_avg"] for weight in weights]
        second = [self.state[weight]["exp_avg_sq"] for weight in weights]
        gradients = [weight.grad for weight in weights]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        corrected = group["variant"] == "paper"
        root = torch._foreach_div(second, 1 - beta2**count) if corrected else torch._foreach_clone(second)
        torch._foreach_sqrt_(root)
        torch._foreach_add_(root, group["eps"])
        updates = torch._foreach_div(first, root)
        if corrected:
            torch._foreach_div_(updates, 1 - beta1**count)
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        chosen = adapted(group, weights)
        if any(chosen):
            adapt_(updates, chosen, tensor_norms(weights), tensor_norms(updates))
        torch._foreach_add_(weights, updates, alpha=-group["lr"])
