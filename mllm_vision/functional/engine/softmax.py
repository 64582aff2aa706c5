"""Softmax cross-entropy over all pairs, tile by tile: the engine under `clip_loss`, `nt_xent` and `info_nce`.

The forward pass computes every score once and keeps one sum per row and column; the backward pass recomputes the
scores and turns each tile into its gradient: four matrix products, where keeping the scores would need three and the
memory of every pair. docs/engine.md has the mathematics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm_vision.distributed import all_gather, all_reduce, world_size
from mllm_vision.functional.engine.plan import Plan
from mllm_vision.functional.engine.targets import TargetSums
from mllm_vision.functional.engine.tiles import Grid
from mllm_vision.functional.engine.workers import for_each_tile
from mllm_vision.functional.precision import full_fp32, wide_dtype

LN2 = math.log(2.0)
# Largest score in base 2 for which sums of 2^score and their reciprocals are exact: fp32 ranges from 2^-126 to 2^128,
# less a margin for a million terms above and for terms 2^-40 times the largest below.
HIGHEST = {torch.float32: 86.0, torch.float64: 950.0}


def softmax_losses(x: Tensor, y: Tensor, scale: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every row, and of every column, of scores z_ij = scale * <x_i, y_j>.

    For row i with positives q_ij (the plan's targets divided by their sum over the row) that is
    log sum_j exp(z_ij) - sum_j q_ij z_ij; without targets it is the log-sum-exp. Columns likewise, with targets
    divided by their sums over the column.

    Args:
        x: `[n, D]` rows of this rank, fp32 or fp64.
        y: `[m, D]` columns of this rank (all columns, if the plan's exchange is "shared").
        scale: 0-d tensor.
        plan: columns, tiles and targets.

    Returns:
        `[n]` and `[m]` losses of this rank's rows and columns; the latter empty unless `plan.by_column`. Gradients
        follow `sum_over_ranks`; the scale's is that of the whole batch on every rank.

    Raises:
        ValueError: targets that leave a row or a column without any positive.
        RuntimeError: a second derivative is requested.
    """
    return _SoftmaxLosses.apply(x, y, scale, plan)


@dataclass
class _Scores:
    """How scores become summable.

    Bounded: 2^score, one exponential for both directions. Otherwise: natural exponentials of differences to each row's
    and each column's log-sum-exp, accurate for any scores.
    """

    scale: Tensor
    bounded: bool

    @property
    def unit(self) -> float:
        """A nat in the unit of the scores."""
        return 1 / LN2 if self.bounded else 1.0

    @property
    def factor(self) -> Tensor:
        """Factor of the inner products."""
        return self.scale * self.unit


class _SoftmaxLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        x, y = x.detach(), y.detach()
        held = plan.columns.hold(y)
        # Computing a bound on the device would stall its queue; the unbounded form costs little more.
        known = plan.bound is not None and plan.bound / LN2 <= HIGHEST[x.dtype]
        scores = _Scores(scale.detach(), known)
        both = plan.by_column and plan.mirror is None
        row, column, sums = _sums(x, held, scores, plan, both)
        if plan.mirror is not None:
            column = all_gather(row.roll(plan.mirror), plan.group, plan.sizes)
        ctx.plan, ctx.scores = plan, scores
        checked = plan.targets is not None
        weights = (sums.row_weight, sums.column_weight) if checked else (None, None)
        ctx.save_for_backward(x, held, row, column, *weights)
        log = torch.log2 if scores.bounded else (lambda value: value)
        by_row = log(row)
        by_column = log(column) if both and column is not None else x.new_empty(0)
        own = slice(plan.offset, (plan.offset or 0) + len(y))
        if both:
            by_column = by_column[own]
        if checked:
            by_row = by_row - sums.row_score / sums.row_weight
            if both and sums.column_score is not None and sums.column_weight is not None:
                by_column = by_column - (sums.column_score / sums.column_weight)[own]
        return by_row / scores.unit, by_column / scores.unit

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        refuse_double_backward()
        with full_fp32(upstream[0].device):
            return *_gradients(ctx, *upstream), None


