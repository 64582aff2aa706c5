"""A small model of every accepted family, with its processor, made on the spot."""

from __future__ import annotations

from typing import Any

from mllm_vision.encoder import VisionEncoder, build_backbone

_VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}
_MLP = {**_VIT, "intermediate_size": 64}

FAMILIES: dict[str, dict[str, Any]] = {
    "clip_vision_model": _MLP,
    "siglip_vision_model": _MLP,
    "vit": _MLP,
    "dinov2": {**_VIT, "mlp_ratio": 2},
    "dinov2_with_registers": {**_VIT, "mlp_ratio": 2, "num_register_tokens": 3},
    "dinov3_vit": {**_MLP, "num_register_tokens": 2},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "convnextv2": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.1},
}
CONVOLUTIONAL = ("resnet", "convnext", "convnextv2", "efficientnet")
TABLES = ("clip_vision_model", "siglip_vision_model", "vit", "dinov2", "dinov2_with_registers")


def small(model_type: str, *, image_size: int = 32, **arguments: Any) -> VisionEncoder:
    """An encoder of a family, with every parameter drawn at random (no zero registers or positions)."""
    import torch

    backbone, processor = build_backbone(model_type, image_size=image_size, **FAMILIES[model_type])
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if any(word in name for word in ("position", "token", "lambda", "class_embedding")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    if model_type == "efficientnet":  # its deep stack of norms needs statistics before it lets a signal through
        backbone.train()(torch.randn(16, 3, image_size, image_size, generator=generator))
    return VisionEncoder.from_backbone(backbone.eval(), processor, **arguments)
