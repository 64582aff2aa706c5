"""The pairwise sigmoid loss tile by tile: the engine under `siglip_loss`.

A pair's gradient depends only on its own score, so the forward pass computes value and gradient of each tile at once,
with three matrix products, the minimum. docs/engine.md has the mathematics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllm_vision.distributed import all_reduce, world_size
from mllm_vision.functional.engine.plan import Plan
from mllm_vision.functional.engine.softmax import refuse_double_backward, sum_of_products
from mllm_vision.functional.engine.workers import for_each_tile
from mllm_vision.functional.precision import wide_dtype


def sigmoid_losses(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, plan: Plan) -> Tensor:
    """Sum over this rank's rows and all columns of softplus(z_ij) - r_ij z_ij, z_ij = scale * <x_i, y_j> + bias.

    That is -r log sigmoid(z) - (1 - r) log sigmoid(-z) with the plan's targets r. Arguments as in `softmax_losses`,
    `bias` a 0-d tensor.

    Returns:
        This rank's share of the sum; its gradients follow `sum_over_ranks`.

    Raises:
        RuntimeError: a second derivative is requested.
    """
    return _SigmoidLosses.apply(x, y, scale, bias, plan, torch.is_grad_enabled())


LINEAR_FROM = 80.0  # nats from which softplus is linear in fp64; torch's default is 20


class _SigmoidLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, plan: Plan, recorded: bool) -> Tensor:
        x, y = x.detach(), y.detach()
        need_x, need_y, need_scale, need_bias = (recorded and needed for needed in ctx.needs_input_grad[:4])
        t, b, grid, targets = scale.detach(), bias.detach(), plan.grid, plan.targets
        for_x = torch.zeros_like(x) if need_x or need_scale else None
        blocks = plan.columns.iterate(plan.columns.hold(y), gradient=need_y)

        def add(
            tile: Tensor, other: Tensor, r: int, c: int, scaled: Tensor, block: Tensor, for_block: Tensor | None
        ) -> tuple[Tensor | float, Tensor, Tensor | float]:
            tile += b
            positive = 0.0 if targets is None else targets.total(tile, r, c)
            value = torch.ops.aten.softplus.out(tile, 1, LINEAR_FROM, out=other).sum()
            tile.sigmoid_()
            if targets is not None:
                targets.subtract(tile, r, c)
            gradient = tile.sum() if need_bias else 0.0
            if for_x is not None:
                for_x[grid.rows[r]].addmm_(tile, block)
            if for_block is not None:
                for_block.addmm_(tile.T, scaled)
            return positive, value, gradient

        total = torch.zeros((), dtype=wide_dtype(x), device=x.device)
        for_scale, for_bias = torch.zeros_like(total), torch.zeros_like(total)
        for positive, value, gradient in for_each_tile(x, t, blocks, grid, add):
            total -= positive
            total += value
            for_bias += gradient
        if need_scale and for_x is not None:
            for_scale = sum_of_products(x, for_x, grid)
        if need_scale or need_bias:
            shared = all_reduce(torch.stack([for_scale, for_bias]), plan.group) / world_size(plan.group)
            for_scale, for_bias = shared.to(x.dtype).unbind()
        ctx.wanted = need_x, need_y, need_scale, need_bias
        ctx.save_for_backward(
            for_x.mul_(t) if need_x and for_x is not None else None, blocks.gradient, for_scale, for_bias
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
