"""Collectives with gradient, and the identity in a single process.

``group=None`` is the default process group when initialised, else this process alone, so the same code runs with and
without ``torchrun``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether a default process group is initialised."""
    return dist.is_available() and dist.is_initialized()


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks in `group` (1 without a process group)."""
    return dist.get_world_size(group) if is_distributed() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's rank in `group` (0 without a process group)."""
    return dist.get_rank(group) if is_distributed() else 0


def own_device(name: str | None = None) -> torch.device:
    """The device of this process, set as the current one; by default the device of its LOCAL_RANK.

    Args:
        name: "cpu", "cuda", "cuda:1", ...; None is the accelerator if available, else the CPU.

    Raises:
        ValueError: a device that this machine or this build of torch does not have.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        device = torch.device(name) if name is not None else found or torch.device("cpu")
    except RuntimeError:
        raise ValueError(f"--device {name!r} is not a device: use cpu, cuda or cuda:1, or leave it out") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if found is None or device.type != found.type:
        has = "none" if found is None else found.type
        raise ValueError(f"no {device.type} device is available (accelerator: {has}); use cpu, or leave --device out")
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if index >= torch.accelerator.device_count():
        raise ValueError(
            f"{device.type}:{index} of {torch.accelerator.device_count()} devices; start one process per device"
        )
    torch.accelerator.set_device_index(index)
    return torch.device(device.type, index)


def communication_device() -> torch.device:
    """The device of tensors in the default group's collectives: the accelerator for NCCL, the CPU for gloo."""
    if not is_distributed() or dist.get_backend() == "gloo" or not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return torch.device(kind.type, torch.accelerator.current_device_index())


def _collective(name: str, before: str) -> Any:
    """A collective by its name since torch 2.13, or by the name `before`, which is deprecated there."""
    return getattr(dist, name, None) or getattr(dist, before)


class _GatherRows(torch.autograd.Function):
    """All-gather in the forward pass, reduce-scatter (sum) of the gradients in the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _gather_padded(rows, sizes, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(gradient, ctx.sizes, ctx.group), None, None


def _gather_padded(rows: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    width = max(sizes)
    if len(rows) < width:
        rows = torch.cat([rows, rows.new_zeros((width - len(rows), *rows.shape[1:]))])
    gathered = rows.new_empty((len(sizes) * width, *rows.shape[1:]))
    _collective("all_gather_single", "all_gather_into_tensor")(gathered, rows.contiguous(), group=group)
    if len(set(sizes)) == 1:
        return gathered
    parts = gathered.unflatten(0, (len(sizes), width))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatter(rows: Tensor, sizes: list[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """Sums over ranks; each rank receives the rows that it owns. Without gradient.

    Args:
        rows: `[sum of sizes, ...]`, in rank order.
        sizes: rows of every rank, as `row_counts` returns them.

    Returns:
        `[own size, ...]`.
    """
    if world_size(group) == 1:
        return rows
    width = max(sizes)
    if len(set(sizes)) > 1:
        padded = rows.new_zeros((len(sizes), width, *rows.shape[1:]))
        for index, part in enumerate(rows.split(sizes)):
            padded[index, : len(part)] = part
        rows = padded.flatten(0, 1)
    local = rows.new_empty((width, *rows.shape[1:]))
    scatter = _collective("reduce_scatter_single", "reduce_scatter_tensor")
    scatter(local, rows.contiguous(), op=dist.ReduceOp.SUM, group=group)
    return local[: sizes[rank(group)]]


_host_groups: dict[Any, dist.ProcessGroup] = {}


def _host_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The same ranks over gloo, created on first use by all of them."""
    known = dist.group.WORLD if group is None else group
    if known not in _host_groups:
        ranks = None if group is None else dist.get_process_group_ranks(group)
        _host_groups[known] = dist.new_group(ranks, backend="gloo", use_local_synchronization=ranks is not None)
    return _host_groups[known]


def row_counts(rows: Tensor, group: dist.ProcessGroup | None = None) -> list[int]:
    """Number of rows of every rank, in rank order; exchanged over gloo, so that no accelerator's queue is stalled."""
    if world_size(group) == 1:
        return [rows.shape[0]]
    local = torch.tensor([rows.shape[0]])
    counts = local.new_empty(world_size(group))
    if dist.get_backend(group) != "gloo":
        group = _host_group(group)
    _collective("all_gather_single", "all_gather_into_tensor")(counts, local, group=group)
    return counts.tolist()


