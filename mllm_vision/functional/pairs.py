"""Losses of pairs and triplets, and the mining of triplets from a labelled batch.

`contrastive` and `triplet` average over the rows of all ranks; `batch_triplet` mines its triplets from the batch of all
ranks. Distances are Euclidean, in fp32 or better, also under autocast.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mllm_vision.distributed import all_gather, all_reduce, mean_over_rows, reduce_scatter, row_counts, world_size
from mllm_vision.functional.checks import check_rows
from mllm_vision.functional.engine.tiles import first_row
from mllm_vision.functional.precision import at_least_fp32, full_fp32, wide_dtype

__all__ = ["STRATEGIES", "TripletMasks", "Triplets", "batch_triplet", "contrastive", "mine_triplets", "triplet"]
__all__ += ["triplet_masks"]

STRATEGIES = ("batch_all", "batch_hard", "batch_semi_hard")
STRIP = 2**22  # distances in memory at a time: strips of anchors by all rows


def contrastive(
    x1: Tensor,
    x2: Tensor,
    different: Tensor,
    *,
    margin: float = 1.0,
    scale: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Contrastive loss: pulls similar pairs together and pushes different ones apart, up to a margin.

    The mean over pairs of scale * ((1 - y) d^2 + y max(0, margin - d)^2), d = |x1 - x2|, y = 1 for different pairs.

    Args:
        x1: `[N, D]`.
        x2: `[N, D]`; row i is compared with row i of `x1`.
        different: `[N]` y: 0 (similar) or 1 (different), bool or number; values between mix both terms.
        margin: distance from which on a different pair costs nothing, > 0.
        scale: 0.5 gives the paper's halves.
        group: process group; `None` is the default group when initialised, else this process alone.

    Returns:
        A scalar, the same on every rank. Collapsed features give scale * margin^2 times the share of different pairs.
        The gradient of a different pair whose rows coincide is 0.

    Raises:
        ValueError: mismatched shapes, an empty batch, a margin that is not positive.

    Reference:
        Hadsell et al., 2006, "Dimensionality Reduction by Learning an Invariant Mapping", equation 4
        (https://doi.org/10.1109/CVPR.2006.100).

    Example:
        >>> x1, x2 = torch.zeros(2, 2), torch.tensor([[0.6, 0.8], [0.3, 0.4]])  # distances 1 and 0.5
        >>> round(contrastive(x1, x2, torch.tensor([0, 1])).item(), 4)  # (1 + 0.5^2) / 2
        0.625
    """
    check_rows(x1=x1, x2=x2)
    _check_margin(margin)
    if different.shape != (len(x1),):
        raise ValueError(f"different must be [{len(x1)}], one value per pair, got {list(different.shape)}")
    with full_fp32(x1.device):
        x1, x2 = at_least_fp32(x1, x2)
        y = different.to(x1)
        difference = x1 - x2
        short = (margin - torch.linalg.vector_norm(difference, dim=1)).clamp_min(0)
        return scale * mean_over_rows((1 - y) * difference.square().sum(1) + y * short.square(), group)


