"""Redundancy-reduction losses: Barlow Twins and VICReg.

They need no negatives: every dimension must vary, uncorrelated with the others. Statistics are those of the batch of
all ranks (which may hold different numbers of rows), with the whole batch's gradient after DistributedDataParallel
averages over ranks.

Both need the sum of the squared off-diagonal entries of a D x D matrix A^T B of N rows. Over all entries that equals
the sum over pairs of rows of <a_i, a_j><b_i, b_j>, which is computed instead where N is at most half of D (projectors
are up to 8192 wide). Both forms run strip by strip; neither matrix is materialised.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from mllm_vision.distributed import all_gather, all_reduce, row_counts, sum_over_ranks, world_size
from mllm_vision.functional.checks import check_rows
from mllm_vision.functional.precision import at_least_fp32, full_fp32, wide_dtype

__all__ = ["VICRegTerms", "barlow_twins", "covariance_term", "invariance_term", "variance_term", "vicreg"]

STRIP = 2**22  # products in memory at a time: strips of dimensions or rows by all of them


def barlow_twins(
    z1: Tensor, z2: Tensor, *, lambd: float = 0.0051, eps: float = 1e-5, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Barlow Twins: drives the cross-correlation matrix of two views' embeddings to the identity.

    sum_i (1 - C_ii)^2 + lambd * sum_{i != j} C_ij^2, C the correlation of dimension i of the first view with
    dimension j of the second, both standardised over the batch of all ranks with the biased variance (plus `eps`, as
    in the official code's BatchNorm).

    Args:
        z1: `[N, D]` projections of the first view of this rank's samples.
        z2: `[N, D]` of the second view, in the same order.
        lambd: weight of the off-diagonal terms.
        eps: added to the variances; a constant dimension then has correlation 0, not nan.
        group: process group; `None` is the default group when initialised, else this process alone.

    Returns:
        A scalar, the same on every rank. Collapsed embeddings give D.

    Raises:
        ValueError: mismatched shapes, fewer than two rows over all ranks, a negative `lambd` or `eps`.
        RuntimeError: a second derivative is requested.

    Reference:
        Zbontar et al., 2021, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", equations 1 and 2
        (https://arxiv.org/abs/2103.03230).

    Example:
        >>> z = torch.randn(64, 4)
        >>> bool((barlow_twins(z, z) - barlow_twins(z, 2 * z + 4)).abs() < 1e-4)
        True
    """
    if lambd < 0:
        raise ValueError(f"lambd={lambd} must not be negative (0.0051 in the paper)")
    with full_fp32(z1.device):
        a, b, total = _standardised(z1, z2, eps, group)
        diagonal = sum_over_ranks((a * b).sum(0), group) / total
        redundant = _squares_off_diagonal(a, b, diagonal * total, total, group) / total**2
        return (1 - diagonal).square().sum() + lambd * redundant


class VICRegTerms(NamedTuple):
    """The three terms of `vicreg`, without their weights; scalars."""

    invariance: Tensor
    variance: Tensor
    covariance: Tensor


@overload
def vicreg(
    z1: Tensor,
    z2: Tensor,
    *,
    invariance: float = ...,
    variance: float = ...,
    covariance: float = ...,
    eps: float = ...,
    group: dist.ProcessGroup | None = ...,
    return_terms: Literal[False] = ...,
) -> Tensor: ...


@overload
def vicreg(
    z1: Tensor,
    z2: Tensor,
    *,
    invariance: float = ...,
    variance: float = ...,
    covariance: float = ...,
    eps: float = ...,
    group: dist.ProcessGroup | None = ...,
    return_terms: Literal[True],
) -> tuple[Tensor, VICRegTerms]: ...


