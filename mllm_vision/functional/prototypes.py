"""Prototypes: spherical k-means over the rows of all ranks, the concentration of clusters, and the ProtoNCE loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mllm_vision.distributed import Columns, all_gather, all_reduce, rank, row_counts, sum_over_ranks
from mllm_vision.functional.checks import check_positive
from mllm_vision.functional.engine.plan import Plan
from mllm_vision.functional.engine.softmax import softmax_losses
from mllm_vision.functional.engine.tiles import Grid, choose_tile, first_row
from mllm_vision.functional.precision import at_least_fp32, full_fp32, wide_dtype

__all__ = ["Clusters", "concentration", "proto_nce", "spherical_kmeans"]


class Clusters(NamedTuple):
    """The result of `spherical_kmeans`.

    Attributes:
        centroids: `[K, D]` of unit length, equal on every rank.
        assignments: int64 `[N]`: the centroid of each of this rank's rows.
        similarity: mean cosine of the rows of all ranks to their centroids, the objective.
    """

    centroids: Tensor
    assignments: Tensor
    similarity: float


@torch.no_grad()
def spherical_kmeans(
    features: Tensor,
    k: int,
    *,
    iterations: int = 20,
    restarts: int = 1,
    seed: int = 0,
    group: dist.ProcessGroup | None = None,
    tile_size: int | None = None,
) -> Clusters:
    """K-means on the unit sphere: rows go to the centroid of the largest cosine, centroids to the mean direction.

    It starts from k random rows of all ranks, drawn by `seed` and the number of rows, so that the clusters do not
    depend on how rows are split over ranks. An empty centroid moves to the row that fits its own centroid worst.

    Args:
        features: `[N, D]` rows of this rank, of any norm; ranks may hold different N.
        k: number of clusters, at most the rows of all ranks.
        iterations: of assigning and averaging.
        restarts: number of starts; the clusters with the largest `similarity` are kept (PCL's code: 5).
        seed: of the starts.
        group: process group; `None` is the default group when initialised, else this process alone.
        tile_size: rows compared with all centroids at a time; `None` chooses. It changes memory, not the result.

    Raises:
        ValueError: not `[N, D]`, features that are not finite, more clusters than rows, no iteration or start.

    Reference:
        Dhillon and Modha, 2001, "Concept Decompositions for Large Sparse Text Data Using Clustering", section 3.

    Example:
        >>> rows = torch.tensor([[1.0, 0.1], [2.0, 0.0], [0.1, 1.0], [0.0, 3.0]])
        >>> first, second, third, fourth = spherical_kmeans(rows, 2).assignments.tolist()
        >>> first == second != third == fourth
        True
    """
    if features.ndim != 2:
        raise ValueError(f"features must be [N, D], got {list(features.shape)}")
    if iterations < 1 or restarts < 1:
        raise ValueError(f"iterations={iterations} and restarts={restarts} must be at least 1")
    sizes = row_counts(features, group)
    total = sum(sizes)
    if not 1 <= k <= total:
        raise ValueError(f"k={k} clusters of {total} rows: use 1 to {total} clusters, or more images")
    finite = all_reduce(features.isfinite().logical_not().sum(), group)
    if finite.item():
        raise ValueError(f"features contain {finite.item()} values that are not finite, so they cannot be clustered")
    with full_fp32(features.device):
        rows = F.normalize(at_least_fp32(features)[0], dim=-1)
        size = choose_tile(tile_size, rows.device)
        generator = torch.Generator().manual_seed(seed)
        best: Clusters | None = None
        for _ in range(restarts):
            start = torch.randperm(total, generator=generator)[:k]
            found = _lloyd(rows, _rows_of_all(rows, start, sizes, group), iterations, size, total, group)
            if best is None or found.similarity > best.similarity:
                best = found
        assert best is not None
        return best


def _rows_of_all(rows: Tensor, index: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Rows by their number over all ranks, gathered by a sum."""
    own = index.to(rows.device) - first_row(sizes, group)
    here = (own >= 0) & (own < sizes[rank(group)])
    picked = rows.new_zeros(len(index), rows.shape[1])
    picked[here] = rows[own[here]]
    return all_reduce(picked, group)


def _lloyd(
    rows: Tensor, centroids: Tensor, iterations: int, size: int, total: int, group: dist.ProcessGroup | None
) -> Clusters:
    k, wide = len(centroids), wide_dtype(rows)
    assignments, cosine = _assign(rows, centroids, size)
    for _ in range(iterations):
        # Sums in double precision hardly depend on the order of the rows, and so on the number of ranks.
        sums = torch.zeros_like(centroids, dtype=wide).index_add_(0, assignments, rows.to(wide))
        sums, counts = all_reduce(sums, group), all_reduce(assignments.bincount(minlength=k), group)
        means = F.normalize(sums, dim=-1).to(rows)
        # Opposite rows may cancel and an empty cluster has no mean: both keep the old direction.
        centroids = torch.where((sums.norm(dim=-1) > 0)[:, None], means, centroids)
        centroids = _fill_empty(centroids, counts, rows, cosine, group)
        assignments, cosine = _assign(rows, centroids, size)
    similarity = all_reduce(cosine.to(wide).sum(), group).item() / total
    return Clusters(centroids, assignments, similarity)


def _assign(rows: Tensor, centroids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    parts = [(rows[start : start + size] @ centroids.T).max(1) for start in range(0, len(rows), size)]
    if not parts:
        return rows.new_empty(0, dtype=torch.int64), rows.new_empty(0)
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def _fill_empty(
    centroids: Tensor, counts: Tensor, rows: Tensor, cosine: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """Centroids without rows move to the rows of all ranks that fit their own centroids worst."""
    empty = (counts == 0).nonzero()[:, 0]  # equal on every rank, as the counts are
    if len(empty) == 0:
        return centroids
    worst = cosine.argsort(stable=True)[: len(empty)]
    sizes = row_counts(worst, group)
    among = all_gather(cosine[worst], group, sizes).argsort(stable=True)[: len(empty)]
    return centroids.index_copy(0, empty, all_gather(rows[worst], group, sizes)[among])


@torch.no_grad()
def concentration(
    features: Tensor,
    centroids: Tensor,
    assignments: Tensor,
    *,
    temperature: float = 0.2,
    smoothing: float = 10.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Concentration of each cluster, used as its temperature: larger for loose clusters, smaller for tight ones.

    phi = (sum of the distances of the cluster's n rows to its centroid) / (n ln(n + smoothing)). A cluster of at most
    one row gets the largest; all are clipped to the 10th and 90th percentile, scaled to the mean `temperature` and kept
    above a tenth of it (a cluster of duplicates has width zero, which the percentiles of few clusters let pass).

    Args:
        features: `[N, D]` rows of this rank, of any norm: distances are between unit vectors.
        centroids: `[K, D]` of unit length.
        assignments: int64 `[N]`, the centroid of each row.
        temperature: mean of the result, > 0.
        smoothing: alpha of the paper, against large values of small clusters, > 0.
        group: process group; `None` is the default group when initialised, else this process alone.

    Returns:
        `[K]`, in fp32 or better, the same on every rank.

    Raises:
        ValueError: mismatched shapes, or a temperature or smoothing that is not positive.

    Reference:
        Li et al., 2021, "Prototypical Contrastive Learning of Unsupervised Representations", equation 12 and
        section 3.3 (https://arxiv.org/abs/2005.04966); clipping and single rows as in the official code.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> middles = torch.tensor([[1.0, 0.0], [0.3162, 0.9487]])
        >>> tight, loose = concentration(rows, middles, torch.tensor([0, 0, 1, 1]), temperature=0.2).tolist()
        >>> tight < 0.2 < loose
        True
    """
    if features.ndim != 2 or centroids.shape[1:] != features.shape[1:] or assignments.shape != features.shape[:1]:
        raise ValueError(
            f"features must be [N, D], centroids [K, D] and assignments [N], got {list(features.shape)}, "
            f"{list(centroids.shape)} and {list(assignments.shape)}"
        )
    check_positive(temperature=temperature, smoothing=smoothing)
    with full_fp32(features.device):
        rows, middles = at_least_fp32(features, centroids)
        distances = (F.normalize(rows, dim=-1) - middles[assignments]).norm(dim=1).to(wide_dtype(rows))
        sums = all_reduce(distances.new_zeros(len(middles)).index_add_(0, assignments, distances), group)
        counts = all_reduce(assignments.bincount(minlength=len(middles)), group).to(sums)
        several = counts > 1
        phi = torch.where(several, sums / (counts * (counts + smoothing).log()).clamp_min(1e-12), 0.0)
        phi = torch.where(several, phi, phi.max())
        phi = phi.clamp(phi.quantile(0.1), phi.quantile(0.9))
        mean = phi.mean()
        phi = torch.where(mean > 0, temperature * phi / mean, temperature)
        return phi.clamp_min(temperature / 10).to(rows.dtype)


def proto_nce(
    query: Tensor,
    prototypes: Sequence[Tensor],
    concentrations: Sequence[Tensor],
    assignments: Sequence[Tensor],
    *,
    repeats: bool = True,
    normalize: bool = True,
    group: dist.ProcessGroup | None = None,
    tile_size: int | None = None,
) -> Tensor:
    """The prototype term of ProtoNCE, averaged over clusterings.

    For one clustering, the mean over rows of -log(exp(q c_s / phi_s) / sum_j exp(q c_j / phi_j)), s the row's
    cluster; PCL adds `info_nce`. The sum runs over all prototypes, where the official code samples 16384. No gradient
    flows into prototypes and concentrations.

    Args:
        query: `[N, D]` of this rank.
        prototypes: of each clustering `[K, D]`, of unit length, equal on every rank; K may differ.
        concentrations: `[K]` of each clustering, > 0 (`concentration`).
        assignments: int64 `[N]` of each clustering: the prototype of each row.
        repeats: as in the official code, count a prototype once for every row of the batch (of all ranks) assigned to
            it, at least once. False counts each once, as in the paper.
        normalize: divide the queries by their Euclidean norm first.
        group: process group; `None` is the default group when initialised, else this process alone.
        tile_size: rows and columns of a tile; `None` chooses. It changes time and memory, not the result.

    Returns:
        A scalar, the same on every rank.

    Raises:
        ValueError: no clustering, mismatched shapes or numbers, an empty batch, or a tile size below one.
        RuntimeError: a second derivative is requested.

    Reference:
        Li et al., 2021, "Prototypical Contrastive Learning of Unsupervised Representations", equation 11
        (https://arxiv.org/abs/2005.04966).

    Example:
        >>> away = torch.tensor([[0.0, 0.0, 1.0]])  # equally far from all of the four prototypes
        >>> flat = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
        >>> round(proto_nce(away, [flat], [torch.ones(4)], [torch.tensor([2])]).exp().item(), 4)
        4.0
    """
    if query.ndim != 2 or len(query) == 0:
        raise ValueError(f"query must be [N, D] with N > 0, got {list(query.shape)}")
    if not len(prototypes) == len(concentrations) == len(assignments) > 0:
        raise ValueError(
            f"{len(prototypes)} sets of prototypes, {len(concentrations)} of concentrations and {len(assignments)} of "
            "assignments: give as many of each, at least one"
        )
    size = choose_tile(tile_size, query.device)
    with full_fp32(query.device):
        query = at_least_fp32(query, *prototypes)[0]
        rows = F.normalize(query, dim=-1) if normalize else query
        total = sum(row_counts(rows, group))
        parts = [
            _one_clustering(rows, *found, repeats=repeats, size=size, group=group)
            for found in zip(prototypes, concentrations, assignments, strict=True)
        ]
        return sum_over_ranks(torch.stack(parts).sum(), group) / (total * len(parts))


def _one_clustering(
    rows: Tensor,
    prototypes: Tensor,
    phi: Tensor,
    assigned: Tensor,
    *,
    repeats: bool,
    size: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Sum over this rank's rows of log sum_j exp(z_j) - z_s."""
    k = len(prototypes)
    if prototypes.shape != (k, rows.shape[1]) or k == 0 or phi.shape != (k,) or assigned.shape != rows.shape[:1]:
        raise ValueError(
            f"prototypes must be [K, {rows.shape[1]}] with K > 0, concentrations [K] and assignments "
            f"[{len(rows)}], got {list(prototypes.shape)}, {list(phi.shape)} and {list(assigned.shape)}"
        )
    scaled = prototypes.detach().to(rows) / phi.detach().to(rows)[:, None]
    own = (rows * scaled[assigned]).sum()
    if repeats:
        # One more column, against a one in every row, adds the logarithm of a prototype's count. Counted without
        # bincount, which reads the largest number back from the device.
        counts = rows.new_zeros(k).index_add(0, assigned, rows.new_ones(len(rows)))
        counts = all_reduce(counts, group).clamp_min(1)
        scaled = torch.cat([scaled, counts.log()[:, None]], dim=1)
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    columns = Columns([k], group, "shared")
    plan = Plan(columns, Grid(len(rows), columns.blocks, size), by_column=False)
    among, _ = softmax_losses(rows, scaled, rows.new_ones(()), plan)
    return among.sum() - own
