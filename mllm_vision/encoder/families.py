"""What differs from one transformers vision backbone to the next, in one table.

A backbone runs in three steps: `embed` (pixels to the first hidden state), its `layers`, and `pool` (the last hidden
state to one vector). Separate steps let an encoder stop after the layer it needs. Tests compare every row of the table
with the model's own `forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Hidden = Tensor  # [B, N, D] for transformers, [B, C, H, W] for convolutional networks


@dataclass(frozen=True)
class Family:
    """One row of the table: how a model type embeds, which layers it has, and how it pools."""

    model_type: str
    embed: Callable[[Any, Tensor], tuple[Hidden, dict[str, Any]]]
    layers: Callable[[Any], nn.ModuleList]
    pool: Callable[[Any, Hidden], Tensor]
    processor: str
    """Name of the family's image processor class in transformers."""
    positions: str | None = None
    """Parameter that holds one learned position per patch; None where positions are computed or absent."""
    has_cls: bool = False
    convolutional: bool = False
    default_layer: int = -1
    optional_weights: tuple[str, ...] = ()
    """Prefixes a checkpoint may lack without harm to the tokens."""

    def num_prefix_tokens(self, config: Any) -> int:
        """Tokens before the patches: the class token and the registers."""
        return int(self.has_cls) + int(getattr(config, "num_register_tokens", 0) or 0)


def _side(value: Any) -> int:
    """The side of a square image or patch, from a number or a pair; ValueError if it is not square."""
    sides = [int(each) for each in (value if isinstance(value, (list, tuple)) else [value])]
    if len(set(sides)) != 1:
        raise ValueError(f"images and patches must be square, but a size is {list(value)}; use one number")
    return sides[0]


def _other_size(model: Any, pixel_values: Tensor) -> bool:
    size = _side(model.config.image_size)
    return tuple(pixel_values.shape[-2:]) != (size, size)


def _embed_clip(model: Any, pixel_values: Tensor) -> tuple[Hidden, dict[str, Any]]:
    hidden = model.embeddings(pixel_values, interpolate_pos_encoding=_other_size(model, pixel_values))
    return model.pre_layrnorm(hidden), {"attention_mask": None}


def _embed_siglip(model: Any, pixel_values: Tensor) -> tuple[Hidden, dict[str, Any]]:
    hidden = model.embeddings(pixel_values, interpolate_pos_encoding=_other_size(model, pixel_values))
    return hidden, {"attention_mask": None}


def _embed_vit(model: Any, pixel_values: Tensor) -> tuple[Hidden, dict[str, Any]]:
    hidden = model.embeddings(pixel_values, interpolate_pos_encoding=_other_size(model, pixel_values))
    return hidden, {}


def _embed_dinov2(model: Any, pixel_values: Tensor) -> tuple[Hidden, dict[str, Any]]:
    return model.embeddings(pixel_values), {}  # interpolates its positions by itself


def _embed_dinov3(model: Any, pixel_values: Tensor) -> tuple[Hidden, dict[str, Any]]:
    return model.embeddings(pixel_values), {"position_embeddings": model.rope_embeddings(pixel_values)}


def _pool_siglip(model: Any, hidden: Hidden) -> Tensor:
    hidden = model.post_layernorm(hidden)
    # A tower without its attention-pooling head has no image vector; the mean replaces it.
    return model.head(hidden) if model.use_head else hidden.mean(dim=1)


def _pool_vit(model: Any, hidden: Hidden) -> Tensor:
    hidden = model.layernorm(hidden)
    return hidden[:, 0] if model.pooler is None else model.pooler(hidden)


def _pool_efficientnet(model: Any, hidden: Hidden) -> Tensor:
    encoder = model.encoder
    hidden = encoder.top_activation(encoder.top_bn(encoder.top_conv(hidden)))
    # The model's pooler has a fixed window of `hidden_dim` pixels, which is global for any smaller image.
    return hidden.amax(dim=(2, 3)) if model.config.pooling_type == "max" else hidden.mean(dim=(2, 3))