def vicreg(
    z1: Tensor,
    z2: Tensor,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    eps: float = 1e-4,
    group: dist.ProcessGroup | None = None,
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, VICRegTerms]:
    """VICReg: invariance between views, variance of every dimension, decorrelation of dimensions.

    `invariance` * s(z1, z2) + `variance` * (v(z1) + v(z2)) / 2 + `covariance` * (c(z1) + c(z2)), with the terms of
    `invariance_term`, `variance_term` and `covariance_term`. As in the official code, the variance is averaged over
    the two branches and the covariance is summed.

    Args:
        z1: `[N, D]` embeddings of the first view of this rank's samples; not normalised.
        z2: `[N, D]` of the second view, in the same order. The branches may be different networks.
        invariance: weight of the first term.
        variance: weight of the second.
        covariance: weight of the third.
        eps: added to the variances under the root.
        group: process group; `None` is the default group when initialised, else this process alone.
        return_terms: also return the three terms without their weights.

    Returns:
        A scalar, the same on every rank; with `return_terms` the scalar and a `VICRegTerms`. Collapsed embeddings give
        `variance` * (1 - sqrt(eps)).

    Raises:
        ValueError: mismatched shapes, fewer than two rows over all ranks, `eps` not positive.
        RuntimeError: a second derivative is requested.

    Reference:
        Bardes et al., 2022, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
        equation 6 and algorithm 1 (https://arxiv.org/abs/2105.04906).

    Example:
        >>> same = torch.ones(8, 4)
        >>> round(vicreg(same, same).item(), 4)
        24.75
    """
    terms = VICRegTerms(
        invariance_term(z1, z2, group=group),
        (variance_term(z1, eps=eps, group=group) + variance_term(z2, eps=eps, group=group)) / 2,
        covariance_term(z1, group=group) + covariance_term(z2, group=group),
    )
    loss = invariance * terms.invariance + variance * terms.variance + covariance * terms.covariance
    return (loss, terms) if return_terms else loss


