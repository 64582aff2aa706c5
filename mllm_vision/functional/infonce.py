"""InfoNCE, NT-Xent, DCL and SupCon over the batch of all ranks, tile by tile, and the bound InfoNCE gives.

They share the engine of `image_text`: fp32 under autocast, no matrix of all pairs, the whole batch's loss on every
rank, and the whole batch's gradient after DistributedDataParallel averages over ranks.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mllm_vision.distributed import Columns, all_gather, all_reduce, mean_gradient, row_counts, sum_over_ranks
from mllm_vision.functional.checks import check_positive, check_rows
from mllm_vision.functional.engine.plan import Plan
from mllm_vision.functional.engine.softmax import softmax_losses
from mllm_vision.functional.engine.targets import diagonal, rolled
from mllm_vision.functional.engine.tiles import Grid, choose_tile, first_row
from mllm_vision.functional.precision import at_least_fp32, full_fp32, full_precision

__all__ = ["dcl", "info_nce", "mutual_information_bound", "nt_xent", "sup_con"]


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: Tensor | float = 0.5,
    normalize: bool = True,
    group: dist.ProcessGroup | None = None,
    tile_size: int | None = None,
    exchange: str = "gather",
) -> Tensor:
    """Normalised temperature-scaled cross-entropy of two views of every sample.

    Each of the 2N views must identify the other view of its sample among the remaining 2N - 1 views: the mean over
    views of -log(exp(s_ip / t) / sum_{k != i} exp(s_ik / t)), s the cosine, t the temperature.

    Args:
        z1: `[N, D]` projections of the first view of this rank's samples.
        z2: `[N, D]` of the second view, in the same order.
        temperature: t > 0; a float or a 0-d tensor, which may be trained.
        normalize: divide the rows by their Euclidean norm first.
        group: process group; `None` is the default group when initialised, else this process alone.
        tile_size: rows and columns of a tile; `None` chooses. It changes time and memory, not the result.
        exchange: `"gather"` or `"ring"`, as in `clip_loss`.

    Returns:
        A scalar, the same on every rank. Collapsed views give ln(2N - 1) with N of all ranks.

    Raises:
        ValueError: mismatched shapes, an empty batch, a temperature that is not positive, a tile size below one,
            an unknown exchange.
        RuntimeError: a second derivative is requested.

    Reference:
        Chen et al., 2020, "A Simple Framework for Contrastive Learning of Visual Representations", equation 1 and
        algorithm 1 (https://arxiv.org/abs/2002.05709).

    Example:
        >>> same = torch.ones(3, 4)
        >>> bool((nt_xent(same, same) - math.log(5)).abs() < 1e-5)
        True
    """
    check_rows(z1=z1, z2=z2)
    size = choose_tile(tile_size, z1.device, 2 * len(z1))
    with full_fp32(z1.device):
        z1, z2 = at_least_fp32(z1, z2)
        views = torch.cat([z1, z2])
        if normalize:
            views = F.normalize(views, dim=-1)
        # The columns are the rows with the views swapped: the positive of row i is its own column, and the excluded
        # pair, the row with itself, is n columns further on.
        half = len(z1)
        sizes = row_counts(views, group)
        columns = Columns(sizes, group, exchange)
        grid = Grid(len(views), columns.blocks, size)
        offset = first_row(sizes, group)
        plan = Plan(
            columns,
            grid,
            offset=offset,
            targets=diagonal(len(views), offset, grid),
            excluded=rolled(len(views), offset, [half], grid),
            mirror=half,
            bound=_bound(temperature, normalize),
        )
        scale = _scale(temperature, views)
        losses, _ = softmax_losses(views, views.detach().roll(half, 0), scale, plan)
        return sum_over_ranks(losses.sum(), group) / plan.total


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: Tensor | float = 0.07,
    normalize: bool = True,
    longest: float | None = None,
    group: dist.ProcessGroup | None = None,
    tile_size: int | None = None,
    exchange: str = "gather",
) -> Tensor:
    """InfoNCE: the mean over queries of -log(exp(s_p / t) / sum of exp(s / t)).

    Without `negatives`, a query's negatives are the other rows' positives on all ranks (one direction of
    `clip_loss`). With `negatives`, only these are used.

    Args:
        query: `[N, D]` of this rank.
        positive: `[N, D]`; row i belongs to query i.
        negatives: `[K, D]`, a bank shared by all queries and equal on every rank (MoCo's queue, filled with gathered
            keys); or `[N, K, D]`, K negatives for each query.
        temperature: t > 0; a float or a 0-d tensor, which may be trained.
        normalize: cosines; `False` uses inner products.
        longest: with `normalize=False`, an upper bound of the rows' Euclidean norms if known (1 for unit vectors). It
            changes time, not the result.
        group: process group; `None` is the default group when initialised, else this process alone.
        tile_size: rows and columns of a tile; `None` chooses. It changes time and memory, not the result.
        exchange: `"gather"` or `"ring"`, as in `clip_loss`, for negatives from the batch.

    Returns:
        A scalar, the same on every rank. Collapsed features give ln N without and ln(K + 1) with `negatives`.

    Raises:
        ValueError: mismatched shapes, an empty batch, a temperature that is not positive, a tile size below one,
            an unknown exchange.
        RuntimeError: a second derivative is requested.

    Reference:
        van den Oord et al., 2018, "Representation Learning with Contrastive Predictive Coding", equation 4
        (https://arxiv.org/abs/1807.03748); with a bank as in He et al., 2020, "Momentum Contrast for Unsupervised
        Visual Representation Learning", equation 1 (https://arxiv.org/abs/1911.05722).

    Example:
        >>> same = torch.ones(3, 4)
        >>> bool((info_nce(same, same, same) - math.log(4)).abs() < 1e-5)
        True
    """
    check_rows(query=query, positive=positive)
    size = choose_tile(tile_size, query.device, len(query))
    with full_fp32(query.device):
        given = [query, positive] if negatives is None else [query, positive, negatives]
        given = at_least_fp32(*given)
        if normalize:
            given = [F.normalize(part, dim=-1) for part in given]
        query, positive = given[:2]
        scale = _scale(temperature, query)
        bound = _bound(temperature, normalize, longest)
        sizes = row_counts(query, group)
        total = sum(sizes)
        if negatives is None:
            columns = Columns(sizes, group, exchange)
            grid = Grid(len(query), columns.blocks, size)
            offset = first_row(sizes, group)
            targets = diagonal(len(query), offset, grid)
            plan = Plan(columns, grid, offset=offset, targets=targets, by_column=False, bound=bound)
            losses, _ = softmax_losses(query, positive, scale, plan)
            return sum_over_ranks(losses.sum(), group) / total
        scale = mean_gradient(scale, group)  # the positives below are this rank's only
        bank, own = given[2], scale * (query * positive).sum(1)
        if bank.ndim == 2 and bank.shape[1] == query.shape[1] and len(bank) > 0:
            columns = Columns([len(bank)], group, "shared")
            plan = Plan(columns, Grid(len(query), columns.blocks, size), by_column=False, bound=bound)
            among, _ = softmax_losses(query, bank, scale, plan)
        elif bank.ndim == 3 and bank.shape[::2] == query.shape and bank.shape[1] > 0:
            among = (scale * torch.einsum("nd,nkd->nk", query, bank)).logsumexp(1)
        else:
            raise ValueError(
                f"negatives must be [K, D] or [N, K, D] with K > 0 for queries {list(query.shape)}, "
                f"got {list(bank.shape)}"
            )
        return sum_over_ranks(F.softplus(among - own, threshold=80).sum(), group) / total


def dcl(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: Tensor | float = 0.1,
    sigma: float | None = None,
    normalize: bool = True,
    group: dist.ProcessGroup | None = None,
    tile_size: int | None = None,
    exchange: str = "gather",
) -> Tensor:
    """Decoupled contrastive loss: NT-Xent without the positive in the denominator.

    The mean over the 2N views of -w_i s_ip / t + log sum_k exp(s_ik / t), k over the 2N - 2 views of other samples.
    Easy positives no longer shrink the gradient of the negatives, which helps small batches.

    Args:
        z1: `[N, D]` projections of the first view of this rank's samples.
        z2: `[N, D]` of the second view, in the same order.
        temperature: t > 0; a float or a 0-d tensor, which may be trained.
        sigma: `None` is w = 1; a number gives the weighted form (DCLW; 0.5 in the paper):
            w_i = 2 - exp(s_ip / sigma) / mean over samples of it, more weight for dissimilar pairs. The weights are
            differentiated too, as in the official code.
        normalize: divide the rows by their Euclidean norm first.
        group: process group; `None` is the default group when initialised, else this process alone.
        tile_size: rows and columns of a tile; `None` chooses. It changes time and memory, not the result.
        exchange: `"gather"` or `"ring"`, as in `clip_loss`.

    Returns:
        A scalar, the same on every rank. Collapsed views give ln(2N - 2) with N of all ranks. The two views' losses
        are averaged, as in NT-Xent; the official code adds them.

    Raises:
        ValueError: mismatched shapes, fewer than two samples over all ranks, a temperature or `sigma` that is not
            positive, a tile size below one, an unknown exchange.
        RuntimeError: a second derivative is requested.

    Reference:
        Yeh et al., 2022, "Decoupled Contrastive Learning", equations 6 and 7 (https://arxiv.org/abs/2110.06848).

    Example:
        >>> same = torch.ones(3, 4)
        >>> bool((dcl(same, same) - math.log(4)).abs() < 1e-5)
        True
    """
    check_rows(z1=z1, z2=z2)
    if sigma is not None and not sigma > 0:
        raise ValueError(f"sigma={sigma} must be positive (0.5 in the paper), or None for the unweighted loss")
    size = choose_tile(tile_size, z1.device, 2 * len(z1))
    with full_fp32(z1.device):
        z1, z2 = at_least_fp32(z1, z2)
        if normalize:
            z1, z2 = F.normalize(z1, dim=-1), F.normalize(z2, dim=-1)
        scale = mean_gradient(_scale(temperature, z1), group)  # the positives are this rank's only
        half = len(z1)
        views, bound = torch.cat([z1, z2]), _bound(temperature, normalize)
        among, total = _among_others(views, [0, half], scale, bound, group, size, exchange, "dcl has no negatives")
        cosine = (z1 * z2).sum(1)
        positive = scale * cosine
        if sigma is not None:
            exponent = cosine / sigma
            # shifted by the largest of all ranks, which cancels in the weights, against overflow
            likeness = (exponent - all_reduce(exponent.detach().amax(), group, "max")).exp()
            positive = positive * (2 - likeness * (total // 2) / sum_over_ranks(likeness.sum(), group))
        return sum_over_ranks(among.sum() - 2 * positive.sum(), group) / total


def sup_con(
    features: Tensor,
    labels: Tensor | None,
    *,
    temperature: Tensor | float = 0.07,
    normalize: bool = True,
    group: dist.ProcessGroup | None = None,
    tile_size: int | None = None,
    exchange: str = "gather",
) -> Tensor:
    """Supervised contrastive loss: the positives of a view are all other views of its class.

    The mean over the NV views of -1/|P(i)| sum_{p in P(i)} log(exp(s_ip / t) / sum_{a != i} exp(s_ia / t)), P(i) the
    other views with the label of i, over all ranks.

    Args:
        features: `[N, V, D]` projections of V views of this rank's samples.
        labels: `[N]` integers; `None` treats every sample as a class, which with two views is `nt_xent`.
        temperature: t > 0; a float or a 0-d tensor, which may be trained.
        normalize: divide the rows by their Euclidean norm first.
        group: process group; `None` is the default group when initialised, else this process alone.
        tile_size: rows and columns of a tile; `None` chooses. It changes time and memory, not the result.
        exchange: `"gather"` or `"ring"`, as in `clip_loss`.

    Returns:
        A scalar, the same on every rank. Collapsed features give ln(NV - 1). A view without positives counts as 0, as
        in the official code. That code's factor t / 0.07, which only rescales the learning rate, is left out, as in
        the paper.

    Raises:
        ValueError: mismatched shapes, a single view over all ranks, labels that are not integers, a temperature
            that is not positive, a tile size below one, an unknown exchange.
        RuntimeError: a second derivative is requested.

    Reference:
        Khosla et al., 2020, "Supervised Contrastive Learning", equation 2 (https://arxiv.org/abs/2004.11362).

    Example:
        >>> same = torch.ones(3, 2, 4)
        >>> bool((sup_con(same, torch.tensor([0, 0, 1])) - math.log(5)).abs() < 1e-5)
        True
    """
    if features.ndim != 3 or 0 in features.shape:
        raise ValueError(f"features must be [N, V, D] with N, V > 0, got {list(features.shape)}")
    count, views = features.shape[:2]
    if labels is not None and (labels.shape != (count,) or labels.is_floating_point()):
        raise ValueError(f"labels must be integers [{count}], got {labels.dtype} {list(labels.shape)}")
    size = choose_tile(tile_size, features.device, count * views)
    with full_fp32(features.device):
        (rows,) = at_least_fp32(features.flatten(0, 1))
        if normalize:
            rows = F.normalize(rows, dim=-1)
        scale = mean_gradient(_scale(temperature, rows), group)
        bound = _bound(temperature, normalize)
        among, total = _among_others(rows, [0], scale, bound, group, size, exchange, "sup_con has no other view")
        # The mean score with the positives is the score with their mean, so one sum per class suffices.
        sizes = row_counts(rows, group)
        if labels is None:
            index = torch.arange(len(rows), device=rows.device)
            classes = first_row(sizes, group) + index - index % views  # the number of the sample's first view
        else:
            classes = labels.to(rows.device)[:, None].expand(-1, views).flatten()
        # classes are numbered by their place among all sorted labels, so their number is not read from the device
        ordered = all_gather(classes, group, sizes).sort().values
        own = torch.searchsorted(ordered, classes)
        positives = (torch.searchsorted(ordered, classes, right=True) - own - 1).to(rows.dtype)
        sums = sum_over_ranks(rows.new_zeros(len(ordered), rows.shape[1]).index_add(0, own, rows), group)
        score = scale * (rows * (sums[own] - rows)).sum(1) / positives.clamp_min(1)
        return sum_over_ranks(((among - score) * (positives > 0)).sum(), group) / total


def mutual_information_bound(loss: Tensor | float, negatives: int) -> Tensor | float:
    """Lower bound of the mutual information of two views by an InfoNCE loss: ln(K + 1) - loss, in nats.

    The bound cannot exceed ln(K + 1): a small loss among few negatives proves little.

    Args:
        loss: an InfoNCE or NT-Xent loss.
        negatives: K, the negatives of each query: N - 1 in a batch of N, 2N - 2 for NT-Xent, the size of a bank.

    Returns:
        Nats, of the type of `loss`.

    Raises:
        ValueError: fewer than one negative.

    Reference:
        van den Oord et al., 2018, section 2.3 and appendix A.1 (https://arxiv.org/abs/1807.03748).

    Example:
        >>> round(mutual_information_bound(1.0, 1), 4)
        -0.3069
    """
    if negatives < 1:
        raise ValueError(f"negatives={negatives} must be at least 1")
    return math.log(negatives + 1) - loss


def _among_others(
    views: Tensor,
    excluded: list[int],
    scale: Tensor,
    bound: float | None,
    group: dist.ProcessGroup | None,
    size: int,
    exchange: str,
    complaint: str,
) -> tuple[Tensor, int]:
    """`[n]` log-sum-exp of every view's scores with all views but the `excluded` offsets, and the number of views."""
    sizes = row_counts(views, group)
    total, offset = sum(sizes), first_row(sizes, group)
    if total <= len(excluded):
        raise ValueError(f"{complaint}: the batch of all ranks has {total} views; take more samples")
    columns = Columns(sizes, group, exchange)
    grid = Grid(len(views), columns.blocks, size)
    # No `offset` in the plan, because it implies a score with the own column, which is excluded here.
    plan = Plan(columns, grid, excluded=rolled(len(views), offset, excluded, grid), mirror=0, bound=bound)
    among, _ = softmax_losses(views, views.detach(), scale, plan)
    return among, total


def _bound(temperature: Tensor | float, normalize: bool, longest: float | None = None) -> float | None:
    """Upper bound of the scores (with a margin for rounding), where the host knows temperature and norms."""
    longest = 1.0 if normalize else longest
    if longest is None or isinstance(temperature, Tensor) or not temperature > 0:
        return None
    return longest**2 / temperature * (1 + 1e-5)


def _scale(temperature: Tensor | float, like: Tensor) -> Tensor:
    if not isinstance(temperature, Tensor):
        check_positive(temperature=temperature)
    return full_precision(temperature, like).reciprocal()