def triplet(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    margin: float = 0.2,
    normalize: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Triplet loss: the mean over rows of max(0, d(a, p)^2 - d(a, n)^2 + margin).

    Args:
        anchor: `[N, D]`.
        positive: `[N, D]`, of the anchor's identity.
        negative: `[N, D]`, of another identity.
        margin: alpha > 0.
        normalize: divide the rows by their Euclidean norm first, as the paper does.
        group: process group; `None` is the default group when initialised, else this process alone.

    Returns:
        A scalar, the same on every rank. Collapsed features give the margin.

    Raises:
        ValueError: mismatched shapes, an empty batch, a margin that is not positive.

    Reference:
        Schroff et al., 2015, "FaceNet: A Unified Embedding for Face Recognition and Clustering", equation 2
        (https://arxiv.org/abs/1503.03832).

    Example:
        >>> a, p, n = torch.eye(3).split(1)  # orthogonal: both squared distances are 2
        >>> round(triplet(a, p, n).item(), 4), triplet(a, a, n).item()
        (0.2, 0.0)
    """
    check_rows(anchor=anchor, positive=positive, negative=negative)
    _check_margin(margin)
    with full_fp32(anchor.device):
        anchor, positive, negative = at_least_fp32(anchor, positive, negative)
        if normalize:
            anchor, positive, negative = (F.normalize(rows, dim=-1) for rows in (anchor, positive, negative))
        to_positive, to_negative = (anchor - positive).square().sum(1), (anchor - negative).square().sum(1)
        return mean_over_rows((to_positive - to_negative + margin).clamp_min(0), group)


class TripletMasks(NamedTuple):
    """Bool tensors. A triplet exactly on a border is in none of them."""

    easy: Tensor
    semi_hard: Tensor
    hard: Tensor


def triplet_masks(to_positive: Tensor, to_negative: Tensor, *, margin: float = 0.2) -> TripletMasks:
    """Which triplets are easy, semi-hard and hard, by their squared distances.

    easy: d_ap^2 + margin < d_an^2; semi-hard: d_ap^2 < d_an^2 < d_ap^2 + margin; hard: d_an^2 < d_ap^2.

    Args:
        to_positive: squared distances d_ap^2, of any shape.
        to_negative: squared distances d_an^2; the shapes broadcast.
        margin: alpha > 0.

    Returns:
        Three masks of the shape that the two broadcast to.

    Raises:
        ValueError: a margin that is not positive.

    Reference:
        Schroff et al., 2015, section 3.2, equations 3 and 4 (https://arxiv.org/abs/1503.03832).

    Example:
        >>> masks = triplet_masks(torch.tensor(1.0), torch.tensor([0.9, 1.1, 1.3]))
        >>> masks.hard.tolist(), masks.semi_hard.tolist(), masks.easy.tolist()
        ([True, False, False], [False, True, False], [False, False, True])
    """
    _check_margin(margin)
    beyond = to_positive + margin
    return TripletMasks(
        beyond < to_negative, (to_positive < to_negative) & (to_negative < beyond), to_negative < to_positive
    )


class Triplets(NamedTuple):
    """Row numbers, int64 `[T]` each: `triplet(x[t.anchor], x[t.positive], x[t.negative])`."""

    anchor: Tensor
    positive: Tensor
    negative: Tensor


@torch.no_grad()
def mine_triplets(
    features: Tensor, labels: Tensor, *, margin: float = 0.2, strategy: str = "batch_all", normalize: bool = True
) -> Triplets:
    """Triplets of a batch: anchor and positive share a label and are two rows, the negative has another label.

    Args:
        features: `[N, D]`.
        labels: `[N]` integers.
        margin: alpha > 0.
        strategy: `"batch_all"`: every triplet with a positive loss (semi-hard and hard). `"batch_hard"`: for each
            anchor its farthest positive and nearest negative, with or without a loss. `"batch_semi_hard"`: for each
            anchor and positive the nearest semi-hard negative; pairs without one are left out.
        normalize: as in `triplet`.

    Returns:
        Row numbers, ordered by anchor, possibly none.

    Raises:
        ValueError: mismatched shapes, labels that are not integers, an unknown strategy, a margin that is not
            positive.

    Reference:
        Schroff et al., 2015, section 3.2; Hermans et al., 2017, "In Defense of the Triplet Loss for Person
        Re-Identification", equations 5 and 6 (https://arxiv.org/abs/1703.07737).

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]])
        >>> [rows.tolist() for rows in mine_triplets(x, torch.tensor([0, 0, 1]), strategy="batch_hard")]
        [[0, 1], [1, 0], [2, 2]]
    """
    _check_batch(features, labels, margin, strategy)
    with full_fp32(features.device):
        (rows,) = at_least_fp32(features)
        rows = F.normalize(rows, dim=-1) if normalize else rows
        rows = rows - rows.mean(0)
        labels = labels.to(rows.device)
        size = max(1, STRIP // len(rows))
        found = []
        for begin in range(0, len(rows), size):
            part = slice(begin, begin + size)
            anchor, positive, negative = _Strip(rows[part], rows, labels[part], labels, begin, margin).mined(strategy)
            found.append(torch.stack([anchor + begin, positive, negative]))
        return Triplets(*torch.cat(found, dim=1))


def batch_triplet(
    features: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.2,
    strategy: str = "batch_all",
    normalize: bool = True,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of the triplets that `mine_triplets` finds in the batch of all ranks, and the fraction that is active.

    For `"batch_all"` and `"batch_semi_hard"` the mean over triplets with a positive loss, for `"batch_hard"` the mean
    over anchors that have a positive and a negative. Neither the triplets nor the matrix of all distances are
    materialised: strips of anchors are compared with all rows, and all N^3 triplets take time N^2 log N by sorting.

    Args:
        features: `[N, D]` of this rank.
        labels: `[N]` integers.
        margin: alpha > 0.
        strategy: as in `mine_triplets`.
        normalize: as in `triplet`.
        group: process group; `None` is the default group when initialised, else this process alone.

    Returns:
        The loss, a scalar that is the same on every rank, with the whole batch's gradient after
        DistributedDataParallel averages over ranks; and the active fraction, a scalar without gradient: triplets with
        a positive loss of all triplets (`"batch_all"`), anchors with one of all anchors (`"batch_hard"`), positive
        pairs with a semi-hard negative of all such pairs (`"batch_semi_hard"`). Both are 0 without any triplet.

    Raises:
        ValueError: as `mine_triplets`.
        RuntimeError: a second derivative is requested.

    Reference:
        As `mine_triplets`.

    Example:
        >>> x, labels = torch.ones(4, 3), torch.tensor([0, 0, 1, 1])  # collapsed: the loss is the margin
        >>> loss, active = batch_triplet(x, labels, strategy="batch_hard")
        >>> round(loss.item(), 4), active.item()
        (0.2, 1.0)
    """
    _check_batch(features, labels, margin, strategy)
    with full_fp32(features.device):
        (rows,) = at_least_fp32(features)
        rows = F.normalize(rows, dim=-1) if normalize else rows
        loss, active = _BatchTriplet.apply(rows, labels.to(rows.device), margin, strategy, group)
        return loss, active


