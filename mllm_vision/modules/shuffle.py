"""Shuffled BatchNorm: rows are permuted into groups, each normalised by its own statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mllm_vision.distributed import all_gather, rank, row_counts


def in_groups(function: Callable[[Tensor], Tensor], rows: Tensor, groups: int = 1, norms: Sequence[Any] = ()) -> Tensor:
    """`function` of the rows in their order, in so many calls: a BatchNorm inside sees one group at a time.

    Args:
        function: `[n, ...]` to `[n, ...]`.
        rows: `[N, ...]`.
        groups: how many; their sizes differ by one at most.
        norms: BatchNorms inside `function`. Their running statistics move once for all groups, by the mean of what the
            groups have, as those of the `SplitBatchNorm` in MoCo's notebook; not once for each.

    Raises:
        ValueError: groups of fewer than two rows, which have no variance.
    """
    if groups < 1 or (groups > 1 and len(rows) < 2 * groups):
        raise ValueError(
            f"batch_norm_groups={groups} of {len(rows)} rows: each group needs two rows or more to be normalised by "
            f"its own statistics; use {max(1, len(rows) // 2)} or less"
        )
    if groups == 1:
        return function(rows)
    moving = [(norm, norm.momentum) for norm in norms if norm.training and norm.momentum is not None]
    outputs = []
    try:
        for number, part in enumerate(rows.tensor_split(groups)):
            for norm, momentum in moving:  # so that in the end each group has moved them by momentum / groups
                norm.momentum = momentum / (groups - (groups - 1 - number) * momentum)
            outputs.append(function(part))
    finally:
        for norm, momentum in moving:
            norm.momentum = momentum
    for norm, _ in moving:
        norm.num_batches_tracked -= groups - 1
    return torch.cat(outputs)


def shuffled(
    function: Callable[[Tensor], Tensor],
    rows: Tensor,
    keys: Tensor,
    *,
    groups: int = 1,
    norms: Sequence[Any] = (),
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`function` of the rows without gradient, permuted over ranks and groups; returned in the original order.

    A key encoder with BatchNorm then sees each image in other company than the query encoder did, so that the
    statistics of a group do not give away which key belongs to which query.

    Args:
        function: `[n, ...]` to `[n, D]`.
        rows: `[N, ...]` of this rank; ranks may hold different N, and each gets as many back.
        keys: `[N]` numbers drawn for each row; the rows are sorted by them, with the same order on every rank.
        groups: how many groups each rank makes of what it was dealt: one rank with eight is eight with one.
        norms: as in `in_groups`.
        group: process group; `None` is the default group when initialised, else this process alone.

    Returns:
        `[N, D]`, row i of `rows[i]`.

    Raises:
        ValueError: groups of fewer than two rows.

    Reference:
        He et al., 2020, "Momentum Contrast for Unsupervised Visual Representation Learning", section 3.3
        (https://arxiv.org/abs/1911.05722).

    Example:
        >>> rows = torch.arange(6.0)[:, None]
        >>> shuffled(lambda group: group - group.mean(0), rows, torch.tensor([0, 2, 1, 3, 5, 4]), groups=3).flatten()
        tensor([-1.0000, -1.0000,  1.0000,  1.0000, -0.5000,  0.5000])
    """
    with torch.no_grad():
        sizes = row_counts(rows, group)
        order = all_gather(keys, group, sizes).argsort(stable=True)
        start = sum(sizes[: rank(group)])
        own = slice(start, start + len(rows))
        dealt = all_gather(rows, group, sizes)[order[own]]
        outputs = all_gather(in_groups(function, dealt, groups, norms), group, sizes)
        return outputs[order.argsort()[own]]
