"""Transformer backbones of any family with a mask token in place of some patches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mllm_vision.encoder.families import family_of
from mllm_vision.encoder.features import final_norm
from mllm_vision.encoder.sizes import check_pixels


def patch_embedding(backbone: PreTrainedModel) -> nn.Module:
    """The module that turns pixels into patches, before positions; ValueError for convolutional networks."""
    family = family_of(backbone)
    if not family.convolutional:
        for name in ("patch_embeddings", "patch_embedding"):
            if isinstance(module := getattr(backbone.embeddings, name, None), nn.Module):
                return module
    raise ValueError(f"{family.model_type} has no patches to mask; use a transformer (--encoder vit)")


def mask_token(backbone: PreTrainedModel) -> nn.Parameter | None:
    """The backbone's mask token (DINOv2, DINOv3, a ViT built with one), or None."""
    for name, parameter in backbone.named_parameters():
        if name.endswith("mask_token"):
            return parameter
    return None


@contextmanager
def masked_patches(backbone: PreTrainedModel, mask: Tensor, token: Tensor) -> Iterator[None]:
    """Within the context, `backbone` sees `token` where `mask` is True; positions are added as to any patch.

    Args:
        mask: bool `[B, N]` of the images of the forward pass.
        token: `[D]`, possibly with leading dimensions of size one.

    Raises:
        ValueError: a mask that does not match the images or their patches, or a convolutional network.
    """

    def replace(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        patches = output.flatten(2).transpose(1, 2) if output.ndim == 4 else output
        if patches.shape[:2] != mask.shape:
            raise ValueError(f"mask must be [B, N] = {list(patches.shape[:2])} for these images, got {[*mask.shape]}")
        seen = torch.where(mask[..., None], token.to(patches.dtype).reshape(1, 1, -1), patches)
        return seen.transpose(1, 2).reshape(output.shape) if output.ndim == 4 else seen

    handle = patch_embedding(backbone).register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def masked_features(
    backbone: PreTrainedModel, pixel_values: Tensor, mask: Tensor | None = None, token: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The image vector and the patches after the last norm.

    Args:
        pixel_values: `[B, 3, H, W]`.
        mask: bool `[B, N]`, True where `token` replaces the patch; None for the whole image.
        token: `[D]`, required with a mask.

    Returns:
        (pooled `[B, P]`, patches `[B, N, D]` without class and register tokens)

    Raises:
        ValueError: a convolutional network, an image size that the patches do not divide, or a mismatched mask.
    """
    family = family_of(backbone)
    check_pixels(pixel_values, backbone.config, family)
    norm, pixels = final_norm(backbone), pixel_values.to(backbone.dtype)
    if mask is None or token is None:
        hidden, arguments = family.embed(backbone, pixels)
    else:
        with masked_patches(backbone, mask, token):
            hidden, arguments = family.embed(backbone, pixels)
    for layer in family.layers(backbone):
        hidden = layer(hidden, **arguments)
    patches = norm(hidden[:, family.num_prefix_tokens(backbone.config) :])
    return family.pool(backbone, hidden), patches