class _Strip:
    """Some anchors against all rows: squared distances `[r, N]` and masks of positives and negatives.

    The rows must be centred: an offset that all rows share would cost the distances precision.
    """

    def __init__(
        self, anchors: Tensor, rows: Tensor, labels: Tensor, all_labels: Tensor, start: int, margin: float
    ) -> None:
        self.margin = margin
        squares = anchors.square().sum(1)[:, None] + rows.square().sum(1)[None]
        self.distance = torch.addmm(squares, anchors, rows.T, alpha=-2).clamp_min_(0)
        same = labels[:, None] == all_labels[None]
        self.negative = ~same
        own = torch.arange(len(anchors), device=rows.device)
        same[own, start + own] = False  # an anchor is not its own positive
        self.positive = same

    def hardest(self) -> tuple[Tensor, Tensor, Tensor]:
        """`[r]`: column of the farthest positive, of the nearest negative, and whether both exist."""
        positive = self.distance.masked_fill(~self.positive, -torch.inf).argmax(1)
        negative = self.distance.masked_fill(~self.negative, torch.inf).argmin(1)
        return positive, negative, self.positive.any(1) & self.negative.any(1)

    def nearest_semi_hard(self) -> tuple[Tensor, Tensor]:
        """`[r, N]`: column of the nearest negative beyond a pair's distance; whether it makes a semi-hard triplet."""
        ordered, order = self.distance.masked_fill(~self.negative, torch.inf).sort(1)
        after = torch.searchsorted(ordered, self.distance, right=True)  # the first one farther
        place = after.clamp_max(ordered.shape[1] - 1)
        near = ordered.gather(1, place) < self.distance + self.margin
        return order.gather(1, place), self.positive & (after < ordered.shape[1]) & near

    def mined(self, strategy: str) -> tuple[Tensor, Tensor, Tensor]:
        """Anchors (within the strip), columns of their positives and of their negatives: int64 `[T]` each."""
        if strategy == "batch_hard":
            positive, negative, valid = self.hardest()
            anchor = valid.nonzero()[:, 0]
            return anchor, positive[anchor], negative[anchor]
        if strategy == "batch_semi_hard":
            negative, found = self.nearest_semi_hard()
            anchor, positive = found.nonzero(as_tuple=True)
            return anchor, positive, negative[anchor, positive]
        listed = []
        for number, distance in enumerate(self.distance):
            positive, negative = self.positive[number].nonzero()[:, 0], self.negative[number].nonzero()[:, 0]
            active = distance[negative] < distance[positive, None] + self.margin
            first, second = active.nonzero(as_tuple=True)
            listed.append(torch.stack([torch.full_like(first, number), positive[first], negative[second]]))
        anchor, positive, negative = torch.cat(listed, dim=1)
        return anchor, positive, negative

    def weights(self, strategy: str) -> tuple[Tensor, Tensor, Tensor]:
        """`[r, N]` coefficients of the distances in the summed loss (less the margins), active triplets, candidates."""
        weights = torch.zeros_like(self.distance)
        if strategy == "batch_all":
            border = torch.where(self.positive, self.distance + self.margin, -torch.inf)
            negatives = self.distance.masked_fill(~self.negative, torch.inf).sort(1).values
            nearer = torch.searchsorted(negatives, border)  # of each positive: negatives within its border
            passed = torch.searchsorted(border.sort(1).values, self.distance, right=True)
            weights = (nearer * self.positive - (border.shape[1] - passed) * self.negative).to(weights)
            candidates = (self.positive.sum(1) * self.negative.sum(1)).sum()
            return weights, (nearer * self.positive).sum(), candidates
        if strategy == "batch_semi_hard":
            negative, active = self.nearest_semi_hard()
            one = active.to(weights)
            return (weights + one).scatter_add_(1, negative, -one), active.sum(), self.positive.sum()
        positive, negative, valid = (each[:, None] for each in self.hardest())
        active = valid & (self.distance.gather(1, negative) < self.distance.gather(1, positive) + self.margin)
        one = active.to(weights)
        weights.scatter_add_(1, positive, one).scatter_add_(1, negative, -one)
        return weights, active.sum(), valid.sum()


