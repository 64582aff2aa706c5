"""Image-text contrast against momentum features and a queue, with soft targets from the momentum towers.

The queries are this rank's rows; the columns are the momentum features of all ranks and the queue. A tile holds
whole rows of the softmax, so its gradient is computed in the forward pass and no N x (N + K) matrix is materialised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mllm_vision.distributed import all_gather, rank, row_counts, world_size
from mllm_vision.functional.checks import check_rows
from mllm_vision.functional.precision import at_least_fp32, full_fp32, full_precision

_TILE_ELEMENTS = 1 << 21  # 8 MiB of fp32 a tile: some stay in the cache, and few rows of a long queue suffice


def momentum_contrast(
    image: Tensor,
    text: Tensor,
    image_momentum: Tensor,
    text_momentum: Tensor,
    logit_scale: Tensor | float,
    *,
    alpha: float = 0.4,
    image_queue: Tensor | None = None,
    text_queue: Tensor | None = None,
    ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    normalize: bool = True,
    group: dist.ProcessGroup | None = None,
    tile_size: int | None = None,
) -> Tensor:
    """Image-text contrastive loss with momentum distillation (ALBEF, BLIP).

    With M columns, the momentum texts of all ranks and those of the queue, an image's loss is
    -sum_j t_ij log softmax_j(scale <image_i, text'_j>), where t = alpha softmax_j(scale <image'_i, text'_j>) +
    (1 - alpha) y and y spreads evenly over the columns that are positives of the row. The loss is the mean over
    rows, averaged with the same from texts to images. The gradient reaches `image`, `text` and the scale in the
    student's logits; the targets are constants.

    The papers write alpha KL(t || p), the official code the cross-entropy: they differ by the entropy of the
    targets, a constant to the gradient. As in the code, several positives share a row's target evenly.

    Args:
        image, text: `[N, D]` features of this rank, with gradient; row i of one belongs to row i of the other.
        image_momentum, text_momentum: `[N, D]` features of the momentum towers for the same rows.
        logit_scale: 1 / temperature, already exponentiated; a 0-d tensor or a float.
        alpha: weight of the soft targets, in [0, 1].
        image_queue, text_queue: `[K, D]` older momentum features, equal on every rank; not normalised here.
        ids: int64 `[N]` or `[N, C]` of this rank's rows; a column is a positive of a row when any of their C ids
            agree. Negative ids are unknown and match nothing. The row's own column is always a positive.
        queue_ids: `[K]` or `[K, C]` of the queue's rows; without them no queue row is a positive.
        normalize: divide features (not the queues) by their Euclidean norm first.
        group: process group; `None` is the default group when initialised, else this process alone.
        tile_size: rows in a tile; `None` picks about 2 million entries a tile.

    Returns:
        A scalar, the loss of the whole batch on every rank. After DistributedDataParallel's mean over ranks every
        parameter has the whole batch's gradient, the scale's included.

    Raises:
        ValueError: mismatched shapes, an alpha out of range, one queue without the other, queue_ids without ids.
        RuntimeError: a second derivative is requested.

    Reference:
        Li et al., 2021, "Align before Fuse: Vision and Language Representation Learning with Momentum
        Distillation", equations 1, 2 and 6 (https://arxiv.org/abs/2107.07651); duplicates as positives as in the
        code of Li et al., 2022, "BLIP" (https://arxiv.org/abs/2201.12086).

    Example:
        >>> rows = torch.eye(4)
        >>> loss = momentum_contrast(rows, rows, rows, rows, 0.0, image_queue=rows, text_queue=rows)
        >>> bool((loss - torch.log(torch.tensor(8.0))).abs() < 1e-6)
        True
    """
    _check(image, text, image_momentum, text_momentum, image_queue, text_queue, ids, queue_ids, alpha, tile_size)
    with full_fp32(image.device):
        image, text = at_least_fp32(image, text)
        teachers = torch.cat([image_momentum.detach(), text_momentum.detach()]).to(image.dtype)
        if normalize:
            image, text, teachers = (F.normalize(rows, dim=-1) for rows in (image, text, teachers))
        image_momentum, text_momentum = teachers.chunk(2)
        sizes = row_counts(image, group)
        start = sum(sizes[: rank(group)])
        gathered = all_gather(torch.cat([image_momentum, text_momentum], dim=1), group, sizes)
        image_keys, text_keys = ([block] for block in gathered.split(image.shape[1], dim=1))
        if image_queue is not None and text_queue is not None and len(image_queue):
            image_keys.append(image_queue.detach().to(image.dtype))
            text_keys.append(text_queue.detach().to(image.dtype))
        columns = sum(len(block) for block in image_keys)
        column_ids = _column_ids(ids, queue_ids, columns, group, sizes)
        rows_a_tile = tile_size or max(8, _TILE_ELEMENTS // columns)

        def targets(rows: slice, soft: Tensor) -> Tensor:
            own = None if ids is None else ids[rows]
            return _add_positives(soft, own, column_ids, start + rows.start, 1 - alpha)

        momentum, keys = (image_momentum, text_momentum), (text_keys, image_keys)
        plan = _Plan(momentum, keys, float(alpha), targets, rows_a_tile, sum(sizes), group)
        scale = full_precision(logit_scale, image)
        return _MomentumContrast.apply(image, text, scale, plan)


class _Plan(NamedTuple):
    """The inputs without gradient, of both directions, images first."""

    momentum: tuple[Tensor, Tensor]
    keys: tuple[list[Tensor], list[Tensor]]  # blocks of columns: the batch's, the queue's
    alpha: float
    targets: Callable[[slice, Tensor], Tensor]
    tile: int
    total: int  # rows of all ranks
    group: dist.ProcessGroup | None


class _MomentumContrast(torch.autograd.Function):
    """Computes the gradient in the forward pass, where a tile holds whole rows."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, plan: _Plan) -> Tensor:
        needed = any(ctx.needs_input_grad)
        sums, gradients = image.new_zeros(2), []
        for query, momentum, keys in zip((image, text), plan.momentum, plan.keys, strict=True):
            loss, gradient = _direction(query, momentum, keys, scale, plan, needed)
            sums[0] += loss
            if gradient is not None:
                sums[1] += (query * gradient).sum()  # d loss / d scale, since the logits are linear in both
                gradients.append(gradient.mul_(scale))
        if world_size(plan.group) > 1:
            dist.all_reduce(sums, group=plan.group)
        sums /= 2 * plan.total
        if needed:
            # DistributedDataParallel averages over ranks, so a rank's share is multiplied by their number
            ctx.share = world_size(plan.group) / (2 * plan.total)
            ctx.save_for_backward(*gradients, sums[1])
        return sums[0].clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        if torch.is_grad_enabled():  # a second derivative would silently ignore the softmax
            raise RuntimeError("momentum_contrast has no second derivative; call backward without create_graph=True")
        image, text, scale = ctx.saved_tensors
        share = upstream * ctx.share
        return image * share, text * share, scale * upstream, None


def _direction(
    query: Tensor, momentum: Tensor, keys: list[Tensor], scale: Tensor, plan: _Plan, needed: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum over rows of the cross-entropies, and its gradient with respect to scale * query."""
    total = query.new_zeros(())
    gradient = torch.empty_like(query) if needed else None
    columns = sum(len(block) for block in keys)
    for begin in range(0, len(query), plan.tile):
        rows = slice(begin, min(begin + plan.tile, len(query)))
        if plan.alpha > 0:
            targets = _logits(momentum[rows] * scale, keys).softmax(dim=1).mul_(plan.alpha)
        else:
            targets = query.new_zeros(rows.stop - begin, columns)
        targets = plan.targets(rows, targets)
        logits = _logits(query[rows] * scale, keys)
        normalizer = logits.logsumexp(dim=1)
        total += normalizer.sum() - torch.dot(targets.flatten(), logits.flatten())  # a row's targets sum to one
        if gradient is not None:
            difference = logits.sub_(normalizer[:, None]).exp_().sub_(targets)
            parts = difference.split([len(block) for block in keys], dim=1)
            gradient[rows] = torch.stack([part @ block for part, block in zip(parts, keys, strict=True)]).sum(0)
    return total, gradient


def _logits(query: Tensor, keys: list[Tensor]) -> Tensor:
    return torch.cat([query @ block.T for block in keys], dim=1)


def _add_positives(targets: Tensor, ids: Tensor | None, column_ids: Tensor | None, start: int, weight: float) -> Tensor:
    """Adds `weight`, shared evenly over a row's positives; the row's own column is number `start` + row."""
    rows = torch.arange(len(targets), device=targets.device)
    if ids is None or column_ids is None:
        targets[rows, rows + start] += weight
        return targets
    ids = ids.reshape(len(targets), -1)
    positives = torch.zeros_like(targets, dtype=torch.bool)
    for column in range(ids.shape[1]):
        own = ids[:, column, None]
        positives |= (own == column_ids[:, column]) & (own >= 0)
    positives[rows, rows + start] = True
    shares = weight / positives.sum(1).to(targets.dtype)
    return targets.add_(positives * shares[:, None])


def _column_ids(
    ids: Tensor | None, queue_ids: Tensor | None, columns: int, group: dist.ProcessGroup | None, sizes: list[int]
) -> Tensor | None:
    if ids is None:
        return None
    gathered = all_gather(ids.reshape(len(ids), -1), group, sizes)
    rest = gathered.new_full((columns - len(gathered), gathered.shape[1]), -1)
    if queue_ids is not None and len(rest):
        rest = queue_ids.reshape(len(rest), -1).to(gathered)
    return torch.cat([gathered, rest])


def _check(
    image: Tensor, text: Tensor, image_momentum: Tensor, text_momentum: Tensor, image_queue: Tensor | None,
    text_queue: Tensor | None, ids: Tensor | None, queue_ids: Tensor | None, alpha: float, tile_size: int | None,
) -> None:  # fmt: skip
    check_rows(image=image, text=text, image_momentum=image_momentum, text_momentum=text_momentum)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is not between 0 and 1; the papers use 0.4")
    if tile_size is not None and tile_size < 1:
        raise ValueError(f"tile_size={tile_size} must be at least 1; None chooses one")
    if (image_queue is None) != (text_queue is None):
        raise ValueError("image_queue and text_queue must be given together")
    if image_queue is not None and text_queue is not None:
        queues = [list(queue.shape) for queue in (image_queue, text_queue)]
        if queues[0] != queues[1] or queues[0][1:] != [image.shape[1]]:
            raise ValueError(f"both queues must be [K, {image.shape[1]}], got {queues}")
    if ids is not None and (ids.is_floating_point() or ids.ndim not in (1, 2) or len(ids) != len(image)):
        raise ValueError(f"ids must be integers [{len(image)}] or [{len(image)}, C], got {ids.dtype} {list(ids.shape)}")
    if queue_ids is not None:
        if ids is None or image_queue is None:
            raise ValueError("queue_ids requires ids and queues")
        if len(queue_ids) != len(image_queue) or queue_ids.shape[1:] != ids.shape[1:]:
            wanted, given = [len(image_queue), *ids.shape[1:]], list(queue_ids.shape)
            raise ValueError(f"queue_ids must be {wanted} for ids {list(ids.shape)}, got {given}")
