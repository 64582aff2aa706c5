"""Image sizes: checks, and resizing of backbones and processors."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mllm_vision.encoder.families import Family, _side, family_of


def check_image_size(image_size: int, patch_size: int | None) -> None:
    """Raises ValueError unless `image_size` is a positive multiple of `patch_size` (if there is one)."""
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"image_size={image_size!r} is not a size; use the side of the square image in pixels")
    if patch_size and image_size % patch_size:
        below, above = image_size // patch_size * patch_size, (image_size // patch_size + 1) * patch_size
        remedy = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"image_size={image_size} is not divisible by patch_size={patch_size}; use {remedy}")


def check_pixels(pixel_values: Tensor, config: Any, family: Family) -> None:
    """Raises ValueError unless `pixel_values` is `[B, C, H, W]` of a size that the backbone accepts."""
    if pixel_values.ndim != 4 or pixel_values.shape[1] != getattr(config, "num_channels", 3):
        raise ValueError(
            f"pixel_values has shape {list(pixel_values.shape)}; expected [batch, "
            f"{getattr(config, 'num_channels', 3)}, height, width]"
        )
    if family.convolutional:
        return
    height, width = pixel_values.shape[-2:]
    # Patches may not divide a checkpoint's native size (SigLIP so400m: 384 by 14); the convolution drops the rest. At
    # any other size this is probably a mistake.
    if (height, width) == (_side(config.image_size),) * 2:
        return
    for side in (height, width):
        check_image_size(side, _side(config.patch_size))


def processor_size(processor: Any) -> int | None:
    """Side of an image processor's square images; None if their size varies."""
    crop, size = getattr(processor, "crop_size", None), getattr(processor, "size", None)
    if getattr(processor, "do_center_crop", False) and crop:
        height, width = _height_width(crop)
    elif not getattr(processor, "do_resize", True) or not size:
        return None
    elif _get(size, "height"):
        height, width = _height_width(size)
    elif getattr(processor, "crop_pct", None) is not None:  # ConvNext style: crops to the shortest edge
        height = width = _get(size, "shortest_edge")
    else:
        return None
    return int(height) if height and height == width else None


def _get(size: Any, key: str) -> Any:
    return size.get(key) if isinstance(size, dict) else getattr(size, key, None)


def _height_width(size: Any) -> tuple[Any, Any]:
    return _get(size, "height"), _get(size, "width")


def resize_processor(processor: Any, image_size: int) -> Any:
    """A copy of an image processor for square images of `image_size`; the ratio of resize to crop is kept."""
    old = processor_size(processor)
    if old == image_size:
        return processor
    settings = copy.deepcopy(processor.to_dict())
    for name in ("image_processor_type", "processor_class", "_processor_class"):
        settings.pop(name, None)
    size, crop = settings.get("size") or {}, settings.get("crop_size")
    if settings.get("do_center_crop") and crop:
        settings["crop_size"] = {"height": image_size, "width": image_size}
        edge = _get(size, "shortest_edge")
        if edge:
            settings["size"] = {"shortest_edge": round(edge * image_size / old) if old else image_size}
        else:
            settings["size"] = {"height": image_size, "width": image_size}
    elif _get(size, "shortest_edge") and settings.get("crop_pct") is not None:
        settings["size"] = {"shortest_edge": image_size}
    else:
        settings["size"] = {"height": image_size, "width": image_size}
        settings["do_resize"] = True
    return type(processor)(**settings)


@torch.no_grad()
def resize_backbone(backbone: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """Changes a backbone's native image size, in place.

    Learned positions are interpolated once by the model's `interpolate_pos_encoding`, and `config.image_size` is set,
    so that saving gives an ordinary checkpoint of the new size. Rotary positions and convolutions only need the config.

    Raises:
        ValueError: `image_size` is not divisible by the patch size.
    """
    family = family_of(backbone)
    config: Any = backbone.config
    if family.convolutional:
        check_image_size(image_size, None)
        if hasattr(config, "image_size"):
            config.image_size = image_size
        return backbone
    if image_size == _side(config.image_size):
        return backbone
    patch_size = _side(config.patch_size)
    check_image_size(image_size, patch_size)
    if family.positions is not None:
        _resize_positions(backbone, family, image_size, patch_size)
    config.image_size = image_size
    embeddings: Any = backbone.embeddings
    if isinstance(getattr(embeddings, "image_size", None), int):
        embeddings.image_size = image_size
    elif hasattr(embeddings, "image_size"):
        embeddings.image_size = (image_size, image_size)
    patches: Any = getattr(embeddings, "patch_embeddings", None)
    if hasattr(patches, "image_size"):
        patches.image_size = (image_size, image_size)
        patches.num_patches = (image_size // patch_size) ** 2
    return backbone


def _resize_positions(backbone: PreTrainedModel, family: Family, image_size: int, patch_size: int) -> None:
    assert family.positions is not None
    embeddings: Any = backbone.embeddings
    table = backbone.get_parameter(family.positions)
    tokens = int(family.has_cls) + (image_size // patch_size) ** 2
    # The model's interpolation only uses the shape of the embeddings.
    shape = torch.empty(1, tokens, table.shape[-1], device=table.device, dtype=table.dtype)
    resized = embeddings.interpolate_pos_encoding(shape, image_size, image_size).clone()  # [1, N, D]
    owner_name, _, name = family.positions.rpartition(".")
    owner = backbone.get_submodule(owner_name)
    if isinstance(owner, nn.Embedding):  # CLIP and SigLIP keep [N, D] and the ids of the rows
        owner.weight = nn.Parameter(resized[0], requires_grad=table.requires_grad)
        owner.num_embeddings = tokens
        embeddings.num_patches, embeddings.num_positions = (image_size // patch_size) ** 2, tokens
        embeddings.position_ids = torch.arange(tokens, device=resized.device).expand((1, -1))
    else:  # ViT and DINOv2 keep [1, N, D]
        setattr(owner, name, nn.Parameter(resized, requires_grad=table.requires_grad))
