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


LATENTS = {"num_latents": 4, "perceiver_layers": 2, "perceiver_heads": 2, "perceiver_head_dim": 16}
LATENTS |= {"perceiver_key_value_heads": 1}
QFORMER = {"num_query_tokens": 4, "qformer_layers": 2, "qformer_width": 64, "qformer_dropout": 0.0}
SYSTEMS: dict[str, tuple[str, str, dict]] = {
    "llava_next": ("clip", "vicuna", {}),
    "internvl": ("vit", "vicuna", {"max_tiles": 6}),
    "idefics2": ("siglip", "vicuna", {**LATENTS, "longest_edge": 48, "shortest_edge": 16}),
    "paligemma": ("siglip", "paligemma", {}),
    "blip2": ("vit", "blip2", QFORMER),
    "cambrian": ("siglip", "vicuna", {
        "query_side": 4, "connector_hidden_size": 32, "connector_heads": 2, "inner_layers": 1,
    }),
}  # fmt: skip
TOWERS = {"clip": tiny.tiny_clip_vision, "siglip": tiny.tiny_siglip_vision, "vit": tiny.tiny_vit}


def asked(seed: int, size: tuple[int, int] | None, question: str, answer: str) -> dict:
    """A conversation about an image of (height, width), or about none."""
    images = [] if size is None else [tiny.random_image(seed, (size[1], size[0]))]
    said = [{"from": "human", "value": "<image>\n" * len(images) + question}, {"from": "gpt", "value": answer}]
    return {"image": images, "conversations": said}


# what each of two ranks has: wide, square and small images of other numbers of tiles; an image here, text there
WIDE = [asked(0, (33, 90), "what is it?", "a red star"), asked(1, (64, 64), "which?", "a blue circle beside a star")]
SMALL = [asked(2, (7, 40), "where?", "left")]
TEXT = [asked(3, None, "how many stars are there?", "two of them")]
SHARES = [(WIDE, SMALL), (TEXT, SMALL)]


def system_gradients(folder: str, name: str, train: tuple[str, ...]) -> list[dict[str, torch.Tensor]]:
    """Gradients of the weighted loss for both `SHARES`: each rank takes its own, or one process all in one batch."""
    from transformers import AutoTokenizer

    from mllm_vision.data import CHAT_TEMPLATES, ConversationCollator, ConversationDataset, TokenWeights
    from mllm_vision.distributed import rank, world_size
    from mllm_vision.encoder import VisionEncoder
    from mllm_vision.vlm import build_vlm, freeze

    tower, template, settings = SYSTEMS[name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = VisionEncoder.from_backbone(TOWERS[tower](), tiny.tiny_image_processor(tower))
    torch.manual_seed(0)
    task, processor = build_vlm(
        encoder, tiny.tiny_llama(len(tokenizer)), name, tokenizer, CHAT_TEMPLATES[template], **settings
    )
    for part in task.system.parts.modules(task.model, "connector"):
        for parameter in part.parameters():  # PaliGemma's is zero, so that a norm of 0 would magnify rounding
            torch.nn.init.normal_(parameter, std=0.3)
    freeze(task, train).train()
    layout = task.system.layout(task.model, processor)
    collate = ConversationCollator(processor.tokenizer, layout, token_weights=TokenWeights(0.5, 1.7))
    run = DistributedDataParallel(task) if world_size() > 1 else task
    found = []
    for shares in SHARES:
        options = {"layout": layout, "max_length": 2000, "progress": False, "chat_template": processor.chat_template}
        records = [record for share in shares for record in share]
        dataset = ConversationDataset(records, None, processor.tokenizer, **options)
        rows = [dataset[index] for index in range(len(records))]
        count = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
        mine = rows
        if world_size() > 1:
            mine = rows[: len(shares[0])] if rank() == 0 else rows[len(shares[0]) :]
        # as the Trainer: the tokens of all ranks, and a mean over ranks that is to be a sum
        (run(**collate(mine), num_items_in_batch=count).loss * world_size()).backward()
        found.append({each: p.grad.clone() for each, p in task.named_parameters() if p.requires_grad})
        task.zero_grad()
    return found


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