_FAMILIES = (
    Family(
        "clip_vision_model",
        embed=_embed_clip,
        layers=lambda model: model.encoder.layers,
        pool=lambda model, hidden: model.post_layernorm(hidden[:, 0]),
        processor="CLIPImageProcessor",
        positions="embeddings.position_embedding.weight",
        has_cls=True,
        default_layer=-2,
    ),
    Family(
        "siglip_vision_model",
        embed=_embed_siglip,
        layers=lambda model: model.encoder.layers,
        pool=_pool_siglip,
        processor="SiglipImageProcessor",
        positions="embeddings.position_embedding.weight",
        default_layer=-2,
    ),
    Family(
        "vit",
        embed=_embed_vit,
        layers=lambda model: model.layers,
        pool=_pool_vit,
        processor="ViTImageProcessor",
        positions="embeddings.position_embeddings",
        has_cls=True,
    ),
    *(
        Family(
            name,
            embed=_embed_dinov2,
            layers=lambda model: model.encoder.layer,
            pool=lambda model, hidden: model.layernorm(hidden)[:, 0],
            processor="BitImageProcessor",
            positions="embeddings.position_embeddings",
            has_cls=True,
            optional_weights=("embeddings.mask_token",),
        )
        for name in ("dinov2", "dinov2_with_registers")
    ),
    Family(
        "dinov3_vit",
        embed=_embed_dinov3,
        layers=lambda model: model.model.layer,
        pool=lambda model, hidden: model.norm(hidden)[:, 0],
        processor="ViTImageProcessor",  # DINOv3's needs torchvision; equal within one grey level
        has_cls=True,
        optional_weights=("embeddings.mask_token",),
    ),
    Family(
        "resnet",
        embed=lambda model, pixel_values: (model.embedder(pixel_values), {}),
        layers=lambda model: model.encoder.stages,
        pool=lambda model, hidden: model.pooler(hidden).flatten(1),
        processor="ConvNextImageProcessor",
        convolutional=True,
    ),
    *(
        Family(
            name,
            embed=lambda model, pixel_values: (model.embeddings(pixel_values), {}),
            layers=lambda model: model.encoder.stages,
            pool=lambda model, hidden: model.layernorm(hidden.mean(dim=(2, 3))),
            processor="ConvNextImageProcessor",
            convolutional=True,
        )
        for name in ("convnext", "convnextv2")
    ),
    Family(
        "efficientnet",
        embed=lambda model, pixel_values: (model.embeddings(pixel_values), {}),
        layers=lambda model: model.encoder.blocks,
        pool=_pool_efficientnet,
        processor="EfficientNetImageProcessor",
        convolutional=True,
    ),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _FAMILIES}

# Of this package (vlm.connectors): their first tower.
OWN = ("mllm_vision_qwen_vl", "mllm_vision_cambrian", "mllm_vision_prismatic")
COMPOSITES: dict[str, tuple[str, ...]] = {
    # model type -> prefixes its image tower's weights carry in files, longest first
    "clip": ("vision_model.",),
    "siglip": ("vision_model.",),
    "vision-text-dual-encoder": ("vision_model.",),
    "llava": ("model.vision_tower.", "vision_tower."),
    "llava_next": ("model.vision_tower.", "vision_tower."),
    "llava_onevision": ("model.vision_tower.", "vision_tower."),
    "aya_vision": ("model.vision_tower.", "vision_tower."),
    "paligemma": ("model.vision_tower.", "vision_tower."),
    "internvl": ("model.vision_tower.", "vision_tower."),
    "idefics2": ("model.vision_model.",),
    "idefics3": ("model.vision_model.",),
    "smolvlm": ("model.vision_model.",),
    "blip-2": ("vision_model.",),
    **dict.fromkeys(OWN, ("model.vision_tower.",)),
}

# The systems among them, with what the language model sees by default: hidden state, and tokens before the patches.
SYSTEMS: dict[str, tuple[int, str]] = {
    "llava": (-2, "default"),
    "llava_next": (-2, "default"),
    "llava_onevision": (-1, "full"),
    "aya_vision": (-1, "full"),
    "paligemma": (-1, "full"),
    "internvl": (-1, "default"),
    "idefics2": (-1, "full"),
    "idefics3": (-1, "full"),
    "smolvlm": (-1, "full"),
    "blip-2": (-1, "full"),
    **dict.fromkeys(OWN, (-2, "default")),
}


def accepted_types() -> str:
    """The accepted model types, for messages."""
    return ", ".join([*FAMILIES, *COMPOSITES])


def family_of(backbone: Any) -> Family:
    """The table row of a backbone (a model, or its config).

    Raises:
        ValueError: for a model type that is not in the table.
    """
    config = getattr(backbone, "config", backbone)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type!r} is not a vision backbone; accepted are {accepted_types()}")
    return FAMILIES[model_type]


def to_tokens(hidden: Hidden) -> Tensor:
    """Feature maps `[B, C, H, W]` as tokens `[B, H*W, C]`, row by row; tokens are returned unchanged."""
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


def select_tokens(hidden: Hidden, family: Family, config: Any, select_feature: str) -> Tensor:
    """Tokens of one hidden state: `patch`, `cls_patch` or `cls` (see `features.extract_features`)."""
    tokens = to_tokens(hidden)
    prefix = family.num_prefix_tokens(config)
    if select_feature == "cls":
        return tokens[:, :1]
    patches = tokens[:, prefix:]
    if select_feature == "patch":
        return patches
    return tokens if prefix == 1 else torch.cat([tokens[:, :1], patches], dim=1)
