"""Collectives that keep the gradient, and the identity where there is only one process.

Everything here takes ``group=None`` to mean the default process group when one is initialised, and
one process otherwise, so the same code runs alone and under ``torchrun``.
"""

from __future__ import annotations

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


class _GatherRows(torch.autograd.Function):
    """All-gather in the forward pass, reduce-scatter (sum) of the gradients in the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.sizes, ctx.group, ctx.local = sizes, group, rows.shape[0]
        return _gather_padded(rows, sizes, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        sizes, width = ctx.sizes, max(ctx.sizes)
        if len(set(sizes)) > 1:
            padded = gradient.new_zeros((len(sizes), width, *gradient.shape[1:]))
            for index, part in enumerate(gradient.split(sizes)):
                padded[index, : len(part)] = part
            gradient = padded.flatten(0, 1)
        local = gradient.new_empty((width, *gradient.shape[1:]))
        dist.reduce_scatter_tensor(local, gradient.contiguous(), op=dist.ReduceOp.SUM, group=ctx.group)
        return local[: ctx.local], None, None


def _gather_padded(rows: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    width = max(sizes)
    if len(rows) < width:
        rows = torch.cat([rows, rows.new_zeros((width - len(rows), *rows.shape[1:]))])
    gathered = rows.new_empty((len(sizes) * width, *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
    if len(set(sizes)) == 1:
        return gathered
    parts = gathered.unflatten(0, (len(sizes), width))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def row_counts(rows: Tensor, group: dist.ProcessGroup | None = None) -> list[int]:
    """Number of rows every rank holds, in rank order."""
    if world_size(group) == 1:
        return [rows.shape[0]]
    local = torch.tensor([rows.shape[0]], device=rows.device)
    counts = local.new_empty(world_size(group))
    dist.all_gather_into_tensor(counts, local, group=group)
    return counts.tolist()


def all_gather(rows: Tensor, group: dist.ProcessGroup | None = None, sizes: list[int] | None = None) -> Tensor:
    """Concatenates the rows of all ranks, without gradient.

    Args:
        rows: `[n, ...]`; ranks may hold different `n`, the other dimensions agree.
        sizes: what `row_counts` returned, to save asking again.

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
    `world_size * dL/d(own rows)`: DistributedDataParallel's mean over the ranks then yields exactly the
    gradient of one process with the whole batch, and a parameter used after the gather (a logit scale)
    has the whole gradient on every rank already.

    Args:
        rows: `[n, ...]`; ranks may hold different `n`, the other dimensions agree.
        sizes: what `row_counts` returned, to save asking again.

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
