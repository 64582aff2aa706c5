"""Collectives that look at what they are given: tensors of the model's device, and no objects with images or vectors.

NCCL refuses a tensor of the CPU, and an object is pickled through it: 256 rows of features became 134 MB that way. Here
the ranks really talk, over gloo, with the values of the stand-in's tensors; a group that was asked for by the name of
gloo belongs to the hosts and takes the CPU's tensors alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from stand_in import OnDevice

_host_groups: set[Any] = set()
CALLS: dict[str, int] = {}


def record() -> None:
    """Replaces torch's collectives for this process, after its default group was made."""
    for name in (
        "all_reduce", "broadcast", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor",
        "reduce_scatter_single", "all_gather", "isend", "irecv",
    ):  # fmt: skip
        if hasattr(dist, name):
            setattr(dist, name, _checked(name, getattr(dist, name)))
    for name in ("all_gather_object", "broadcast_object_list", "gather_object"):
        setattr(dist, name, _of_objects(name, getattr(dist, name)))
    plain_group, plain_op = dist.new_group, dist.P2POp

    def new_group(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        group = plain_group(*args, backend=backend, **kwargs)
        if backend == "gloo":
            _host_groups.add(group)
        return group

    def op(function: Any, tensor: Any, peer: int, group: Any = None) -> Any:
        _check("a send or receive", [tensor], group)
        return plain_op(getattr(function, "__wrapped__", function), tensor.raw, peer, group)

    dist.new_group, dist.P2POp = new_group, op
    dist.get_backend = lambda group=None: "gloo" if group in _host_groups else "standin"


def _check(name: str, tensors: list[Any], group: Any) -> None:
    CALLS[name] = CALLS.get(name, 0) + 1
    for tensor in tensors:
        if isinstance(tensor, OnDevice) == (group in _host_groups):
            where = "the hosts'" if group in _host_groups else "the devices'"
            raise RuntimeError(f"{name} in {where} group got a tensor {list(tensor.shape)} on {tensor.device}")


def _checked(name: str, plain: Any) -> Any:
    def run(*args: Any, group: Any = None, **kwargs: Any) -> Any:
        given = [part for part in args if isinstance(part, torch.Tensor)]
        _check(name, given, group)
        bare = [part.raw if isinstance(part, OnDevice) else part for part in args]
        return plain(*bare, group=group, **kwargs)

    run.__wrapped__ = plain  # type: ignore[attr-defined]
    return run


def _of_objects(name: str, plain: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        for part in args:
            _refuse_values(name, part)
        return plain(*args, **kwargs)

    return run


def _refuse_values(name: str, value: Any) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            _refuse_values(name, part)
    elif not isinstance(value, (str, int, float, bool, type(None))) and not hasattr(value, "__dataclass_fields__"):
        raise RuntimeError(f"{name} pickles a {type(value).__name__}; gather its tensors instead")
