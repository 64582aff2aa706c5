"""Images as patches of pixels, and the reconstruction error of masked patches."""

from __future__ import annotations

import torch
from torch import Tensor

from mllm_vision.functional.precision import full_fp32

__all__ = ["masked_reconstruction", "patchify", "unpatchify"]


def patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """Cuts images into patches, row by row; the order within a patch is row, column, channel.

    Args:
        pixels: `[B, C, H, W]`.
        patch_size: p, the side of a patch in pixels.

    Returns:
        `[B, (H / p) (W / p), p p C]`.

    Raises:
        ValueError: an image that the patches do not divide.

    Example:
        >>> patchify(torch.arange(16.0).view(1, 1, 4, 4), 2)[0, 1].tolist()
        [2.0, 3.0, 6.0, 7.0]
    """
    if pixels.ndim != 4 or patch_size < 1 or pixels.shape[2] % patch_size or pixels.shape[3] % patch_size:
        raise ValueError(f"images {list(pixels.shape)} cannot be cut into patches of {patch_size} pixels")
    parts = pixels.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return parts.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int, height: int) -> Tensor:
    """Assembles images from patches: the inverse of `patchify`.

    Args:
        patches: `[B, N, p p C]`.
        patch_size: p.
        height: H of the images, in pixels.

    Returns:
        `[B, C, H, W]`.

    Raises:
        ValueError: patches that do not fit the height.

    Example:
        >>> pixels = torch.rand(2, 3, 4, 6)
        >>> torch.equal(unpatchify(patchify(pixels, 2), 2, 4), pixels)
        True
    """
    rows, area = height // patch_size, patch_size * patch_size
    if patches.ndim != 3 or height % patch_size or patches.shape[1] % max(rows, 1) or patches.shape[2] % area:
        raise ValueError(f"patches {list(patches.shape)} of {patch_size} pixels do not fit images of height {height}")
    parts = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (rows, -1))
    return parts.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def masked_reconstruction(predicted: Tensor, target: Tensor, mask: Tensor, *, normalize: bool = True) -> Tensor:
    """Mean squared error of each image over its masked patches.

    Args:
        predicted: `[B, N, P]`, the predicted pixels of every patch.
        target: `[B, N, P]`, the true pixels.
        mask: bool `[B, N]`, True for masked patches.
        normalize: standardise the pixels of each target patch (unbiased variance plus 1e-6), better than raw pixels
            in the paper.

    Returns:
        `[B]`, fp32 at least; zero for an image without masked patches. Predicting zeros gives 1 - 1/P with `normalize`.

    Raises:
        ValueError: mismatched shapes.

    Reference:
        He et al., 2022, "Masked Autoencoders Are Scalable Vision Learners", section 3
        (https://arxiv.org/abs/2111.06377).

    Example:
        >>> patches = torch.tensor([[[1.0, 3.0], [5.0, 5.0]]])
        >>> masked_reconstruction(patches + 2, patches, torch.tensor([[True, False]]), normalize=False).tolist()
        [4.0]
    """
    if predicted.ndim != 3 or predicted.shape != target.shape or mask.shape != predicted.shape[:2]:
        raise ValueError(
            f"predicted and target must be [B, N, P] and mask [B, N], got {list(predicted.shape)}, "
            f"{list(target.shape)} and {list(mask.shape)}"
        )
    with full_fp32(predicted.device):
        predicted, target = (part if part.dtype == torch.float64 else part.float() for part in (predicted, target))
        if normalize:
            variance, mean = torch.var_mean(target, dim=2, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        errors = (predicted - target).square().mean(2)
        hidden = mask.to(errors.dtype)
        return (errors * hidden).sum(1) / hidden.sum(1).clamp_min(1)
