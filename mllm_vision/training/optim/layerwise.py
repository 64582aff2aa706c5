"""LARS and LAMB: the update of each matrix is scaled to the norm of its weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mllm_vision.errors import unknown_name


class LayerwiseOptimizer(torch.optim.Optimizer):
    """An optimizer whose update is scaled per weight; subclasses define `step_group`."""

    variants: tuple[str, ...]

    def __init__(self, params: Any, *, variant: str, **defaults: Any) -> None:
        if variant not in self.variants:
            raise ValueError(unknown_name(f"variant of {type(self).__name__}", variant, self.variants))
        super().__init__(params, {**defaults, "variant": variant, "decays": True})

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


class LARS(LayerwiseOptimizer):
    """Layer-wise adaptive rate scaling. With w a weight, g its gradient, b the decay, c the trust coefficient:

    - `simclr` (default; the official SimCLR code): u = g + b w, r = c |w| / |u|; v = m v + lr r u; w = w - v.
    - `paper` (Algorithm 1): r = c |w| / (|g| + b |w|), the rest as `simclr`.
    - `barlow_twins` (the official code of Barlow Twins, and of VICReg and BYOL): r as `simclr`, and the rate stays
      outside of the momentum: v = m v + r u; w = w - lr v. The same while lr is constant.

    r is 1 where a norm is zero, for parameters with one dimension or none (biases, norms, scales), and in groups
    marked `decays=False`, which `optim.optimizers.parameter_groups` makes, with b = 0, of what takes no weight decay:
    as in the official codes, what is not decayed is not adapted.

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

    variants = ("simclr", "paper", "barlow_twins")

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
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} of LARS must lie in [0, 1), e.g. 0.9")
        if lr < 0 or weight_decay < 0 or trust_coefficient <= 0:
            raise ValueError(
                f"lr={lr} and weight_decay={weight_decay} must not be negative, and trust_coefficient="
                f"{trust_coefficient} must be positive"
            )
        settings = {"momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        super().__init__(params, variant=variant, lr=lr, **settings)

    def step_group(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        rate, decay = group["lr"], group["weight_decay"]
        buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
        gradients: Any = [weight.grad for weight in weights]
        updates = torch._foreach_add(gradients, weights, alpha=decay) if decay else torch._foreach_clone(gradients)
        if any(chosen := _adapted(group, weights)):
            weight_norms = tensor_norms(weights)
            paper = group["variant"] == "paper"
            norms = tensor_norms(gradients) + decay * weight_norms if paper else tensor_norms(updates)
            _adapt(updates, chosen, weight_norms, norms, group["trust_coefficient"])
        inside = group["variant"] != "barlow_twins"
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates, alpha=rate if inside else 1.0)
        torch._foreach_add_(weights, buffers, alpha=-1.0 if inside else -rate)


class LAMB(LayerwiseOptimizer):
    """Layer-wise adaptive moments. With Adam's moments m and v, weights w and decay b:

    - `paper` (default; Algorithm 2): u = m' / (sqrt(v') + eps) + b w with the bias-corrected m' and v';
      w = w - lr |w| / |u| u. The scaling function is the identity.
    - `bert` (the authors' code for BERT): the same without bias correction.

    |w| / |u| is 1 where a norm is zero, for parameters with one dimension or none, and in groups marked
    `decays=False`, as in `LARS`. NVIDIA's LAMB, which EVA-CLIP used, also divides the gradients by their global norm
    where that exceeds 1: use `--max_grad_norm 1.0`.

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

    variants = ("paper", "bert")

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
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} of LAMB must lie in [0, 1), e.g. (0.9, 0.999)")
        if lr < 0 or weight_decay < 0 or eps < 0:
            raise ValueError(f"lr={lr}, weight_decay={weight_decay} and eps={eps} must not be negative")
        super().__init__(params, variant=variant, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)

    def step_group(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        # the bias correction follows the steps of each parameter
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
        gradients: Any = [weight.grad for weight in weights]
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
        if any(chosen := _adapted(group, weights)):
            _adapt(updates, chosen, tensor_norms(weights), tensor_norms(updates))
        torch._foreach_add_(weights, updates, alpha=-group["lr"])


def tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norms `[P]` of P tensors, in fp32 at least; of a `DTensor` the norm of the whole."""
    low = tensors[0].dtype in (torch.float16, torch.bfloat16)
    norms = torch._foreach_norm(list(tensors), 2, torch.float32 if low else None)
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return torch.stack([norm.to(whole[0].device) for norm in whole])


def _adapted(group: dict[str, Any], weights: Sequence[Tensor]) -> list[bool]:
    return [weight.ndim > 1 and group["decays"] for weight in weights]


def _adapt(
    updates: Sequence[Tensor], chosen: Sequence[bool], weight_norms: Tensor, norms: Tensor, trust: float = 1.0
) -> None:
    """Multiplies the chosen updates by trust |w| / norm, in place; by 1 where one of the two norms is zero."""
    ratios = torch.where((weight_norms > 0) & (norms > 0), trust * weight_norms / norms, 1.0)
    for update, ratio, choose in zip(updates, ratios, chosen, strict=True):
        if choose:
            update.mul_(ratio.to(update.dtype))
