"""Losses in which a student follows a teacher without negatives (cosine, DINO, iBOT), and KoLeo.

All compute in fp32 under autocast and return the loss of the batch of all ranks on every rank; after
DistributedDataParallel averages over ranks, gradients are those of the whole batch. No gradient flows into a teacher's
output.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mllm_vision.distributed import (
    all_gather,
    all_gather_with_grad,
    mean_over_rows,
    row_counts,
    sum_over_ranks,
    world_size,
)
from mllm_vision.functional.checks import check_positive, check_rows
from mllm_vision.functional.engine.tiles import choose_tile, first_row
from mllm_vision.functional.precision import at_least_fp32, full_fp32

__all__ = ["centred_softmax", "dino_loss", "ibot_loss", "koleo", "negative_cosine", "sinkhorn_knopp"]


def negative_cosine(
    p: Tensor, z: Tensor, *, stop_gradient: bool = True, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Minus the cosine of each prediction and its target, averaged over the rows.

    With d1 = negative_cosine(p1, z2) and d2 = negative_cosine(p2, z1), SimSiam's loss is (d1 + d2) / 2 and BYOL's is
    4 + 2 (d1 + d2), the sum of the squared distances 2 - 2 cos of unit vectors.

    Args:
        p: `[N, D]` predictions.
        z: `[N, D]` targets, in the same order.
        stop_gradient: treat z as a constant, as in both papers. Without it the loss has a collapsed solution.
        group: process group; `None` is the default group when initialised, else this process alone.

    Returns:
        A scalar between -1 and 1, the same on every rank.

    Raises:
        ValueError: mismatched shapes, or no rows.

    Reference:
        Grill et al., 2020, "Bootstrap Your Own Latent", equation 2 (https://arxiv.org/abs/2006.07733); Chen and He,
        2021, "Exploring Simple Siamese Representation Learning", equations 1-4 (https://arxiv.org/abs/2011.10566).

    Example:
        >>> p = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> negative_cosine(p, torch.tensor([[3.0, 0.0], [0.0, -1.0]])).item()
        0.0
    """
    check_rows(p=p, z=z)
    with full_fp32(p.device):
        p, z = at_least_fp32(p, z.detach() if stop_gradient else z)
        return mean_over_rows(-(F.normalize(p, dim=-1) * F.normalize(z, dim=-1)).sum(-1), group)


def centred_softmax(logits: Tensor, centre: Tensor, *, temperature: float) -> Tensor:
    """Centred and sharpened teacher probabilities, softmax((logits - centre) / temperature), without gradient.

    Centering, by a moving average of the teacher's logits, keeps one output from dominating; sharpening, by a
    temperature below the student's, keeps the outputs from becoming uniform. Either alone collapses.

    Args:
        logits: `[..., K]` of the teacher's head.
        centre: `[K]`.
        temperature: the teacher's, > 0; 0.04 to 0.07 in the paper.

    Returns:
        `[..., K]` probabilities, in fp32 or better.

    Raises:
        ValueError: a temperature that is not positive, or a centre of a different width.

    Reference:
        Caron et al., 2021, "Emerging Properties in Self-Supervised Vision Transformers", equations 1 and 4
        (https://arxiv.org/abs/2104.14294).

    Example:
        >>> centred_softmax(torch.tensor([[5.0, 1.0]]), torch.tensor([5.0, 1.0]), temperature=0.04).tolist()
        [[0.5, 0.5]]
    """
    check_positive(temperature=temperature)
    if centre.shape != logits.shape[-1:]:
        raise ValueError(f"centre must be [{logits.shape[-1]}] for logits {list(logits.shape)}, got {[*centre.shape]}")
    with full_fp32(logits.device):
        values, middle = at_least_fp32(logits.detach(), centre.detach())
        return ((values - middle) / temperature).softmax(-1)


