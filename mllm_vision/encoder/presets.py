"""Encoders by name: model types, their short names, and published sizes such as `clip_vit_base_patch32`."""

from __future__ import annotations

import re
from typing import Any

from mllm_vision.encoder.families import FAMILIES

ALIASES = {
    "clip": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "siglip2": "siglip_vision_model",  # SigLIP 2 of fixed size is SigLIP's own architecture
    "dinov3": "dinov3_vit",
}
VIT_TYPES = {"vit": "vit", "clip_vit": "clip_vision_model", "siglip_vit": "siglip_vision_model", "dinov2_vit": "dinov2"}
# width, layers, heads as timm names them; the MLP has four times the width
VIT_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
BASIC, BOTTLENECK = [64, 128, 256, 512], [256, 512, 1024, 2048]
RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": BASIC},
    "resnet34": {"layer_type": "basic", "depths": [3, 4, 6, 3], "hidden_sizes": BASIC},
    "resnet50": {"layer_type": "bottleneck", "depths": [3, 4, 6, 3], "hidden_sizes": BOTTLENECK},
    "resnet101": {"layer_type": "bottleneck", "depths": [3, 4, 23, 3], "hidden_sizes": BOTTLENECK},
}
_VIT = re.compile(rf"({'|'.join(VIT_TYPES)})_({'|'.join(VIT_SIZES)})(?:_patch(\d+))?")


def list_encoders() -> list[str]:
    """Names of encoders with random weights: presets, model types and their short names.

    A transformer preset has patches of 16 pixels; the suffix `_patch14` sets another size.
    """
    presets = [f"{family}_{size}" for family in VIT_TYPES for size in VIT_SIZES]
    return sorted([*presets, *RESNETS, *FAMILIES, *ALIASES])


def config_fields(name: str) -> dict[str, Any] | None:
    """`model_type` and config fields of a name; None if it is not one of `list_encoders()`."""
    if name in RESNETS:
        return {"model_type": "resnet", "embedding_size": 64, **RESNETS[name]}
    if match := _VIT.fullmatch(name):
        family, size, patch = match.groups()
        width, layers, heads = VIT_SIZES[size]
        fields = {"model_type": VIT_TYPES[family], "hidden_size": width, "num_hidden_layers": layers}
        fields |= {"num_attention_heads": heads, "patch_size": int(patch or 16), "image_size": 224}
        mlp = {"mlp_ratio": 4} if family == "dinov2_vit" else {"intermediate_size": 4 * width}
        return fields | mlp
    model_type = ALIASES.get(name, name)
    return {"model_type": model_type} if model_type in FAMILIES else None
