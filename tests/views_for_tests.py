"""Tiny image objectives and batches of views, shared by the tests of the methods that learn from images alone."""

from __future__ import annotations

from typing import Any

import tiny
import torch

_MLP = {name: value for name, value in tiny.SIZES.items() if name != "image_size"}
_RATIO = {**{name: value for name, value in _MLP.items() if name != "intermediate_size"}, "mlp_ratio": 2}
SIZES: dict[str, dict[str, Any]] = {
    "vit": _MLP,
    "clip": _MLP,
    "siglip": _MLP,
    "dinov2": _RATIO,
    "dinov2_with_registers": {**_RATIO, "num_register_tokens": 2},
    "dinov3": {**_MLP, "num_register_tokens": 2},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
}


def make_encoder(kind: str = "vit", *, seed: int = 0, **overrides: Any) -> Any:
    """A tiny encoder of 32 px, of the kinds above; a ViT without pooler, as the recipe builds it."""
    from mllm_vision.encoder.sources import build_encoder

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = build_encoder(kind, image_size=32, overrides={**SIZES[kind], **overrides})
    if kind == "vit":
        encoder.backbone.pooler = None
    return encoder


def make_method(method: type, kind: str = "vit", *, encoder: dict[str, Any] | None = None, **config: Any) -> Any:
    """A method around a tiny encoder, in training mode; always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return method(make_encoder(kind, **(encoder or {})), method.Config(**config)).train()


def view_batch(count: int = 6, views: int = 2, size: int = 32, seed: int = 0) -> torch.Tensor:
    """`[count, views, 3, size, size]`: views of an image are alike, images are not."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 3, size // 8, size // 8, generator=generator)
    images = images.repeat_interleave(8, -1).repeat_interleave(8, -2)
    return images + 0.3 * torch.randn(count, views, 3, size, size, generator=generator)