def sinkhorn_knopp(
    logits: Tensor,
    *,
    temperature: float,
    iterations: int = 3,
    counted: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Probabilities that use every output equally over the batch of all ranks, without gradient.

    Columns (outputs) and rows (samples) of exp(logits / temperature) are alternately divided by their sums, ending
    with the rows. Computed in logarithms, so that no temperature overflows.

    Args:
        logits: `[N, K]` of the teacher's head on this rank; ranks may hold different N, also none.
        temperature: > 0.
        iterations: of both divisions; at least one.
        counted: bool `[N]`, False for padding: these rows are ignored, and their output is undefined. Padding to a
            fixed size avoids reading a number of rows back from the device.
        group: process group; `None` is the default group when initialised, else this process alone.

    Returns:
        `[N, K]` probabilities, in fp32 or better: rows sum to one, columns nearly to N / K.

    Raises:
        ValueError: not `[N, K]`, a temperature that is not positive, or no iteration.

    Reference:
        Caron et al., 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", equation 3
        and appendix A (https://arxiv.org/abs/2006.09882); DINO's teacher in Oquab et al., 2023, "DINOv2", section 4
        (https://arxiv.org/abs/2304.07193).

    Example:
        >>> same = torch.tensor([[9.0, 0.0], [9.0, 0.0]])  # one output dominates
        >>> sinkhorn_knopp(same, temperature=0.1).tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    check_positive(temperature=temperature)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [N, K] with K > 0, got {list(logits.shape)}")
    if counted is not None and (counted.shape != logits.shape[:1] or counted.dtype != torch.bool):
        raise ValueError(f"counted must be bool [{len(logits)}], got {counted.dtype} {list(counted.shape)}")
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be at least 1; the papers use 3")
    with full_fp32(logits.device):
        (scores,) = at_least_fp32(logits.detach())
        scores = scores / temperature
        for _ in range(iterations):
            present = scores if counted is None else scores.masked_fill(~counted[:, None], -torch.inf)
            over_samples = all_gather(present.logsumexp(0, keepdim=True), group, [1] * world_size(group)).logsumexp(0)
            if counted is not None:  # without any row the sums are -inf
                over_samples = over_samples.clamp_min(torch.finfo(scores.dtype).min)
            scores = scores - over_samples
            scores = scores - scores.logsumexp(1, keepdim=True)
        return scores.exp()


def dino_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 0.1, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Cross-entropy between the teacher's probabilities for one view and the student's for another.

    Averaged over samples and over the G (V - 1) ordered pairs (teacher's view, student's view) of different views.

    Args:
        student: `[N, V, K]` logits; the first G views are those of the teacher, in the same order.
        teacher: `[N, G, K]` probabilities (`centred_softmax`, `sinkhorn_knopp`), G <= V.
        temperature: the student's, > 0.
        group: process group; `None` is the default group when initialised, else this process alone.

    Returns:
        A scalar, the same on every rank: ln K where student and teacher are uniform.

    Raises:
        ValueError: mismatched shapes, no rows, a single view, or a temperature that is not positive.

    Reference:
        Caron et al., 2021, "Emerging Properties in Self-Supervised Vision Transformers", equations 2 and 3 and
        algorithm 1 (https://arxiv.org/abs/2104.14294).

    Example:
        >>> uniform = torch.full((3, 2, 8), 1 / 8)
        >>> round(dino_loss(torch.zeros(3, 4, 8), uniform).exp().item(), 4)
        8.0
    """
    check_positive(temperature=temperature)
    fits = student.ndim == teacher.ndim == 3 and student.shape[::2] == teacher.shape[::2] and len(student) > 0
    if not fits or not 1 <= teacher.shape[1] <= student.shape[1]:
        raise ValueError(
            f"student must be [N, V, K] and teacher [N, G, K] with N > 0 and G <= V, got {list(student.shape)} and "
            f"{list(teacher.shape)}"
        )
    views, seen = student.shape[1], teacher.shape[1]
    if views < 2:
        raise ValueError(f"student has {views} view of each sample, but a view is not compared with itself; give two")
    with full_fp32(student.device):
        student, teacher = at_least_fp32(student, teacher.detach())
        log_p = (student / temperature).log_softmax(-1)
        # The sum over all pairs is one product of two sums: G V passes over [N, K] become G + V.
        every = (teacher.sum(1) * log_p.sum(1)).sum(-1)
        same = (teacher * log_p[:, :seen]).sum((1, 2))
        return mean_over_rows((same - every) / (seen * (views - 1)), group)


def ibot_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    temperature: float = 0.1,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Cross-entropy at the masked patches of a view: the student sees the mask token there, the teacher the patch.

    Averaged over the masked patches of each view, then over all N views; a view without masked patches counts as
    zero, as in DINOv2's code.

    Args:
        student: logits, `[N, P, K]` of all patches, or `[M, K]` of the masked ones, in the order of `mask.nonzero()`
            (fewer, but their number is read back from the device).
        teacher: probabilities of the same patches, shaped as `student`.
        mask: bool `[N, P]`, True where the student's patch was masked.
        temperature: the student's, > 0.
        group: process group; `None` is the default group when initialised, else this process alone.

    Returns:
        A scalar, the same on every rank.

    Raises:
        ValueError: mismatched shapes, a mask that is not bool, or a temperature that is not positive.

    Reference:
        Zhou et al., 2022, "iBOT: Image BERT Pre-Training with Online Tokenizer", equation 2
        (https://arxiv.org/abs/2111.07832).

    Example:
        >>> mask = torch.tensor([[True, False, True], [False, True, False]])
        >>> uniform = torch.full((3, 8), 1 / 8)
        >>> round(ibot_loss(torch.zeros(3, 8), uniform, mask).exp().item(), 4)
        8.0
    """
    check_positive(temperature=temperature)
    if mask.ndim != 2 or mask.dtype != torch.bool or len(mask) == 0:
        raise ValueError(f"mask must be bool [N, P] with N > 0, got {mask.dtype} {list(mask.shape)}")
    listed = student.ndim == 2
    if student.shape != teacher.shape or student.shape[:-1] != ((int(mask.sum()),) if listed else mask.shape):
        raise ValueError(
            f"student and teacher must both be [{mask.shape[0]}, {mask.shape[1]}, K], or [{int(mask.sum())}, K] of the "
            f"masked patches, got {list(student.shape)} and {list(teacher.shape)}"
        )
    with full_fp32(student.device):
        student, teacher = at_least_fp32(student, teacher.detach())
        each = -(teacher * (student / temperature).log_softmax(-1)).sum(-1)
        if listed:
            each = each.new_zeros(mask.shape).masked_scatter(mask, each)
        return mean_over_rows(each.masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp_min(1), group)


def koleo(
    features: Tensor,
    *,
    eps: float = 1e-8,
    group: dist.ProcessGroup | None = None,
    tile_size: int | None = None,
) -> Tensor:
    """Kozachenko-Leonenko entropy estimator: pushes each feature away from its nearest neighbour.

    Mean of -ln(eps + |x_i - x_j + eps|) over the rows, x of unit length, x_j the nearest neighbour of x_i in the
    batch of all ranks. (DINOv2's code searches one device, so its loss depends on the number of devices.)

    Args:
        features: `[N, D]` of this rank; ranks may hold different N.
        eps: keeps the logarithm finite where two rows coincide.
        group: process group; `None` is the default group when initialised, else this process alone.
        tile_size: rows and columns of a tile of the search; `None` chooses. It changes memory, not the result.

    Returns:
        A scalar, the same on every rank: -ln 2 for an antipodal pair, -ln(2 eps) for a single one-dimensional row.

    Raises:
        ValueError: not `[N, D]`, no rows, or a tile size below one.

    Reference:
        Sablayrolles et al., 2019, "Spreading vectors for similarity search", equation 2
        (https://arxiv.org/abs/1806.03198); Oquab et al., 2023, "DINOv2", section 4.

    Example:
        >>> round(koleo(torch.tensor([[3.0, 0.0], [-1.0, 0.0]])).item(), 4)
        -0.6931
    """
    check_rows(features=features)
    size = choose_tile(tile_size, features.device)
    with full_fp32(features.device):
        (features,) = at_least_fp32(features)
        unit = F.normalize(features, dim=-1, eps=eps)
        sizes = row_counts(unit, group)
        everyone = all_gather_with_grad(unit, group, sizes)
        neighbours = _nearest(unit.detach(), everyone.detach(), first_row(sizes, group), size)
        apart = F.pairwise_distance(unit, everyone[neighbours], eps=eps)
        return sum_over_ranks(-(apart + eps).log().sum(), group) / sum(sizes)


def _nearest(rows: Tensor, columns: Tensor, offset: int, size: int) -> Tensor:
    """`[n]` index of each row's nearest column, itself (row + offset) excluded, tile by tile."""
    # The nearest column has the largest <x, y> - |y|^2 / 2. Centred, because the cosines of nearly collapsed rows are
    # equal up to rounding.
    middle = columns.mean(0)
    rows, columns = rows - middle, columns - middle
    halves = columns.square().sum(1) / 2
    found = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        own = torch.arange(start, start + len(part), device=rows.device) + offset
        best, at = part.new_full((len(part),), -torch.inf), own
        for left in range(0, len(columns), size):
            score = part @ columns[left : left + size].T - halves[left : left + size]
            itself = own[:, None] == torch.arange(left, left + score.shape[1], device=own.device)
            value, index = score.masked_fill_(itself, -torch.inf).max(1)
            at = torch.where(value > best, index + left, at)
            best = torch.maximum(value, best)
        found.append(at)
    return torch.cat(found)