def refuse_double_backward(subject: str = "the tiled contrastive losses have") -> None:
    """Raises RuntimeError inside a backward pass that is itself recorded."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{subject} no second derivative, because the gradient is computed part by part in the forward pass "
            "and not recorded. Call backward() or autograd.grad() without create_graph=True, or write the loss in "
            "plain torch for a gradient penalty or a Hessian"
        )


def sum_of_products(x: Tensor, y: Tensor, grid: Grid) -> Tensor:
    """Sum of all entries of `x * y`, strip by strip, accumulated in fp64: the gradient of the scale."""
    exact = wide_dtype(x)
    return torch.stack([(x[rows] * y[rows]).sum().to(exact) for rows in grid.rows]).sum()


def _sums(x: Tensor, held: Tensor, scores: _Scores, plan: Plan, both: bool) -> tuple[Tensor, Tensor | None, TargetSums]:
    """Per row and per column: the sum of exponentials (log-sum-exp if not bounded), and the sums of the targets."""
    grid, total = plan.grid, plan.total
    neutral = 0.0 if scores.bounded else -math.inf
    row = x.new_full((len(x),), neutral)
    column = x.new_full((total,), neutral) if both else None
    zeros = [x.new_zeros(total) if both else None for _ in range(2)]
    sums = TargetSums(x.new_zeros(len(x)), x.new_zeros(len(x)), *zeros)

    def add(tile: Tensor, spare: Tensor, r: int, c: int, *_: Any) -> None:
        down, across = grid.rows[r], grid.columns[c]
        if plan.targets is not None:
            plan.targets.add_sums(tile, r, c, sums)
        if scores.bounded:
            torch.exp2(tile, out=tile)
            if plan.excluded is not None:
                plan.excluded.fill(tile, r, c, 0.0)
            row[down] += tile.sum(1)
            if column is not None:
                column[across] += tile.sum(0)
        else:
            if plan.excluded is not None:
                plan.excluded.fill(tile, r, c, -math.inf)
            row[down] = torch.logaddexp(row[down], tile.logsumexp(1))
            if column is not None:
                column[across] = torch.logaddexp(column[across], tile.logsumexp(0))

    for_each_tile(x, scores.factor, plan.columns.iterate(held), grid, add)
    if column is not None and world_size(plan.group) > 1:
        _over_ranks(column, sums, scores, plan)
    if plan.targets is not None and not plan.targets.certain:
        _check_positives(sums)
    return row, column, sums


def _over_ranks(column: Tensor, sums: TargetSums, scores: _Scores, plan: Plan) -> None:
    """Sums the columns' values over ranks, in place."""
    if not scores.bounded:
        highest = all_reduce(column.clone(), plan.group, "max")
        column.sub_(highest).exp_()
    parts = [column, *(part for part in (sums.column_weight, sums.column_score) if part is not None)]
    for part, summed in zip(parts, all_reduce(torch.stack(parts), plan.group), strict=True):
        part.copy_(summed)
    if not scores.bounded:
        column.log_().add_(highest)


def _check_positives(sums: TargetSums) -> None:
    lowest = sums.row_weight.amin()
    if sums.column_weight is not None:
        lowest = torch.minimum(lowest, sums.column_weight.amin())
    if not bool(lowest > 0):
        raise ValueError(
            "the relation matrix has a row or a column without any positive; every image and every text needs one "
            "(include the diagonal)"
        )


def _gradients(ctx: Any, by_row: Tensor, by_column: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    plan, scores = ctx.plan, ctx.scores
    x, held, row, column, row_weight, column_weight = ctx.saved_tensors
    need_x, need_y, need_scale = ctx.needs_input_grad[:3]
    need_y = need_y and plan.mirror is None
    both = plan.by_column and plan.mirror is None
    # factors near one keep the products with the exponentials from underflowing; `peak` is multiplied back at the end
    peak = by_row.abs().amax()
    if both:
        peak = torch.maximum(peak, by_column.abs().amax())
    peak = all_reduce(peak.clone(), plan.group, "max").clamp_min(torch.finfo(x.dtype).tiny)
    by_row = by_row / peak
    across: Tensor | None = None
    if both:
        across = all_gather(by_column / peak, plan.group, plan.sizes)
    elif plan.mirror is not None:
        across = all_gather(by_row.roll(plan.mirror), plan.group, plan.sizes)
    row_factor = by_row / row if scores.bounded else by_row
    column_factor = across if across is None or not scores.bounded else across / column
    target_row = None if row_weight is None else by_row / row_weight
    target_column = across if across is None or column_weight is None else across / column_weight
    grid = plan.grid
    for_x = torch.zeros_like(x) if need_x or need_scale else None
    blocks = plan.columns.iterate(held, gradient=need_y)

    def add(
        tile: Tensor, other: Tensor, r: int, c: int, scaled: Tensor, block: Tensor, for_block: Tensor | None
    ) -> None:
        rows, columns = grid.rows[r], grid.columns[c]
        if scores.bounded:
            torch.exp2(tile, out=tile)
            if column_factor is None:
                tile *= row_factor[rows, None]
            else:
                torch.add(row_factor[rows, None], column_factor[None, columns], out=other)
                tile *= other
        else:
            torch.sub(tile, row[rows, None], out=other).exp_().mul_(row_factor[rows, None])
            if column_factor is None:
                tile = other
            else:
                tile.sub_(column[None, columns]).exp_().mul_(column_factor[None, columns]).add_(other)
        if plan.excluded is not None:
            plan.excluded.fill(tile, r, c, 0.0)
        if plan.targets is not None:
            plan.targets.subtract(tile, r, c, target_row, target_column)
        if for_x is not None:
            for_x[rows].addmm_(tile, block)
        if for_block is not None:
            for_block.addmm_(tile.T, scaled)

    for_each_tile(x, scores.factor, blocks, grid, add)
    for_scale = None
    if need_scale and for_x is not None:
        products = sum_of_products(x, for_x, grid)
        share = 0.5 if plan.mirror is not None else 1.0  # a mirrored gradient counts every pair twice
        for_scale = (all_reduce(products * (peak * share), plan.group) / world_size(plan.group)).to(x.dtype)
    for_y = None if blocks.gradient is None else blocks.gradient.mul_(peak / scores.unit)
    return for_x.mul_(peak * scores.scale) if need_x and for_x is not None else None, for_y, for_scale