def total_over_ranks(values: Sequence[float]) -> list[float]:
    """Sums of host numbers over ranks, in double where the device supports it; the same on every rank.

    For counts: a float32 sum of tokens stops growing at 16 million.
    """
    if world_size() == 1:
        return [float(value) for value in values]
    device = communication_device()
    kind = torch.float32 if device.type == "mps" else torch.float64
    return all_reduce(torch.tensor(values, dtype=kind, device=device)).tolist()


def agree_on_error(error: Exception | None) -> None:
    """Raises on every rank if any rank failed, so that no rank waits forever. Call it before the next collective.

    Raises:
        Exception: `error` on the ranks that failed.
        ValueError: on the others, with the ranks and their causes.
    """
    if world_size() == 1:
        if error is not None:
            raise error
        return
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, None if error is None else f"{type(error).__name__}: {error}"[:300])
    if error is not None:
        raise error
    messages = [f"rank {place}: {text}" for place, text in enumerate(parts) if text]
    if messages:
        raise ValueError("another rank failed; " + "; ".join(messages))


def all_gather(rows: Tensor, group: dist.ProcessGroup | None = None, sizes: list[int] | None = None) -> Tensor:
    """Concatenates the rows of all ranks, without gradient.

    Args:
        rows: `[n, ...]`; ranks may hold different `n`.
        sizes: the result of `row_counts`, if known.

    Returns:
        `[sum of n, ...]` in rank order, equal on every rank.
    """
    if world_size(group) == 1:
        return rows.detach()
    return _gather_padded(rows.detach(), sizes or row_counts(rows, group), group)


def all_gather_with_grad(
    rows: Tensor, group: dist.ProcessGroup | None = None, sizes: list[int] | None = None
) -> Tensor:
    """Concatenates the rows of all ranks; gradients flow back to the rank that owns a row.

    When every rank computes the same loss L of the gathered rows, each rank receives
    `world_size * dL/d(own rows)`: DistributedDataParallel's mean over ranks is then exactly the gradient of one
    process with the whole batch. A parameter used after the gather (a logit scale) already has the whole gradient on
    every rank.

    Args:
        rows: `[n, ...]`; ranks may hold different `n`.
        sizes: the result of `row_counts`, if known.

    Returns:
        `[sum of n, ...]` in rank order, equal on every rank.
    """
    if world_size(group) == 1:
        return rows
    return _GatherRows.apply(rows, sizes or row_counts(rows, group), group)