def invariance_term(z1: Tensor, z2: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Mean over rows and dimensions of (z1 - z2)^2.

    Args:
        z1: `[N, D]`.
        z2: `[N, D]`.
        group: as in `vicreg`.

    Returns:
        A scalar. The paper divides by N, its official code by N D, as here.

    Raises:
        ValueError: mismatched shapes, an empty batch.

    Reference:
        Bardes et al., 2022, equation 5 (https://arxiv.org/abs/2105.04906).

    Example:
        >>> invariance_term(torch.zeros(2, 3), torch.ones(2, 3)).item()
        1.0
    """
    check_rows(z1=z1, z2=z2)
    with full_fp32(z1.device):
        z1, z2 = at_least_fp32(z1, z2)
        elements = sum(row_counts(z1, group)) * z1.shape[1]
        return sum_over_ranks((z1 - z2).square().sum(), group) / elements


def variance_term(
    z: Tensor, *, gamma: float = 1.0, eps: float = 1e-4, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Mean over dimensions of max(0, gamma - sqrt(Var + eps)), Var the unbiased variance over the batch.

    Args:
        z: `[N, D]` of this rank.
        gamma: standard deviation that every dimension should reach.
        eps: keeps the gradient of the root finite for a constant dimension.
        group: as in `vicreg`.

    Raises:
        ValueError: not `[N, D]`, fewer than two rows over all ranks, `eps` not positive.

    Reference:
        Bardes et al., 2022, equations 1 and 2 (https://arxiv.org/abs/2105.04906).

    Example:
        >>> round(variance_term(torch.tensor([[0.0, 0.0], [0.0, 9.0]]), eps=1e-4).item(), 3)  # the second is wide
        0.495
    """
    check_rows(z=z)
    if not eps > 0:
        raise ValueError(f"eps={eps} must be positive: the root's gradient at a variance of zero is infinite")
    with full_fp32(z.device):
        centred, total = _centred(z, group)
        deviation = (sum_over_ranks(centred.square().sum(0), group) / (total - 1) + eps).sqrt()
        return (gamma - deviation).clamp_min(0).mean()


def covariance_term(z: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum of the squared off-diagonal entries of the covariance matrix, divided by D.

    Args:
        z: `[N, D]` of this rank.
        group: as in `vicreg`.

    Raises:
        ValueError: not `[N, D]`, fewer than two rows over all ranks.
        RuntimeError: a second derivative is requested.

    Reference:
        Bardes et al., 2022, equations 3 and 4 (https://arxiv.org/abs/2105.04906).

    Example:
        >>> covariance_term(torch.tensor([[1.0, 1.0], [-1.0, -1.0]])).item()  # two times 2^2, over D = 2
        4.0
    """
    check_rows(z=z)
    with full_fp32(z.device):
        centred, total = _centred(z, group)
        variance = sum_over_ranks(centred.square().sum(0), group)
        return _squares_off_diagonal(centred, centred, variance, total, group) / ((total - 1) ** 2 * z.shape[1])


def _centred(z: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """Rows minus the mean over all ranks, in fp32 at least, and the number of rows of all ranks."""
    (z,) = at_least_fp32(z)
    total = sum(row_counts(z, group))
    if total < 2:
        raise ValueError(
            f"variances over a batch of {total} row are undefined; use at least two rows "
            "(per_device_train_batch_size times processes)"
        )
    return z - sum_over_ranks(z.sum(0), group) / total, total


def _standardised(z1: Tensor, z2: Tensor, eps: float, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, int]:
    check_rows(z1=z1, z2=z2)
    if eps < 0:
        raise ValueError(f"eps={eps} must not be negative (1e-5 in the official code's BatchNorm)")
    z1, z2 = at_least_fp32(z1, z2)
    both, total = _centred(torch.cat([z1, z2], dim=1), group)
    both = both * (sum_over_ranks(both.square().sum(0), group) / total + eps).rsqrt()
    a, b = both.chunk(2, dim=1)
    return a, b, total


def _squares_off_diagonal(
    a: Tensor, b: Tensor, diagonal: Tensor, total: int, group: dist.ProcessGroup | None
) -> Tensor:
    """Sum of the squared off-diagonal entries of A^T B, A and B the rows of all ranks: by dimensions, or by rows."""
    other = None if b is a else b  # torch.compile does not accept the same tensor twice
    if 2 * total > a.shape[1]:  # with more rows, subtracting the diagonal would cancel and save nothing
        return _Squares.apply(a, other, True, group)
    return _Squares.apply(a, other, False, group) - diagonal.square().sum()


class _Squares(torch.autograd.Function):
    """Sum of the squares of A^T B, by dimensions (without its diagonal) or by rows, strip by strip.

    The gradient is computed in the forward pass, so that the backward pass needs neither a matrix nor a collective.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor | None, by_dimension: bool, group: dist.ProcessGroup | None) -> Tensor:
        b = a if b is None else b
        total, for_a, for_b = (_by_dimension if by_dimension else _by_row)(a, b, any(ctx.needs_input_grad), group)
        # DistributedDataParallel averages over ranks, so a rank's share is multiplied by their number. For b = a the
        # two halves of the gradient are equal.
        factor = (4 if b is a else 2) * world_size(group)
        ctx.save_for_backward(for_a.mul_(factor), for_b if for_b is None else for_b.mul_(factor))
        return total.to(a.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "barlow_twins and vicreg have no second derivative; call backward without create_graph=True"
            )
        for_a, for_b = ctx.saved_tensors
        return for_a * upstream, for_b if for_b is None else for_b * upstream, None, None


def _by_dimension(
    a: Tensor, b: Tensor, needed: bool, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sum of squares off the diagonal, and half of its gradient where `needed`."""
    for_a, for_b = torch.zeros_like(a), None if b is a else torch.zeros_like(b)
    total, width = a.new_zeros((), dtype=wide_dtype(a)), a.shape[1]
    size = max(1, STRIP // width)
    for start in range(0, width, size):
        part = a[:, start : start + size]
        strip = all_reduce(part.T @ b, group)
        strip.diagonal(start).zero_()
        total += strip.square().sum(dtype=total.dtype)
        if needed:
            for_a[:, start : start + size] = b @ strip.T
            if for_b is not None:
                for_b.addmm_(part, strip)
    return total, for_a, for_b


def _by_row(
    a: Tensor, b: Tensor, needed: bool, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sum of squares, diagonal included, and half of its gradient where `needed`."""
    for_a, for_b = torch.zeros_like(a), None if b is a else torch.zeros_like(b)
    sizes = row_counts(a, group)
    every_a = all_gather(a, group, sizes)
    every_b = every_a if b is a else all_gather(b, group, sizes)
    total = a.new_zeros((), dtype=wide_dtype(a))
    size = max(1, STRIP // len(every_a))
    for start in range(0, len(a), size):
        rows = slice(start, start + size)
        first = a[rows] @ every_a.T
        second = first if b is a else b[rows] @ every_b.T
        total += (first * second).sum(dtype=total.dtype)
        if needed:
            torch.mm(second, every_a, out=for_a[rows])
            if for_b is not None:
                torch.mm(first, every_b, out=for_b[rows])
    return all_reduce(total, group), for_a, for_b
