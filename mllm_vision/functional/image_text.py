"""Image-text contrastive losses over the whole batch, on one process or many, tile by tile.

Both losses accept raw or normalised features and *relations*, which say which pairs besides the diagonal are
positives. They compute in fp32 also under autocast (float64 inputs stay float64). The matrix of all pairs is never
materialised (docs/engine.md). On several ranks, every rank computes its own rows against all columns and returns the
loss of the whole batch; after DistributedDataParallel averages over ranks, every parameter has the whole batch's
gradient.
"""

from __future__ import annotations

import torch  # noqa: F401  (for the examples)
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mllm_vision.distributed import Columns, row_counts, sum_over_ranks
from mllm_vision.functional.checks import check_rows
from mllm_vision.functional.engine.plan import Plan
from mllm_vision.functional.engine.sigmoid import sigmoid_losses
from mllm_vision.functional.engine.softmax import softmax_losses
from mllm_vision.functional.engine.targets import Relations, find_targets, related
from mllm_vision.functional.engine.tiles import Grid, choose_tile, first_row
from mllm_vision.functional.precision import at_least_fp32, full_fp32, full_precision

__all__ = ["clip_loss", "related", "siglip_loss"]


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    normalize: bool = True,
    relations: Relations = None,
    group: dist.ProcessGroup | None = None,
    tile_size: int | None = None,
    exchange: str = "gather",
) -> Tensor:
    """Symmetric softmax cross-entropy between images and texts.

    With z = scale * <image_i, text_j> and a target q_ij, the loss is the mean over rows of
    -sum_j q_ij log softmax_j(z_ij), averaged with the same over columns. Without `relations` q is the
    identity; otherwise q is the relation matrix divided by its row sums (images) and, for the other
    direction, its transpose divided by its own row sums (texts).

    Args:
        image: `[N, D]` image features of this rank.
        text: `[N, D]` text features of this rank; row i belongs to image i.
        logit_scale: the scale itself (1 / temperature), already exponentiated; a 0-d tensor or a float.
        normalize: divide the rows by their Euclidean norm first.
        relations: `None`; integer ids `[N]` or `[N, K]` of this rank's rows, where two rows are positives of
            one another when any of their K ids agree; a bool or float matrix `[N, total N]` in [0, 1], dense or
            sparse, whose row i says which texts (of all ranks, in rank order) are positives of image i; or a
            callable `(rows, columns) -> [r, c]` that gives the same matrix tile by tile, with slices over the
            rows of all ranks. No gradient flows into them.
        group: process group; `None` is the default group when initialised, else this process alone.
        tile_size: rows and columns of a tile; `None` chooses. It changes time and memory, not the result.
        exchange: how texts reach the other ranks: `"gather"` (every rank holds all of them) or `"ring"` (they are
            passed from rank to rank, and no rank holds more than a few ranks' texts). Same result.

    Returns:
        A scalar, the same on every rank.

    Raises:
        ValueError: mismatched shapes, an empty batch, a relation matrix with a row or column of zeros, a tile
            size below one, an unknown exchange.
        RuntimeError: a second derivative is requested.

    Reference:
        Radford et al., 2021, "Learning Transferable Visual Models From Natural Language Supervision",
        figure 3 (https://arxiv.org/abs/2103.00020); several positives in a row as in Khosla et al., 2020,
        equation 2 (https://arxiv.org/abs/2004.11362).

    Example:
        >>> features = torch.eye(4)
        >>> bool(clip_loss(features, features, 0.0) - torch.log(torch.tensor(4.0)) < 1e-6)
        True
    """
    with full_fp32(image.device):
        image, text, plan = _prepare(image, text, normalize, relations, group, tile_size, exchange)
        by_image, by_text = softmax_losses(image, text, full_precision(logit_scale, image), plan)
        return sum_over_ranks(by_image.sum() + by_text.sum(), group) / (2 * plan.total)


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    normalize: bool = True,
    relations: Relations = None,
    group: dist.ProcessGroup | None = None,
    tile_size: int | None = None,
    exchange: str = "gather",
) -> Tensor:
    """Pairwise sigmoid loss: every image-text pair is an independent binary classification.

    The sum over all pairs of -log sigmoid(y_ij (scale * <image_i, text_j> + bias)), divided by the number
    of images, y = +1 for positives and -1 elsewhere. A soft relation r in [0, 1] weights both classes:
    -r log sigmoid(z) - (1 - r) log sigmoid(-z).

    Args:
        image: `[N, D]` image features of this rank.
        text: `[N, D]` text features of this rank; row i belongs to image i.
        logit_scale: the scale itself (t, already exponentiated); a 0-d tensor or a float.
        logit_bias: b; a 0-d tensor or a float.
        normalize: divide the rows by their Euclidean norm first.
        relations: as in `clip_loss`.
        group: as in `clip_loss`.
        tile_size: as in `clip_loss`.
        exchange: as in `clip_loss`.

    Returns:
        A scalar, the same on every rank.

    Raises:
        ValueError: mismatched shapes, an empty batch, a tile size below one, an unknown exchange.
        RuntimeError: a second derivative is requested.

    Reference:
        Zhai et al., 2023, "Sigmoid Loss for Language Image Pre-Training", equation 1 and algorithm 1
        (https://arxiv.org/abs/2303.15343).

    Example:
        >>> features = torch.eye(2)
        >>> loss = siglip_loss(features, features, 0.0, 0.0)  # four pairs of ln 2, divided by two images
        >>> bool((loss - 2 * torch.log(torch.tensor(2.0))).abs() < 1e-6)
        True
    """
    with full_fp32(image.device):
        image, text, plan = _prepare(image, text, normalize, relations, group, tile_size, exchange)
        scale, bias = full_precision(logit_scale, image), full_precision(logit_bias, image)
        return sum_over_ranks(sigmoid_losses(image, text, scale, bias, plan), group) / plan.total


def _prepare(
    image: Tensor,
    text: Tensor,
    normalize: bool,
    relations: Relations,
    group: dist.ProcessGroup | None,
    tile_size: int | None,
    exchange: str,
) -> tuple[Tensor, Tensor, Plan]:
    """Checks and normalises the features; plans tiles, exchange and targets."""
    check_rows(image=image, text=text)
    size = choose_tile(tile_size, image.device, len(image))
    image, text = at_least_fp32(image, text)
    if normalize:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    sizes = row_counts(image, group)
    columns = Columns(sizes, group, exchange)
    grid = Grid(len(image), columns.blocks, size)
    targets = find_targets(relations, len(image), sizes, grid, image, group)
    return image, text, Plan(columns, grid, offset=first_row(sizes, group), targets=targets)
