"""LARS: momentum SGD with a rate for each layer, the norm of its weights over that of its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllm_vision.errors import unknown_name
from mllm_vision.training.optim.layer_adaptation import LayerAdaptiveOptimizer, adapt_, adapted, tensor_norms

VARIANTS = ("simclr", "paper", "barlow_twins")


class LARS(LayerAdaptiveOptimizer):
    """Layer-wise adaptive rate scaling. With w a weight, g its gradient, b the decay, c the trust coefficient:

    - `simclr` (default; the official SimCLR code): u = g + b w, r = c |w| / |u|; v = m v + lr r u; w = w - v.
    - `paper` (Algorithm 1): r = c |w| / (|g| + b |w|), the rest as `simclr`.
    - `barlow_twins` (the official code of Barlow Twins, and of VICReg and BYOL): r as `simclr`, and the rate stays
      outside of the momentum: v = m v + r u; w = w - lr v. The same while lr stands still.

    r is 1 where a norm is zero, for parameters with one dimension or none (biases, norms, scales), and in groups
    marked `decays=False`. `optim.optimizers.parameter_groups` makes such a group, with b = 0, of all that takes
    no weight decay: as in the official codes, what is not decayed is not adapted.

    Args:
        params: parameters or groups.
        lr: of the whole; large beside plain SGD's (SimCLR: 0.3 B/256).
        momentum: m.
        weight_decay: b.
        trust_coefficient: c.
        variant: one of the above.

    Raises:
        ValueError: an unknown variant or a value out of range.

    Source: You et al., "Large Batch Training of Convolutional Networks" (2017), arXiv:1708.03888.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        variant: str = "simclr",
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(unknown_name("variant of LARS", variant, VARIANTS))
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} of LARS must lie in [0, 1), e.g. 0.9")
        if lr < 0 or weight_decay < 0 or trust_coefficient <= 0:
            raise ValueError(
                f"lr={lr} and weight_decay={weight_decay} must not be negative, and trust_coefficient="
                f"{trust_coefficient} must be positive"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "variant": variant,
            "decays": True,
        }
        super().__init__(params, defaults)

    def step_group(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        """One step of the weights of a group that have a gradient."""
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        rate, decay, paper = group["lr"], group["weight_decay"], group["variant"] == "paper"
        buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
        gradients = [weight.grad for weight in weights]
        updates = torch._foreach_add(gradients, weights, alpha=decay) if decay else torch._foreach_clone(gradients)
        chosen = adapted(group, weights)
        if any(chosen):
            weight_norms = tensor_norms(weights)
            norms = tensor_norms(gradients) + decay * weight_norms if paper else tensor_norms(updates)
            adapt_(updates, chosen, weight_norms, norms, group["trust_coefficient"])
        inside = group["variant"] != "barlow_twins"
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates, alpha=rate if inside else 1.0)
        torch._foreach_add_(weights, buffers, alpha=-1.0 if inside else -rate)