def mean_over_ranks(values: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Averages scalar tensors over ranks in one collective; every rank passes the same keys.

    Returns:
        The same keys with detached float32 scalars, equal on every rank.
    """
    detached = {key: value.detach().float().reshape(()) for key, value in values.items()}
    if world_size(group) == 1 or not detached:
        return detached
    keys = sorted(detached)
    stacked = torch.stack([detached[key] for key in keys])
    dist.all_reduce(stacked, group=group)
    return dict(zip(keys, (stacked / world_size(group)).unbind(), strict=True))


def all_reduce(value: Tensor, group: dist.ProcessGroup | None = None, op: str = "sum") -> Tensor:
    """Sum (or maximum, `op="max"`) of `value` over ranks, in place and without gradient."""
    if world_size(group) > 1:
        dist.all_reduce(value, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=group)
    return value


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return all_reduce(value.clone(), group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce(gradient.clone(), ctx.group), None


def sum_over_ranks(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over ranks, with gradient; the same on every rank.

    When every rank computes the same loss L of the sum, each rank's `value` receives `world_size * dL/d(value)`,
    as the rows of `all_gather_with_grad` do.
    """
    return value if world_size(group) == 1 else _SumOverRanks.apply(value, group)


def mean_over_rows(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Mean of `[n]` values over the rows of all ranks, which may hold different n; with gradient."""
    total = sum_over_ranks(torch.stack([values.sum(), values.new_tensor(float(len(values)))]), group)
    return total[0] / total[1].detach()


class _MeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce(gradient.clone(), ctx.group) / world_size(ctx.group), None


def mean_gradient(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The identity, whose gradient is averaged over ranks immediately instead of by DDP."""
    return value if world_size(group) == 1 or not value.requires_grad else _MeanGradient.apply(value, group)


class Columns:
    """Iterates over all rows of a matrix that is split over the ranks.

    `hold(local)` is what a rank keeps of it. `iterate(held)` yields blocks with the number of their first row and,
    with `gradient=True`, a buffer of zeros per block, to which the rank adds its part of the block's gradient.
    Afterwards the iterable's `gradient` is the sum over all ranks for the rows that this rank owns.

    Args:
        sizes: rows of every rank.
        group: process group.
        exchange: `"gather"`: every rank holds all rows; one collective forward, one reduce-scatter for the gradient.
            `"ring"`: blocks and the sums of their gradients are passed from rank to rank, overlapped with computation;
            no rank holds more than a few blocks. `"shared"`: every rank already has the same rows; the gradient is
            the mean over ranks.

    Raises:
        ValueError: an unknown exchange.
    """

    KINDS = ("gather", "ring")

    def __init__(self, sizes: list[int], group: dist.ProcessGroup | None = None, exchange: str = "gather") -> None:
        if exchange not in (*self.KINDS, "shared"):
            raise ValueError(f"exchange={exchange!r} must be one of {', '.join(map(repr, self.KINDS))}")
        self.sizes, self.group, self.exchange = sizes, group, exchange
        if exchange == "shared":
            self.blocks = [(0, sizes[0])]
        elif exchange == "gather" or len(sizes) == 1:
            self.blocks = [(0, sum(sizes))]
        else:  # in rank order; a rank starts with its own
            starts = [sum(sizes[:index]) for index in range(len(sizes))]
            self.blocks = [(start, start + size) for start, size in zip(starts, sizes, strict=True)]

    def hold(self, local: Tensor) -> Tensor:
        """The rows that this rank keeps between the passes: all, or its own."""
        return all_gather(local, self.group, self.sizes) if self.exchange == "gather" else local.detach()

    def iterate(self, held: Tensor, *, gradient: bool = False) -> ColumnBlocks:
        """One pass over the blocks of what `hold` returned."""
        return ColumnBlocks(self, held, gradient)


class ColumnBlocks:
    """One pass over `Columns`: iterate once, then read `gradient` (`None` unless requested)."""

    def __init__(self, columns: Columns, held: Tensor, with_gradient: bool) -> None:
        self._columns, self._held, self._with_gradient = columns, held, with_gradient
        self.gradient: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        columns, held = self._columns, self._held
        if columns.exchange == "ring" and len(columns.sizes) > 1:
            yield from self._ring()
            return
        buffer = torch.zeros_like(held) if self._with_gradient else None
        yield 0, held, buffer
        if buffer is None:
            return
        if columns.exchange == "gather":
            self.gradient = reduce_scatter(buffer, columns.sizes, columns.group)
        else:
            self.gradient = all_reduce(buffer, columns.group) / world_size(columns.group)

    def _ring(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        columns, block = self._columns, self._held.contiguous()
        group, sizes = columns.group, columns.sizes
        me, world = rank(group), len(sizes)
        travelling = None  # the previous ranks' part of the current block's gradient
        for step in range(world):
            source = (me - step) % world
            following = sizes[(me - step - 1) % world]
            arriving = None
            if step + 1 < world:
                arriving = _Transfer(block, following, group)  # while this rank computes
            buffer = torch.zeros_like(block) if self._with_gradient else None
            yield columns.blocks[source][0], block, buffer
            if buffer is not None:
                if travelling is not None:
                    buffer += travelling.wait()
                travelling = _Transfer(buffer, following, group)
            if arriving is not None:
                block = arriving.wait()
        if travelling is not None:  # the last transfer returns this rank's own block
            self.gradient = travelling.wait()


class _Transfer:
    """Sends rows to the next rank of the ring while those of the previous one arrive."""

    def __init__(self, rows: Tensor, arriving: int, group: dist.ProcessGroup | None) -> None:
        me, world = rank(group), world_size(group)
        names = [(me + 1) % world, (me - 1) % world]
        if group is not None:
            names = [dist.get_global_rank(group, name) for name in names]
        self._sent = rows  # kept until it has left
        self._arrived = rows.new_empty((arriving, *rows.shape[1:]))
        self._work = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, names[0], group),
                dist.P2POp(dist.irecv, self._arrived, names[1], group),
            ]
        )

    def wait(self) -> Tensor:
        """The rows of the previous rank."""
        for work in self._work:
            work.wait()
        return self._arrived
