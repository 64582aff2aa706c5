"""Tokens and the pooled vector of a vision backbone, running no more layers than they need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from mllm_vision.encoder.clip_layers import is_plain, pooled_layer
from mllm_vision.encoder.families import Family, family_of, select_tokens
from mllm_vision.encoder.sizes import check_pixels

CLIP_VISION = "clip_vision_model"
SELECT_FEATURES = ("patch", "cls_patch", "cls", "pooled")


@dataclass
class VisionFeatures(ModelOutput):
    """Output of an encoder for a batch of images.

    Attributes:
        tokens: `[B, N, D]`, the selected tokens of the selected layer, or None if not requested.
        pooled: `[B, P]`, the backbone's image vector (its `pooler_output`), or None if not requested.
    """

    tokens: Tensor | None = None
    pooled: Tensor | None = None


def num_layers(backbone: PreTrainedModel) -> int:
    """Number of layers (transformer blocks, ResNet stages, EfficientNet blocks) of a backbone."""
    return len(family_of(backbone).layers(backbone))


def resolve_layer(select_layer: int, layers: int, model_type: str = "backbone") -> int:
    """Non-negative index into `hidden_states`, which is the number of layers to run.

    As in LLaVA, `hidden_states` has `layers + 1` entries: 0 is the embedding, `layers` (or -1) the last layer's
    output before the final norm.

    Raises:
        ValueError: no such layer.
    """
    if isinstance(select_layer, bool) or not isinstance(select_layer, int):
        raise ValueError(f"select_layer={select_layer!r} is not a whole number; use -1 for the last layer")
    if not -(layers + 1) <= select_layer <= layers:
        raise ValueError(
            f"select_layer={select_layer} does not exist: this {model_type} has {layers} layers; "
            f"use {-(layers + 1)}..{layers} (-1 is the last layer, -2 the one before, 0 the embeddings)"
        )
    return select_layer % (layers + 1)


def check_feature(select_feature: str, family: Family) -> None:
    """Raises ValueError for an unknown `select_feature`, or one that this family does not have."""
    if select_feature not in SELECT_FEATURES:
        raise ValueError(f"select_feature={select_feature!r} is unknown; use one of {', '.join(SELECT_FEATURES)}")
    if select_feature in ("cls", "cls_patch") and not family.has_cls:
        raise ValueError(
            f"select_feature={select_feature!r} needs a class token, and {family.model_type} has none; "
            "use 'patch' or 'pooled'"
        )


def default_selection(backbone: PreTrainedModel) -> tuple[int, str]:
    """`(select_layer, select_feature)` stored in the config; else `patch` of layer -2 (CLIP, SigLIP) or -1 (others)."""
    family = family_of(backbone)
    kept: dict[str, Any] = getattr(backbone.config, "mllm_vision", None) or {}
    layer = kept.get("select_layer")
    if layer is None:
        # The second to last hidden state of a single layer would be the embeddings.
        layer = family.default_layer if num_layers(backbone) > 1 else -1
    return layer, kept.get("select_feature") or "patch"


def check_patch_dropout(patch_dropout: float, backbone: PreTrainedModel) -> None:
    """Raises ValueError for an invalid fraction of patches, or a backbone without patches."""
    if not 0 <= patch_dropout < 1:
        raise ValueError(f"patch_dropout={patch_dropout} must lie in [0, 1); 0.5 drops half of the patches")
    family = family_of(backbone)
    if patch_dropout and family.convolutional:
        raise ValueError(
            f"patch_dropout={patch_dropout}: {family.model_type} is convolutional and has no patches to drop; "
            "use --patch_dropout 0, or a transformer"
        )


def drop_patches(
    hidden: Tensor, arguments: dict[str, Any], patch_dropout: float, prefix: int
) -> tuple[Tensor, dict[str, Any]]:
    """A random subset of each image's patches, before the first layer; prefix tokens (class, registers) stay.

    Every image keeps `max(1, round((1 - patch_dropout) * N))` patches, drawn without replacement from the device's
    global generator.

    Args:
        hidden: `[B, prefix + N, D]`, positions already added.
        arguments: the layers' arguments; rotary positions `[N, d]` are selected accordingly.
        patch_dropout: fraction of the patches to drop, in [0, 1).
        prefix: tokens before the patches.

    Returns:
        (hidden `[B, prefix + K, D]`, arguments)

    Reference:
        Li et al., 2023, "Scaling Language-Image Pre-training via Masking", section 3
        (https://arxiv.org/abs/2212.00794).
    """
    batch, patches = hidden.shape[0], hidden.shape[1] - prefix
    kept = max(1, round((1 - patch_dropout) * patches))
    if kept == patches:
        return hidden, arguments
    order = torch.rand(batch, patches, device=hidden.device).argsort(dim=1)[:, :kept]
    return pick_patches(hidden, arguments, order, prefix)


def pick_patches(
    hidden: Tensor, arguments: dict[str, Any], chosen: Tensor, prefix: int
) -> tuple[Tensor, dict[str, Any]]:
    """The prefix tokens and the patches `chosen` (int64 `[B, K]`, in [0, N)) of each image; else as `drop_patches`."""
    rows = torch.arange(len(hidden), device=hidden.device)[:, None]
    rotary = arguments.get("position_embeddings")
    if rotary is not None:
        arguments = {**arguments, "position_embeddings": tuple(table[chosen][:, None] for table in rotary)}
    return torch.cat([hidden[:, :prefix], hidden[rows, prefix + chosen]], dim=1), arguments


def final_norm(backbone: PreTrainedModel) -> nn.Module:
    """The norm after the last layer of a transformer backbone; ValueError for convolutional networks."""
    for name in ("layernorm", "post_layernorm", "norm"):
        if isinstance(module := getattr(backbone, name, None), nn.Module):
            return module
    raise ValueError(f"{backbone.config.model_type} has no norm after its last layer")


def extract_features(
    backbone: PreTrainedModel,
    pixel_values: Tensor,
    *,
    select_layer: int | None = None,
    select_feature: str | None = None,
    pooled: bool = False,
    tokens: bool = True,
    patch_dropout: float = 0.0,
) -> VisionFeatures:
    """Features of a batch of preprocessed images.

    Args:
        backbone: a transformers vision model of an accepted family (also a VLM's `vision_tower`).
        pixel_values: `[B, 3, H, W]`. Positions are interpolated for other sizes than the backbone's.
        select_layer: index into `hidden_states` (negative from the end). None: see `default_selection`.
        select_feature: `patch` (no class and register tokens), `cls_patch` (class token first, no registers),
            `cls` (`[B, 1, D]`) or `pooled` (`[B, 1, P]`, the image vector as the only token).
        pooled: also return the image vector. False runs only the layers that `select_layer` needs.
        tokens: also return the tokens. False lets a CLIP tower's last layer compute the class token only.
        patch_dropout: fraction of the patches dropped at random, see `drop_patches`.

    Returns:
        VisionFeatures: tokens `[B, N, D]` or None; pooled `[B, P]` or None. Feature maps `[B, C, H, W]` of
        convolutional networks become tokens row by row.

    Raises:
        ValueError: unknown family, layer or feature, or an image size that the patches do not divide.
    """
    family = family_of(backbone)
    if select_layer is None or select_feature is None:
        layer, feature = default_selection(backbone)
        select_layer = layer if select_layer is None else select_layer
        select_feature = feature if select_feature is None else select_feature
    check_feature(select_feature, family)
    layers = family.layers(backbone)
    stop = resolve_layer(select_layer, len(layers), family.model_type)
    check_pixels(pixel_values, backbone.config, family)

    wants_pooled = pooled or select_feature == "pooled"
    wants_hidden = tokens and select_feature != "pooled"
    hidden, arguments = family.embed(backbone, pixel_values.to(backbone.dtype))
    if patch_dropout:
        check_patch_dropout(patch_dropout, backbone)
        hidden, arguments = drop_patches(hidden, arguments, patch_dropout, family.num_prefix_tokens(backbone.config))
    # CLIP pools token 0 of the last layer; the others are skipped if not requested.
    class_only = wants_pooled and not (wants_hidden and stop == len(layers)) and family.model_type == CLIP_VISION
    selected = hidden
    for index, block in enumerate(layers, start=1):
        if index > stop and not wants_pooled:
            break
        if index == len(layers) and class_only and is_plain(block):
            hidden = pooled_layer(block, hidden)[:, None]
        else:
            hidden = block(hidden, **arguments)
        if index == stop:
            selected = hidden
    vector = family.pool(backbone, hidden) if wants_pooled else None
    if not tokens:
        return VisionFeatures(pooled=vector if pooled else None)
    if select_feature == "pooled":
        assert vector is not None
        chosen = vector[:, None]
    else:
        chosen = select_tokens(selected, family, backbone.config, select_feature)
    return VisionFeatures(tokens=chosen, pooled=vector if pooled else None)
