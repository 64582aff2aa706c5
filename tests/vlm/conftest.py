"""Small vision-language models for these tests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tiny_tokenizer(folder)
    return folder


@pytest.fixture
def build(tokenizer_folder):
    """`build(kind="clip", system="llava15", llm=None, **encoder options)` -> (model, processor)."""
    from transformers import AutoTokenizer

    from mllm_vision.encoder import VisionEncoder
    from mllm_vision.vlm import build_vlm

    towers = {
        "clip": tiny.tiny_clip_vision,
        "siglip": tiny.tiny_siglip_vision,
        "dinov2": tiny.tiny_dinov2,
        "vit": tiny.tiny_vit,
    }

    def make(kind="clip", system="llava15", llm=None, layers=3, select_layer=None, select_feature=None, **options):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        encoder = VisionEncoder.from_backbone(
            towers[kind](num_hidden_layers=layers),
            tiny.tiny_image_processor(kind),
            select_layer=select_layer,
            select_feature=select_feature,
        )
        torch.manual_seed(1)
        return build_vlm(encoder, llm or tiny.tiny_llama(len(tokenizer)), system, tokenizer, **options)

    return make


@pytest.fixture
def make_batch():
    """`make_batch(model, rows=3)`: ragged, right-padded rows with one image each and two supervised stretches."""

    def make(model, rows=3, words=12, images=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        config = model.config
        spelt = config.image_seq_length if images else 0
        length = 1 + spelt + words
        ids = torch.randint(20, 200, (rows, length), generator=generator)
        ids[:, 1 : 1 + spelt] = config.image_token_id
        mask = torch.ones_like(ids)
        labels = torch.full_like(ids, -100)
        for row in range(rows):
            end = length - 2 * row
            mask[row, end:] = 0
            ids[row, end:] = 0
            labels[row, end - 3 : end] = ids[row, end - 3 : end]
            labels[row, spelt + 2 : spelt + 4] = ids[row, spelt + 2 : spelt + 4]
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if images:
            batch["pixel_values"] = torch.randn(rows, 3, 32, 32, generator=generator)
        return batch

    return make


@pytest.fixture
def dialogue():
    """One question about one image, as messages."""
    return SimpleNamespace(
        image=tiny.random_image(3),
        messages=[
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is the star?"}]}
        ],
    )
