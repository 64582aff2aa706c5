"""Tiny image-text objectives and batches with duplicates, shared by the tests of losses, ranks and recipes."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import tiny
import torch

TEXT_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@cache
def tokenizer() -> Any:
    return tiny.tiny_tokenizer(Path(tempfile.mkdtemp(prefix="tiny_tokenizer")))


def make_dual(towers: str = "clip", *, bias: float | None = None, seed: int = 0, **settings: Any) -> Any:
    """A `DualEncoder`: towers "clip", "siglip", or an image tower's name with a CLIP text tower."""
    from mllm_vision.encoder.dual import DualEncoder
    from mllm_vision.encoder.encoder import VisionEncoder
    from mllm_vision.encoder.text.towers import build_text_tower

    makers = {"clip": tiny.tiny_clip_vision, "siglip": tiny.tiny_siglip_vision}
    makers |= {"dinov2": tiny.tiny_dinov2, "vit": tiny.tiny_vit}
    vision = VisionEncoder.from_backbone(makers[towers](seed), tiny.tiny_image_processor(towers))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text, prepared = build_text_tower(
            "siglip_text_model" if towers == "siglip" else "clip_text_model",
            settings.pop("tokenizer", None) or tokenizer(),
            overrides=TEXT_SIZES,
            max_length=settings.pop("max_length", 24),
            projection_size=32 if towers == "siglip" else None,
        )
        if towers != "siglip":
            settings.setdefault("embed_dim", 16)
        return DualEncoder(vision, text, prepared, logit_bias=bias, **settings).eval()


def make_objective(kind: str = "clip", **config: Any) -> Any:
    from mllm_vision.objectives import load_objective

    method = load_objective(kind)
    towers = "siglip" if kind == "siglip" else "clip"
    return method(make_dual(towers, bias=-10.0 if method.has_bias else None), method.Config(**config))


def pair_batches(count: int, size: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Batches as the collator makes them; some captions and images of a batch occur twice."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        caption = torch.randint(0, size - 2, (size,), generator=generator)
        image = torch.randint(0, size - 2, (size,), generator=generator)
        pixels = torch.randn(size, 3, 32, 32, generator=generator)[image]
        words = torch.randint(5, 200, (size, 6), generator=generator)[caption]
        end = torch.full((size, 1), 3)
        batches.append(
            {
                "pixel_values": pixels,
                "input_ids": torch.cat([words, end], dim=1),
                "attention_mask": torch.ones(size, 7, dtype=torch.long),
                "caption_ids": caption + 2**40,
                "image_ids": image,
            }
        )
    return batches
