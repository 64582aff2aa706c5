"""Packed = unpacked: what a packed row computes is what its conversations compute one by one."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from mllm_vision.data import ConversationCollator, ConversationDataset, PackedConversations, PackedSamples
from mllm_vision.data.chat.packing import best_fit
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
    model.model.set_attn_implementation({"text_config": attention})
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
    model.model.set_attn_implementation({"text_config": "sdpa"})
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


# ---- any samples in a row ----------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(30, 60), st.integers(0, 9))
def test_bins_hold_every_item_once_and_nothing_would_fit_elsewhere(lengths, room, seed) -> None:
    lengths = np.array(lengths)
    bins = best_fit(lengths, room, seed)
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(lengths)))
    filled = [int(lengths[each].sum()) for each in bins]
    assert all(total <= room or len(each) == 1 for total, each in zip(filled, bins, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(bins, best_fit(lengths, room, seed), strict=True))
    # an item that opened a bin had no room in the bins before it
    for later in range(1, len(bins)):
        first = int(lengths[bins[later][0]])
        assert all(total + first > room for total in filled[:later])


def mixed(model, processor, records=RECORDS, **options):
    samples = ConversationDataset(
        records, None, processor.tokenizer, layout=layout_of(model, processor), chat_template=CHAT_TEMPLATES["vicuna"],
        **options,
    )  # fmt: skip
    return samples, PackedSamples(samples, max_length=2 * int(samples.longest_wordings().max()))


@pytest.mark.parametrize("max_turns", [None, 1])
def test_rows_of_any_samples_have_their_loss_and_gradients(built, max_turns) -> None:
    model, processor = built
    records = [*RECORDS, {"image": None, "questions": ["how many legs has a cat?"], "answers": ["four"]}]
    samples, packed = mixed(model, processor, records, max_turns=max_turns)
    assert len(packed) < len(samples) and 0.5 < packed.filled <= 1
    collate = ConversationCollator(processor.tokenizer, layout_of(model, processor))
    found = {}
    for name, dataset in (("separate", samples), ("packed", packed)):
        model.zero_grad()
        batch = collate([dataset[i] for i in range(len(dataset))])
        assert len(batch["pixel_values"]) == (10 if max_turns else 4)
        loss = model.train()(**batch).loss
        loss.backward()
        found[name] = (
            loss.item(),
            int((batch["labels"] != -100).sum()),
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        )
    assert found["separate"][1] == found["packed"][1]
    assert found["separate"][0] == pytest.approx(found["packed"][0], rel=1e-5)
    for name, gradient in found["separate"][2].items():
        torch.testing.assert_close(found["packed"][2][name], gradient, atol=1e-5, rtol=2e-4, msg=name)


def test_rows_do_not_depend_on_the_epoch_but_their_draws_do(built) -> None:
    model, processor = built
    _, packed = mixed(model, processor)
    _, again = mixed(model, processor)
    before = [packed[i]["input_ids"].tolist() for i in range(len(packed))]
    assert [again[i]["input_ids"].tolist() for i in range(len(again))] == before
    packed.set_epoch(1)
    after = [packed[i]["input_ids"].tolist() for i in range(len(packed))]
    assert after != before and [sorted(row) for row in after] == [sorted(row) for row in before]
    assert [len(row) for row in before] == packed.lengths.tolist()


def test_a_sample_that_cannot_be_read_leaves_its_row(built) -> None:
    model, processor = built
    broken = {"image": {"bytes": b"none", "path": None}, "questions": ["is it?"], "answers": ["no"]}
    _, packed = mixed(model, processor, [RECORDS[0], broken, RECORDS[1]], seed=1)
    rows = [packed[i] for i in range(len(packed))]
    assert sum(len(row["images"]) for row in rows) == 2 and packed.bad_samples.count == 1


def test_other_wordings_keep_to_the_limit(built) -> None:
    model, processor = built
    captions = ["a cat", "a very long caption of a red circle that is left of a blue star", "a dog there"]
    records = [{"image": tiny.random_image(n), "captions": captions[: 1 + n % 3]} for n in range(9)]
    samples, _ = mixed(model, processor, records)
    found = samples.longest_wordings()
    for index in range(len(samples)):
        read = {len(samples._read(index, key)["input_ids"]) for key in range(3)}
        assert max(read) == found[index] and samples.lengths[index] in read
