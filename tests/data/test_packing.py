"""Packed = unpacked: what a packed row computes is what its conversations compute one by one."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from mllm_vision.data import ConversationCollator, ConversationDataset, PackedConversations
from mllm_vision.data.chat.templates import CHAT_TEMPLATES
from mllm_vision.data.images.layouts import FixedLayout
from mllm_vision.encoder import VisionEncoder
from mllm_vision.vlm import build_vlm

RECORDS = [
    {
        "image": tiny.random_image(number),
        "questions": [f"what colour is number {k}?" for k in range(1 + number)],
        "answers": ["red", "a blue circle", "green", "no"][: 1 + number],
    }
    for number in range(4)
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = tiny.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
    return build_vlm(encoder, tiny.tiny_llama(len(tokenizer)), tokenizer=tokenizer)


def layout_of(model, processor):
    return FixedLayout(model.config.image_token_id, model.config.image_seq_length, processor.image_processor)


def datasets(model, processor, template: str, max_length: int = 512):
    samples = ConversationDataset(
        RECORDS, None, processor.tokenizer, layout=layout_of(model, processor), max_turns=1, shuffle_turns=False,
        chat_template=CHAT_TEMPLATES[template],
    )  # fmt: skip
    return samples, PackedConversations(samples, max_length=max_length)


@pytest.mark.parametrize("template", ["qa", "vicuna"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradients_equal_those_of_separate_samples(built, template, attention) -> None:
    model, processor = built
    model.set_attn_implementation({"text_config": attention})
    samples, packed = datasets(model, processor, template)
    assert len(samples) == 10 and len(packed) == 4
    collate = ConversationCollator(processor.tokenizer, layout_of(model, processor))
    found = {}
    for name, dataset in (("separate", samples), ("packed", packed)):
        model.zero_grad()
        batch = collate([dataset[i] for i in range(len(dataset))])
        loss = model(**batch).loss
        loss.backward()
        found[name] = (loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        found[f"{name} words"] = int((batch["labels"] != -100).sum())
    model.set_attn_implementation({"text_config": "sdpa"})
    assert found["separate words"] == found["packed words"]
    assert found["separate"][0] == pytest.approx(found["packed"][0], rel=1e-5)
    for name, gradient in found["separate"][1].items():
        torch.testing.assert_close(found["packed"][1][name], gradient, atol=2e-6, rtol=2e-4, msg=name)


def test_one_conversation_does_not_see_another(built) -> None:
    model, processor = built
    _, packed = datasets(model, processor, "qa")
    batch = ConversationCollator(processor.tokenizer, layout_of(model, processor))([packed[3]])
    turns = np.asarray(packed[3]["turns"])
    model.eval()
    with torch.no_grad():
        before = model(**{**batch, "labels": None}).logits
        changed = batch["input_ids"].clone()
        changed[0, torch.as_tensor(turns == 2)] = 7  # other words in the second conversation
        after = model(**{**batch, "input_ids": changed, "labels": None}).logits
    same = torch.as_tensor(turns != 2)
    torch.testing.assert_close(before[0, same], after[0, same])
    assert not torch.allclose(before[0, ~same], after[0, ~same])


def test_rows_keep_to_the_limit_and_lose_nothing(built) -> None:
    model, processor = built
    samples, _ = datasets(model, processor, "qa")
    limit = int(samples.lengths.max()) + 8
    _, packed = datasets(model, processor, "qa", max_length=limit)
    rows = [packed[i] for i in range(len(packed))]
    assert len(packed) > 4 and all(len(row["input_ids"]) <= limit for row in rows)
    learnt = lambda many: sorted(t for row in many for t in row["labels"].tolist() if t != -100)
    assert learnt(rows) == learnt(samples[i] for i in range(len(samples)))
