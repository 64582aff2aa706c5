"""Weights of supervised tokens: by hand, over accumulated batches, packed, and none by default."""

from __future__ import annotations

import os

import numpy as np
import pytest
import tiny
import torch

from mllm_vision.data import (
    CHAT_TEMPLATES,
    ConversationCollator,
    ConversationDataset,
    PackedConversations,
    PackedSamples,
    StreamArguments,
    TokenWeights,
)
from mllm_vision.encoder import VisionEncoder
from mllm_vision.vlm import build_vlm
from mllm_vision.vlm.conversation import load_stage_data

ANSWERS = ["red", "a blue circle", "green", "there is nothing to the left of the large yellow star"]
RECORDS = [
    {
        "image": tiny.random_image(number),
        "questions": [f"what colour is number {k}?" for k in range(1 + number)],
        "answers": ANSWERS[: 1 + number],
    }
    for number in range(4)
]
SHARES = {"token": lambda n: 1.0, "sample": lambda n: 1 / n, "square_root": lambda n: n**-0.5}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = tiny.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
    return build_vlm(encoder, tiny.tiny_llama(len(tokenizer)), tokenizer=tokenizer)


def dataset(task, processor, records=RECORDS, template="qa", **options):
    layout = task.system.layout(task.model, processor)
    template = CHAT_TEMPLATES[template]
    options = {"layout": layout, "chat_template": template, "shuffle_turns": False, "progress": False, **options}
    return ConversationDataset(records, None, processor.tokenizer, **options), layout


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("max_turns", [None, 1, 2])
def test_weights_are_those_of_the_formula_with_a_mean_of_one(built, name, max_turns):
    samples, layout = dataset(*built, max_turns=max_turns)
    rows = [samples[number] for number in range(len(samples))]
    counts = [int((row["labels"] != -100).sum()) for row in rows]
    assert len(set(counts)) > 2
    shares = [SHARES[name](count) for count in counts]
    scale = sum(counts) / sum(count * share for count, share in zip(counts, shares, strict=True))
    batch = ConversationCollator(built[1].tokenizer, layout, token_weights=TokenWeights.of(name, samples))(rows)
    weights, supervised = batch["token_weights"], batch["labels"] != -100
    assert weights.dtype == torch.float32 and weights.shape == batch["labels"].shape
    for row, share in enumerate(shares):
        assert weights[row][supervised[row]].numpy() == pytest.approx(scale * share, rel=1e-6)
    assert not weights[~supervised].any()
    assert weights[supervised].mean().item() == pytest.approx(1, rel=1e-6)


def test_alternative_wordings_count_by_their_share_and_refused_rows_not_at_all(built):
    """Several captions of an image, each drawn as often as the others, and a row too long."""
    short, long = "a red star", "a small blue circle beside a large green square"
    records = [
        {"image": tiny.random_image(0), "captions": [short, long]},
        {"image": tiny.random_image(1), "captions": [long * 40]},
        {"image": tiny.random_image(2), "captions": [short]},
    ]
    samples, _ = dataset(*built, records=records, template="plain", max_length=128)
    assert len(samples) == 2 and sum(samples.refused.values()) == 1
    counts, shares = samples.supervised_tokens()
    size = {text: len(built[1].tokenizer(text, add_special_tokens=False).input_ids) for text in (short, long)}
    more = counts[0] - size[short]  # the end token, and what the template writes
    assert counts.tolist() == [size[short] + more, size[long] + more, size[short] + more]
    assert shares.tolist() == [0.5, 0.5, 1.0]
    a, b = counts[0], counts[1]
    scale = (1.5 * a + 0.5 * b) / (1.5 * np.sqrt(a) + 0.5 * np.sqrt(b))
    assert TokenWeights.of("square_root", samples).scale == pytest.approx(scale, rel=1e-12)


def gradients(task, batches, count):
    task.zero_grad()
    losses = [task(**batch, num_items_in_batch=count).loss for batch in batches]
    sum(losses).backward()
    found = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    return sum(losses).item(), found


def assert_same(first, second):
    assert first[0] == pytest.approx(second[0], rel=1e-5)
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        torch.testing.assert_close(second[1][name], gradient, atol=2e-6, rtol=2e-4, msg=name)


@pytest.mark.parametrize("name", ["sample", "square_root"])
def test_accumulated_batches_and_packed_rows_equal_the_whole_batch(built, name):
    task, processor = built
    samples, layout = dataset(task, processor, max_turns=1)
    packed = PackedConversations(samples, max_length=512)
    assert len(packed) == 4 < len(samples)
    collate = ConversationCollator(processor.tokenizer, layout, token_weights=TokenWeights.of(name, samples))
    rows = [samples[number] for number in range(len(samples))]
    whole = collate(rows)
    count = int((whole["labels"] != -100).sum())
    expected = gradients(task, [whole], count)
    assert_same(expected, gradients(task, [collate(rows[:3]), collate(rows[3:4]), collate(rows[4:])], count))
    assert_same(expected, gradients(task, [collate([packed[number] for number in range(4)])], count))
    mixed = PackedSamples(samples, max_length=200)
    assert 1 < len(mixed) < len(samples)
    assert_same(expected, gradients(task, [collate([mixed[number] for number in range(len(mixed))])], count))
    # mean over samples: the mean of each sample's own mean loss
    if name == "sample":
        plain = ConversationCollator(processor.tokenizer, layout)
        alone = [task(**plain([row])).loss.item() for row in rows]
        assert expected[0] == pytest.approx(np.mean(alone), rel=1e-5)


def test_a_stage_weighs_its_training_loss_only_where_asked(built, tmp_path):
    task, processor = built
    processor.chat_template = CHAT_TEMPLATES["qa"]
    file = os.fspath(tiny.write_pairs_parquet(tmp_path / "pairs.parquet", n=40, captions_each=2))
    given = {"roles": ("image", "caption")}
    plain = load_stage_data(task, processor, file, **given)
    assert plain.train_collator.token_weights is None
    before = plain.train_collator([plain.train[0], plain.train[1]])
    asked = load_stage_data(task, processor, file, **given, loss_weights="square_root")
    after = asked.train_collator([asked.train[0], asked.train[1]])
    assert after.keys() == before.keys() | {"token_weights"}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert asked.collator.token_weights is None, "the held-out loss is the mean over tokens"
    asked.use_layout(asked.train.layout, processor.tokenizer)  # as for cached features
    assert "token_weights" in asked.train_collator([asked.train[0]])
    with pytest.raises(ValueError, match="--loss_weights sample and --streaming are mutually exclusive"):
        streams = StreamArguments(streaming=True)
        load_stage_data(task, processor, file, file, **given, loss_weights="sample", streams=streams)
    with pytest.raises(ValueError, match="loss_weights='tokens' is not one of token, sample, square_root"):
        load_stage_data(task, processor, file, **given, loss_weights="tokens")
