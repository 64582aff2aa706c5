"""Image-text contrastive losses over the whole batch, on one process or many.

Both losses take raw or normalised features, compute in fp32 also inside autocast (float64 inputs stay
float64), and take *relations*: which pairs besides the diagonal are positives. On several ranks the
features and the relations are gathered, every rank returns the loss of the whole batch, and after
DistributedDataParallel's mean over ranks every parameter has the whole batch's gradient.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mllm_vision.distributed import all_gather, all_gather_with_grad, row_counts, world_size


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    normalize: bool = True,
    relations: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
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
            one another when any of their K ids agree; or a bool or float matrix `[N, total N]` in [0, 1]
            whose row i says which texts (of all ranks, in rank order) are positives of image i.
        group: process group; `None` is the default group when initialised, else this process alone.

    Returns:
        A scalar, the same on every rank.

    Raises:
        ValueError: shapes that disagree, an empty batch, a relation matrix with a row or column of zeros.

    Reference:
        Radford et al., 2021, "Learning Transferable Visual Models From Natural Language Supervision",
        figure 3 (https://arxiv.org/abs/2103.00020); several positives in a row as in Khosla et al., 2020,
        equation 2 (https://arxiv.org/abs/2004.11362).

    Example:
        >>> features = torch.eye(4)
        >>> bool(clip_loss(features, features, 0.0) - torch.log(torch.tensor(4.0)) < 1e-6)
        True
    """
    with torch.autocast(device_type=image.device.type, enabled=False):
        image, text, targets = _whole_batch(image, text, normalize, relations, group)
        logits = _full_precision(logit_scale, image) * (image @ text.T)
        if targets is None:
            labels = torch.arange(len(logits), device=logits.device)
            return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        rows, columns = targets.sum(1, keepdim=True), targets.sum(0, keepdim=True)
        if not bool(((rows > 0).all() & (columns > 0).all()).item()):
            raise ValueError(
                "clip_loss: the relation matrix has a row or a column without any positive; every image and "
                "every text needs one (the diagonal belongs to it)"
            )
        by_image = -(targets / rows * logits.log_softmax(dim=1)).sum(1).mean()
        by_text = -(targets / columns * logits.log_softmax(dim=0)).sum(0).mean()
        return (by_image + by_text) / 2


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    normalize: bool = True,
    relations: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Pairwise sigmoid loss: every image-text pair is a yes/no question of its own.

    The sum over all pairs of -log sigmoid(y_ij (scale * <image_i, text_j> + bias)), divided by the number
    of images, y = +1 for positives and -1 elsewhere. A soft relation r in [0, 1] weighs both answers:
    -r log sigmoid(z) - (1 - r) log sigmoid(-z).

    Args:
        image: `[N, D]` image features of this rank.
        text: `[N, D]` text features of this rank; row i belongs to image i.
        logit_scale: the scale itself (t, already exponentiated); a 0-d tensor or a float.
        logit_bias: b; a 0-d tensor or a float.
        normalize: divide the rows by their Euclidean norm first.
        relations: as in `clip_loss`.
        group: as in `clip_loss`.

    Returns:
        A scalar, the same on every rank.

    Raises:
        ValueError: shapes that disagree, an empty batch.

    Reference:
        Zhai et al., 2023, "Sigmoid Loss for Language Image Pre-Training", equation 1 and algorithm 1
        (https://arxiv.org/abs/2303.15343).

    Example:
        >>> features = torch.eye(2)
        >>> loss = siglip_loss(features, features, 0.0, 0.0)  # four pairs of ln 2, divided by two images
        >>> bool((loss - 2 * torch.log(torch.tensor(2.0))).abs() < 1e-6)
        True
    """
    with torch.autocast(device_type=image.device.type, enabled=False):
        image, text, targets = _whole_batch(image, text, normalize, relations, group)
        logits = _full_precision(logit_scale, image) * (image @ text.T) + _full_precision(logit_bias, image)
        if targets is None:
            targets = torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
        # -r log sigmoid(z) - (1 - r) log sigmoid(-z), in the form that neither overflows nor cancels
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(image)


def related(ids: Tensor, others: Tensor) -> Tensor:
    """Which rows share an id.

    Args:
        ids: integer `[N]` or `[N, K]`.
        others: integer `[M]` or `[M, K]`.

    Returns:
        Bool `[N, M]`: true where any of the K ids of row i and row j agree (column by column).
    """
    ids, others = (value.unsqueeze(1) if value.ndim == 1 else value for value in (ids, others))
    result = ids[:, None, 0] == others[None, :, 0]
    for column in range(1, ids.shape[1]):
        result |= ids[:, None, column] == others[None, :, column]
    return result


def _full_precision(value: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(())


def _whole_batch(
    image: Tensor, text: Tensor, normalize: bool, relations: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checks, normalises and gathers: features `[N, D]` of all ranks and the target matrix `[N, N]`."""
    if image.ndim != 2 or image.shape != text.shape or image.shape[0] == 0:
        raise ValueError(
            f"image and text features must both be [N, D] with N > 0, got {list(image.shape)} and {list(text.shape)}"
        )
    # a half-precision softmax over thousands of columns loses the loss; float64 stays as it is
    precision = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    image, text = image.to(precision), text.to(precision)
    if normalize:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    sizes = row_counts(image, group)
    local = len(image)
    if world_size(group) > 1:
        width = image.shape[1]
        image, text = all_gather_with_grad(torch.cat([image, text], dim=1), group, sizes).split(width, dim=1)
    return image, text, _targets(relations, local, sizes, precision, image.device, group)


def _targets(
    relations: Tensor | None,
    local: int,
    sizes: list[int],
    precision: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> Tensor | None:
    if relations is None:
        return None
    total = sum(sizes)
    relations = relations.to(device)
    is_ids = not (relations.is_floating_point() or relations.dtype == torch.bool)
    expected = relations.ndim in (1, 2) if is_ids else list(relations.shape[1:]) == [total]
    if not expected or len(relations) != local:
        wanted = f"[{local}] or [{local}, K]" if is_ids else f"[{local}, {total}]"
        raise ValueError(f"relations of dtype {relations.dtype} must be {wanted}, got {list(relations.shape)}")
    relations = all_gather(relations, group, sizes)
    return (related(relations, relations) if is_ids else relations).to(precision)
