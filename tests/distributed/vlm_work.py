"""What the ranks of test_vlm_ranks.py run."""

from __future__ import annotations

import tiny
import torch
from torch.nn.parallel import DistributedDataParallel


def small_model(folder: str, train: tuple[str, ...]):
    from transformers import AutoTokenizer

    from mllm_vision.encoder import VisionEncoder
    from mllm_vision.vlm import build_vlm, freeze

    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
    torch.manual_seed(0)
    model, _ = build_vlm(encoder, tiny.tiny_llama(len(tokenizer)), "llava15", tokenizer)
    return freeze(model, train).train()


def rows(model, images: list[bool]) -> list[dict]:
    """One batch of one row for each entry: with an image, or text alone; all of them supervise 5 tokens."""
    batches = []
    for index, image in enumerate(images):
        generator = torch.Generator().manual_seed(index)
        spelt = model.config.image_seq_length if image else 0
        ids = torch.randint(20, 200, (1, 1 + spelt + 8), generator=generator)
        ids[:, 1 : 1 + spelt] = model.config.image_token_id
        labels = ids.clone()
        labels[:, :-5] = -100
        batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
        if image:
            batch["pixel_values"] = torch.randn(1, 3, 32, 32, generator=generator)
        batches.append(batch)
    return batches


def gradients(folder: str, train: tuple[str, ...], images: list[bool]) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss: each rank takes its own batch, or one process takes them all."""
    from mllm_vision.distributed import rank, world_size

    model = small_model(folder, train)
    batches = rows(model, images)
    if world_size() > 1:
        wrapped = DistributedDataParallel(model)  # by name: its reducer would be gone before the backward pass
        wrapped(**batches[rank()]).loss.backward()
    else:
        (sum(model(**batch).loss for batch in batches) / len(batches)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def held_out(folder: str, count: int) -> dict:
    """The held-out loss of rows of which every rank measures its share."""
    from mllm_vision.vlm import HeldOutLoss

    model = small_model(folder, ("connector",)).eval()
    items = rows(model, [True] * count)

    def collate(chunk):
        return {name: torch.cat([row[name] for row in chunk]) for name in chunk[0]}

    return HeldOutLoss("captions", items, collate, batch_size=2)(model)


def cached(folder: str, features: str) -> tuple[int, int, torch.Tensor]:
    """(images in the cache, images that this rank's tower saw, all features) of nine images, one of them twice."""
    from mllm_vision.vlm.feature_cache import cache_features

    model = small_model(folder, ("connector",))
    images = [[tiny.random_image(seed)] for seed in (*range(9), 0)]
    layout = model.system.layout(model.model, _Processor())
    seen: list[int] = []
    features_of = model.system.features

    def counting(native, tensors):
        seen.append(len(tensors["pixel_values"]))
        return features_of(native, tensors)

    model.system.features = counting
    found = cache_features(model, layout, images, folder=features, batch_size=2)
    every = found([found.load(row[0]) for row in images])["image_features"]
    return len(found.cache), sum(seen) - 3, every


class _Processor:
    image_processor = tiny.tiny_image_processor("clip")
