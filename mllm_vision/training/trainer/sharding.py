"""FSDP2 through the Trainer, by public calls of torch and accelerate.

accelerate shards each transformer layer with `fully_shard`, and the rest as one more unit. A copy of the model is
sharded, over the same parameters; the model itself stays plain. Its parameters are on the meta device while the copy
trains, and are gathered for evaluators, which call parts of a model, and at the end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def copy_to_shard(model: nn.Module) -> nn.Module:
    """A copy of a model over the model's own parameters."""
    return copy.deepcopy(model, {id(value): value for value in model.parameters()})


def release(model: nn.Module) -> None:
    """Move the parameters to the meta device, to free their memory."""
    _exchange(model, lambda name, value: torch.empty_like(value, device="meta"))


def gather(model: nn.Module, sharded: nn.Module, device: torch.device) -> None:
    """Copy parameters and buffers of a sharded copy into the plain model, on every rank; tied parameters stay tied.

    Args:
        model: plain.
        sharded: its copy; the call is a collective.
        device: of the plain model.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: Any = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    _exchange(model, lambda name, value: state[name].detach().to(device))
    model.to(device).load_state_dict(state)


@contextmanager
def gathered(model: nn.Module, sharded: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the plain model has the parameters of its sharded copy."""
    gather(model, sharded, device)
    try:
        yield
    finally:
        release(model)


def _exchange(model: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    made = {
        id(value): nn.Parameter(make(name, value), requires_grad=value.requires_grad)
        for name, value in model.named_parameters()
    }
    for part in model.modules():
        for name, value in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(part, name, made[id(value)])


def prepare_sharding(accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Before accelerate shards `model`: set layers and precision, and leave scalars whole.

    `fully_shard` does not accept scalars (a logit scale). They stay on every rank with averaged gradients, in separate
    parameter groups: a fused optimizer does not mix sharded and whole tensors.

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
        # accelerate would sum gradients, and return the loss, in half precision
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
    """Names of the layer classes that the parts of `model` declare as not to be split."""
    declared = {name for part in model.modules() for name in (getattr(part, "_no_split_modules", None) or ())}
    return sorted(declared & {type(part).__name__ for part in model.modules()})


@torch.no_grad()
def _average_gradient(value: Tensor) -> None:
    import torch.distributed as dist

    if value.grad is not None:
        dist.all_reduce(value.grad)
        value.grad /= dist.get_world_size()