class _BatchTriplet(torch.autograd.Function):
    """The loss is linear in the distances of the chosen triplets, so the gradient is computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, labels: Tensor, margin: float, strategy: str, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        sizes = row_counts(rows, group)
        everyone, all_labels = all_gather(rows, group, sizes), all_gather(labels, group, sizes)
        start = first_row(sizes, group)
        everyone = everyone - everyone.mean(0)
        rows = everyone[start : start + len(rows)]
        by_anchor, by_column = torch.zeros_like(rows), torch.zeros_like(everyone)
        sums = rows.new_zeros(3, dtype=wide_dtype(rows))  # of losses, active triplets, candidates
        size = max(1, STRIP // len(everyone))
        for begin in range(0, len(rows), size):
            part = slice(begin, begin + size)
            strip = _Strip(rows[part], everyone, labels[part], all_labels, start + begin, margin)
            weights, active, candidates = strip.weights(strategy)
            active, candidates = active.to(sums), candidates.to(sums)
            losses = (weights * strip.distance).sum(dtype=sums.dtype) + margin * active
            sums += torch.stack([losses, active, candidates])
            # w |a - b|^2 has the gradient 2 w (a - b) for a and 2 w (b - a) for b
            by_anchor[part] = 2 * (weights.sum(1, keepdim=True) * rows[part] - weights @ everyone)
            by_column += 2 * (weights.sum(0)[:, None] * everyone - weights.T @ rows[part])
        sums = all_reduce(sums, group)
        # batch_hard averages over all valid anchors
        divisor = (sums[2] if strategy == "batch_hard" else sums[1]).clamp_min(1)
        gradient = by_anchor + reduce_scatter(by_column, sizes, group)
        # DistributedDataParallel averages over ranks, so a rank's share is multiplied by their number
        ctx.save_for_backward(gradient * (world_size(group) / divisor).to(rows.dtype))
        active = (sums[1] / sums[2].clamp_min(1)).to(rows.dtype)
        ctx.mark_non_differentiable(active)
        return (sums[0] / divisor).to(rows.dtype), active

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("batch_triplet has no second derivative; call backward without create_graph=True")
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None, None


def _check_margin(margin: float) -> None:
    if not margin > 0:
        raise ValueError(f"margin={margin} must be positive: otherwise collapsed features have loss zero")


def _check_batch(features: Tensor, labels: Tensor, margin: float, strategy: str) -> None:
    _check_margin(margin)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} must be one of {', '.join(map(repr, STRATEGIES))}")
    if features.ndim != 2 or len(features) == 0 or labels.shape != (len(features),) or labels.is_floating_point():
        raise ValueError(
            f"features must be [N, D] with N > 0 and labels integers [N], got {list(features.shape)} and "
            f"{labels.dtype} {list(labels.shape)}"
        )
