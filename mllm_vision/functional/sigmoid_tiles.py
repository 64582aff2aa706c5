"""The pairwise sigmoid loss tile by tile: the engine under `siglip_loss`.

A pair's gradient needs its own score only, so the forward pass forms value and gradient of each tile at once: three
matrix products in all, the floor, and no second pass. docs/engine.md has the mathematics.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mllm_vision.distributed import all_reduce, world_size
from mllm_vision.functional.products import add_product, product
from mllm_vision.functional.softmax_tiles import LN2, longest_rows, refuse_double_backward, sum_of_products, wide_dtype
from mllm_vision.functional.tiles import Plan


def sigmoid_losses(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, plan: Plan) -> Tensor:
    """Sum over this rank's rows and all columns of softplus(z_ij) - r_ij z_ij, z_ij = scale * <x_i, y_j> + bias.

    That is -r log sigmoid(z) - (1 - r) log sigmoid(-z) with the plan's targets r.

    Args:
        x: `[n, D]` rows of this rank, fp32 or fp64.
        y: `[m, D]` columns of this rank.
        scale: 0-d tensor.
        bias: 0-d tensor.
        plan: how the columns come by, tiles, targets.

    Returns:
        This rank's share of the sum; its gradients follow `sum_over_ranks`, as those of `softmax_losses` do.

    Raises:
        RuntimeError: on differentiating twice.
    """
    return _SigmoidLosses.apply(x, y, scale, bias, plan, torch.is_grad_enabled())


# Nats up to which exponentials are taken as they are, with room to spare in fp32
BOUND = 80.0


def _softplus_then_sigmoid(tile: Tensor, other: Tensor, bound: float) -> Tensor:
    """Sum of softplus over the tile, whose entries become their sigmoid; `other` is overwritten.

    Scores up to `bound` nats come in base 2 where `bound` is at most `BOUND`, else in nats.
    """
    if not bound <= BOUND:
        # a threshold at which the linear part is exact to fp64; the default of 20 is not
        torch.ops.aten.softplus.out(tile, 1, BOUND, out=other)
        total = other.sum()
        tile.sigmoid_()
        return total
    torch.exp2(tile, out=tile)
    # log(1 + u) + log(1 + v) = log(1 + (u + v + u v)): rows are folded upon one another while nothing can overflow,
    # which costs less than the logarithms it saves and keeps what 1 + u would round away
    folded, room = tile, bound
    while len(folded) % 2 == 0 and len(folded) > len(tile) // 4 and 2 * room <= BOUND:
        half = len(folded) // 2
        upper, lower, target = folded[:half], folded[half:], other[:half]
        torch.addcmul(upper, upper, lower, out=target)
        folded, room = target.add_(lower), 2 * room
    total = torch.log1p(folded, out=other[: len(folded)]).sum()
    torch.add(tile, 1, out=other)
    tile /= other
    return total


def _bound(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, plan: Plan) -> float:
    """What no score exceeds: up to `BOUND` 2^score cannot overflow, and one exponential gives softplus and sigmoid.

    Infinite anywhere but on a CPU, where asking would stall the device's queue: the other form is right for all.
    """
    if x.device.type != "cpu":
        return math.inf
    longest = longest_rows(x, y, plan)
    first, second, t, b = torch.cat([longest, scale[None], bias[None]]).tolist()
    return abs(t) * first * second * (1 + 1e-5) + b


class _SigmoidLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, plan: Plan, recorded: bool) -> Tensor:
        x, y = x.detach(), y.detach()
        need_x, need_y, need_scale, need_bias = (recorded and needed for needed in ctx.needs_input_grad[:4])
        t, b = scale.detach(), bias.detach()
        bound = _bound(x, y, t, b, plan)
        bounded = bound <= BOUND
        unit = 1 / LN2 if bounded else 1.0  # a nat, in the unit of the tiles' scores
        grid = plan.grid
        tall, wide = grid.rows[0].stop, grid.widest
        scores, spare, scratch = x.new_empty(tall * wide), x.new_empty(tall * wide), x.new_empty(tall, x.shape[1])
        for_x = torch.zeros_like(x) if need_x or need_scale else None
        total = torch.zeros((), dtype=wide_dtype(x), device=x.device)
        for_scale, for_bias = torch.zeros_like(total), torch.zeros_like(total)
        visit = plan.columns.visit(plan.columns.hold(y), gradient=need_y)
        for start, block, for_block in visit:
            for r, down in enumerate(grid.rows):
                scaled = torch.mul(x[down], t * unit, out=scratch[: down.stop - down.start])
                for c, across in grid.of_block(start, len(block)):
                    local = slice(across.start - start, across.stop - start)
                    shape = (down.stop - down.start, across.stop - across.start)
                    tile, other = (part[: shape[0] * shape[1]].view(shape) for part in (scores, spare))
                    tile = product(scaled, block[local].T, tile)
                    tile += b * unit
                    if plan.targets is not None:
                        total -= plan.targets.total(tile, r, c) / unit
                    total += _softplus_then_sigmoid(tile, other, bound)
                    if plan.targets is not None:
                        plan.targets.subtract(tile, r, c)
                    if need_bias:
                        for_bias += tile.sum()
                    if for_x is not None:
                        add_product(for_x[down], tile, block[local])
                    if for_block is not None:
                        add_product(for_block[local], tile.T, scaled)
        if need_scale and for_x is not None:
            for_scale = sum_of_products(x, for_x, grid, scratch)
        if need_scale or need_bias:
            shared = all_reduce(torch.stack([for_scale, for_bias]), plan.group) / world_size(plan.group)
            for_scale, for_bias = shared.to(x.dtype).unbind()
        if visit.gradient is not None and bounded:
            visit.gradient *= LN2
        ctx.wanted = need_x, need_y, need_scale, need_bias
        ctx.save_for_backward(
            for_x.mul_(t) if need_x and for_x is not None else None, visit.gradient, for_scale, for_bias
        )
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        found = [
            None if gradient is None or not wanted else gradient * upstream
            for gradient, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
        ]
        return (*found, None, None)
