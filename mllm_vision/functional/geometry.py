"""How embeddings fill their space: rank, spectrum, alignment, uniformity.

They detect collapse without labels. Unless documented otherwise, functions accept features `[N, D]`, compute in
float64 (spectra of nearly collapsed features need it) and return 0-d tensors.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_vision.functional.precision import full_fp32, wide_dtype

STRIP = 2**21  # distances in memory at a time


def spectrum(features: Tensor, *, center: bool = True) -> Tensor:
    """Eigenvalues of the covariance of the features, in descending order.

    Args:
        features: `[N, D]`, N >= 2.
        center: subtract the mean row first; otherwise the eigenvalues of the second moment.

    Returns:
        `[min(N, D)]` float64, biased (divided by N), not negative.

    Raises:
        ValueError: not `[N, D]`, or fewer than two rows.

    Example:
        >>> [round(value, 3) for value in spectrum(torch.tensor([[3.0, 1.0], [-3.0, 1.0]])).tolist()]
        [9.0, 0.0]
    """
    return _singular_values(features, center).square() / len(features)


def effective_rank(features: Tensor, *, center: bool = True) -> Tensor:
    """Exponential of the entropy of the normalised singular values: between 1 and min(N, D).

    With `center`, constant features give 0.

    Args:
        features: `[N, D]`, N >= 2.
        center: subtract the mean row first, so that a common offset does not count as a direction.

    Raises:
        ValueError: not `[N, D]`, or fewer than two rows.

    Reference:
        Roy and Vetterli, 2007, "The effective rank: a measure of effective dimensionality", equations 3-5.

    Example:
        >>> square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> round(effective_rank(square).item(), 3)
        2.0
    """
    values = _singular_values(features, center)
    if values[0] <= torch.finfo(values.dtype).eps * max(1.0, features.detach().abs().max().item()):
        return values.new_zeros(())
    shares = values / values.sum()
    return torch.exp(torch.special.entr(shares).sum())


def rankme(features: Tensor, *, epsilon: float = 1e-7) -> Tensor:
    """RankMe: effective rank of the uncentred features with the paper's epsilon added to each share.

    Args:
        features: `[N, D]`, N >= 2; the paper uses 25,600 rows.
        epsilon: added to every normalised singular value.

    Raises:
        ValueError: not `[N, D]`, or fewer than two rows.

    Reference:
        Garrido et al., 2023, "RankMe: Assessing the downstream performance of pretrained self-supervised
        representations by their rank", equations 1-2 (https://arxiv.org/abs/2210.02885).

    Example:
        >>> round(rankme(torch.eye(3).repeat(4, 1)).item(), 3)
        3.0
    """
    values = _singular_values(features, center=False)
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + epsilon
    return torch.exp(-(shares * shares.log()).sum())


def alpha_req(features: Tensor, *, first: int = 1, last: int | None = None) -> Tensor:
    """Decay exponent of the covariance spectrum: alpha in eigenvalue_i ~ i ** -alpha.

    Least squares of log eigenvalue on log index, over the indices `first` to `last` (from 1, inclusive).
    In the paper, good features have an alpha near 1; a large alpha means that few directions are used.

    Args:
        features: `[N, D]`, N >= 2.
        first: first index of the fit.
        last: last index of the fit; by default all eigenvalues above rounding.

    Raises:
        ValueError: not `[N, D]`, fewer than two rows, or fewer than two eigenvalues left for the fit.

    Reference:
        Agrawal et al., 2022, "alpha-ReQ: Assessing representation quality in self-supervised learning by
        measuring eigenspectrum decay" (https://openreview.net/forum?id=ii9X4vtZGTZ), section 3.

    Example:
        >>> axes = torch.diag(torch.tensor([1.0, 2**-0.5, 3**-0.5]))  # variances 1, 1/2 and 1/3
        >>> round(alpha_req(torch.cat([axes, -axes])).item(), 3)
        1.0
    """
    values = spectrum(features)
    floor = values[0] * torch.finfo(values.dtype).eps * max(features.shape)
    usable = int((values > floor).sum())
    last = usable if last is None else min(last, usable)
    if last - first < 1:
        raise ValueError(
            f"alpha_req needs at least two eigenvalues above rounding between index {first} and {last}; the "
            f"features have {usable} such eigenvalues (collapsed, or too few rows)"
        )
    x = torch.arange(first, last + 1, dtype=values.dtype, device=values.device).log()
    y = values[first - 1 : last].log()
    x, y = x - x.mean(), y - y.mean()
    return -(x * y).sum() / x.square().sum()


def alignment(x: Tensor, y: Tensor, *, alpha: float = 2.0, normalize: bool = True) -> Tensor:
    """Mean distance of positive pairs to the power `alpha`: 0 when pairs coincide, at most 2 ** alpha.

    Args:
        x: `[N, D]`.
        y: `[N, D]`; row i is the positive of x's row i.
        normalize: put the rows on the unit sphere first.

    Raises:
        ValueError: mismatched shapes.

    Reference:
        Wang and Isola, 2020, "Understanding Contrastive Representation Learning through Alignment and
        Uniformity on the Hypersphere", section 4.1.1 (https://arxiv.org/abs/2005.10242).

    Example:
        >>> round(alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]])).item(), 3)
        2.0
    """
    if x.ndim != 2 or x.shape != y.shape:
        raise ValueError(f"alignment: x and y must both be [N, D], got {list(x.shape)} and {list(y.shape)}")
    x, y = x.to(wide_dtype(x)), y.to(wide_dtype(y))
    if normalize:
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    return (x - y).norm(dim=1).pow(alpha).mean()


def uniformity(x: Tensor, *, t: float = 2.0, normalize: bool = True) -> Tensor:
    """Log of the mean Gaussian potential over all pairs of rows: 0 when collapsed, lower is more uniform.

    Args:
        x: `[N, D]`, N >= 2.
        t: the kernel's sharpness.
        normalize: put the rows on the unit sphere first.

    Raises:
        ValueError: not `[N, D]`, or fewer than two rows.

    Reference:
        Wang and Isola, 2020, section 4.1.2 (https://arxiv.org/abs/2005.10242).

    Example:
        >>> round(uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).item(), 3)
        -8.0
    """
    _check(x)
    x = x.to(wide_dtype(x))
    if normalize:
        x = F.normalize(x, dim=-1)
    parts, size = [], max(1, STRIP // len(x))
    for begin in range(0, len(x), size):  # strips, because 25,600 rows have 330 million pairs
        rows = x[begin : begin + size]
        # by differences, because products lose the distance of rows that nearly coincide
        distances = torch.cdist(rows, x[begin:], compute_mode="donot_use_mm_for_euclid_dist").square()
        pairs = torch.ones_like(distances, dtype=torch.bool).triu(1)
        parts.append((-t * distances).masked_fill(~pairs, -torch.inf).flatten().logsumexp(0))
    return torch.stack(parts).logsumexp(0) - math.log(len(x) * (len(x) - 1) / 2)


def spread(features: Tensor) -> Tensor:
    """Root mean squared distance of the unit vectors from their mean: 1 evenly on the sphere, 0 when collapsed.

    Its square is one minus the mean cosine of two different rows. In fp32 and time N D, cheap enough for every step.

    Args:
        features: `[N, D]`; a single row gives nan.

    Example:
        >>> round(spread(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).item(), 3)  # a cosine of zero
        1.0
    """
    unit = F.normalize(features.float(), dim=-1)
    return (unit - unit.mean(dim=0)).square().sum().div(len(unit) - 1).sqrt()


def participation_ratio(features: Tensor) -> Tensor:
    """Participation ratio of the unit vectors' covariance: (sum of eigenvalues)^2 / sum of their squares.

    Between 1 (all on a line) and min(N - 1, D); 0 without variance. Computed from the smaller Gram matrix, cheap enough
    for every step on a few hundred rows. In fp32, also under autocast.

    Args:
        features: `[N, D]`.

    Reference:
        Gao et al., 2017, "A theory of multineuronal dimensionality, dynamics and measurement", equation 4
        (https://doi.org/10.1101/214262).

    Example:
        >>> round(participation_ratio(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])).item(), 3)
        2.0
    """
    with full_fp32(features.device):  # objectives call it inside a forward pass
        unit = F.normalize(features.float(), dim=-1)
        centred = unit - unit.mean(dim=0)
        gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
        total = gram.diagonal().sum()
        varies = total > 1e-10 * len(features)  # less is rounding
        return torch.where(varies, total.square() / gram.square().sum().clamp_min(torch.finfo(gram.dtype).tiny), 0.0)


def _check(features: Tensor) -> None:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be [N, D] with N >= 2, got {list(features.shape)}")


def _singular_values(features: Tensor, center: bool) -> Tensor:
    _check(features)
    features = features.detach().to(wide_dtype(features))
    if center:
        features = features - features.mean(dim=0, keepdim=True)
    return torch.linalg.svdvals(features)
