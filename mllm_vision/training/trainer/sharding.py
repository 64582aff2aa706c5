"""FSDP2 through the Trainer: what accelerate leaves to us so that our models train sharded and come out whole.

accelerate shards each transformer layer with `fully_shard` and the rest of the model as one more unit. Three things
are missing for our models: scalars (a logit scale) cannot be sharded, evaluators call parts of the model and not its
forward, and what comes after the training (saving, hashes, merging LoRA) expects plain tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")


def prepare_sharding(accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Before accelerate shards `model`: which layers, in which precision, and scalars left whole.

    A scalar stays on every rank; its gradients are averaged over ranks as FSDP does with the others, and it gets
    parameter groups of its own, because an optimizer's fused step takes sharded or whole tensors, not both.

    Args:
        accelerator: with an FSDP2 plugin.
        model: not sharded yet.
        optimizer: over the model's parameters.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = layer_classes(model)
    if accelerator.mixed_precision in ("bf16", "fp16"):
        # accelerate would sum gradients, and hand out the loss, in half precision
        half = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float16
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    scalars = [value for value in model.parameters() if value.ndim == 0]
    for value in scalars:
        value.data = value.data.to(accelerator.device)
        if value.requires_grad:
            value.register_post_accumulate_grad_hook(_average_gradient)
    if scalars:
        plugin.ignored_modules = [nn.ParameterList(scalars)]
    known = {id(value) for value in scalars}
    for group in list(optimizer.param_groups):
        apart = [value for value in group["params"] if id(value) in known]
        if apart and len(apart) < len(group["params"]):
            group["params"] = [value for value in group["params"] if id(value) not in known]
            settings = {name: value for name, value in group.items() if name != "params"}
            optimizer.add_param_group({"params": apart, **settings})


def layer_classes(model: nn.Module) -> list[str]:
    """Names of the repeated layers that the parts of `model` declare as not to be split."""
    declared = {name for part in model.modules() for name in (getattr(part, "_no_split_modules", None) or ())}
    return sorted(declared & {type(part).__name__ for part in model.modules()})


def is_sharded(model: nn.Module) -> bool:
    """Whether any part of `model` was sharded by `fully_shard`."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in model.modules())


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Inside, every rank holds all parameters of a sharded model, as plain tensors in their own precision.

    Any part of the model may be called, on any rank or on none: evaluators share rows and may differ in their number
    of batches. Costs the memory of the unsharded parameters. To be entered on every rank; a model that is not sharded
    is left as it is.
    """
    hooks, parameters = _take_apart(model)
    try:
        yield
    finally:
        for part, name, value in parameters:
            part._parameters[name] = value
        for kept, found in hooks:
            if set(kept) <= set(found):
                kept.clear()  # so that hooks are in their old order
            kept.update(found)


def make_whole(model: nn.Module) -> nn.Module:
    """Undoes the sharding of a trained model in place: plain parameters on every rank, no hooks, its own class again.

    To be called on every rank: the parameters are gathered. An optimizer over the model is of no use afterwards.
    """
    from torch.distributed.fsdp import FSDPModule

    _take_apart(model)
    for part in model.modules():
        for mark in [name for name in part.__dict__ if name in _MARKS or name.startswith("__composable_api")]:
            del part.__dict__[mark]
        if isinstance(part, FSDPModule):
            classes = type(part).__mro__
            part.__class__ = classes[classes.index(FSDPModule) + 1]
    return model


def _take_apart(model: nn.Module) -> tuple[list[tuple[dict, dict]], list[tuple[nn.Module, str, nn.Parameter]]]:
    """Takes FSDP's hooks off and puts gathered parameters in; returns what was there, to be put back."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    hooks: list[tuple[dict, dict]] = []
    parameters: list[tuple[nn.Module, str, nn.Parameter]] = []
    gathered: dict[int, nn.Parameter] = {}
    for part in model.modules():
        for name, value in part._parameters.items():
            if isinstance(value, DTensor):
                if id(value) not in gathered:  # tied parameters stay tied
                    gathered[id(value)] = nn.Parameter(value.detach().full_tensor(), value.requires_grad)
                parameters.append((part, name, value))
        for kind in _HOOKS:
            found = getattr(part, kind)
            if any(_is_of_fsdp(hook) for hook in found.values()):
                hooks.append((found, dict(found)))
                for key in [key for key, hook in found.items() if _is_of_fsdp(hook)]:
                    del found[key]
        # `generate` and the like, which register_fsdp_forward_method wrapped
        methods = {name for name, value in vars(part).items() if isinstance(value, MethodType) and _is_of_fsdp(value)}
        if methods:
            hooks.append((part.__dict__, {name: part.__dict__.pop(name) for name in methods}))
    for part, name, value in parameters:
        part._parameters[name] = gathered[id(value)]
    return hooks, parameters


def _is_of_fsdp(function: Any) -> bool:
    """Whether a hook or method was defined in torch's FSDP, under whatever wrappers."""
    while function is not None:
        plain = getattr(function, "__func__", function)
        if getattr(plain, "__globals__", {}).get("__name__", "").startswith("torch.distributed.fsdp"):
            return True
        if isinstance(function, functools.partial):
            function = function.func
        elif type(function).__name__ == "_WrappedHook":
            function = function.hook
        else:
            function = getattr(plain, "__wrapped__", None)
    return False


@torch.no_grad()
def _average_gradient(value: Tensor) -> None:
    import torch.distributed as dist

    if value.grad is not None:
        dist.all_reduce(value.grad)
        value.grad /= dist.get_world_size()
