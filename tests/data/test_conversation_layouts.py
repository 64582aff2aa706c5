"""Conversations whose images take as many tokens as their size says: tokens, lengths, refusals, caches, streams."""

from __future__ import annotations

import logging
import os

import numpy as np
import pytest
import torch
from layouts_for_tests import FAKE, SQUARE, any_resolution, image_of, native_aspect
from PIL import Image
from tiny import image_bytes, tiny_tokenizer
from transformers.models.got_ocr2 import GotOcr2ImageProcessorPil

from mllm_vision.data import ConversationCollator, ConversationDataset, PackedConversations
from mllm_vision.data.chat import token_cache
from mllm_vision.data.images import sizes as sizes_module
from mllm_vision.data.images.layouts import TilesLayout
from mllm_vision.data.images.sizes import column_sizes

QA = {"image": "image", "question": "questions", "answer": "answers"}
TALK = {"image": "image", "conversations": "conversations"}
SIZES = [(40, 90), (64, 64), (20, 33), (90, 20)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<img>", "</img>", FAKE]}, replace_extra_special_tokens=False
    )
    return tokenizer


@pytest.fixture(scope="module")
def native(tokenizer):
    return any_resolution(tokenizer)[1]


@pytest.fixture(scope="module")
def layout(tokenizer):
    return any_resolution(tokenizer)[0]


def tiles(tokenizer):
    read = tokenizer.convert_tokens_to_ids
    processor = GotOcr2ImageProcessorPil(size=SQUARE, max_patches=6)
    return TilesLayout(read("<image>"), 4, processor, read("<img>"), read("</img>"))


def data(number, kind="PNG"):
    return image_bytes(image_of(*SIZES[number]), kind)


def build(records, columns, tokenizer, layout, **options):
    options = {"chat_template": "vicuna", "max_length": 1000, **options}
    return ConversationDataset(records, columns, tokenizer, layout=layout, progress=False, **options)


def part(text):
    return {"type": "text", "text": text}


def talk(image, *turns):
    """A LLaVA record: turns alternate between human and gpt."""
    said = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return {"image": image, "conversations": said}


def asked(number, turns):
    """A record of several questions on one image."""
    questions = [f"what colour is star {k} of {number}?" for k in range(turns)]
    return {"image": data(number % 4), "questions": questions, "answers": [f"{k} of {number}" for k in range(turns)]}


def supervised(sample, tokenizer):
    return tokenizer.decode([i for i in sample["labels"].tolist() if i != -100])


RECORDS = [
    talk(data(0), "<image>\nq?", "a"),
    talk(None, "only text", "b"),
    talk([data(1), data(2)], "<image> and <image>\nwhat?", "c", "and <image>?".replace("<image>", "then"), "d"),
    {"conversations": [
        {"from": "human", "value": [{"type": "image", "image": image_of(*SIZES[3])}, part("inside?")]},
        {"from": "gpt", "value": "e"},
    ]},
]  # fmt: skip


# -- tokens, lengths and tensors --------------------------------------------------------------------------------------


def test_samples_are_what_the_native_processor_makes(tokenizer, native, layout):
    """Texts and images of each row through transformers' own processor, one row at a time."""
    dataset = build(RECORDS, TALK, tokenizer, layout)
    assert len(dataset) == 4 and dataset.lengths.tolist() == [len(dataset[i]["input_ids"]) for i in range(4)]
    of_each = [[SIZES[0]], [], [SIZES[1], SIZES[2]], [SIZES[3]]]
    for index, sizes in enumerate(of_each):
        sample = dataset[index]
        assert [(image.height, image.width) for image in sample["images"]] == sizes
        text = tokenizer.decode(dataset.tokens_of(index)[0])
        given = native(text=text, images=[image_of(*size) for size in sizes] or None, add_special_tokens=False)
        assert sample["input_ids"].tolist() == np.asarray(given["input_ids"]).reshape(-1).tolist()
        assert supervised(sample, tokenizer).replace("</s>", "").split() == [["a"], ["b"], ["c", "d"], ["e"]][index]
    batch = ConversationCollator(tokenizer, layout)([dataset[i] for i in range(4)])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values", "image_sizes", "tiles"}
    assert batch["image_sizes"].tolist() == [list(size) for sizes in of_each for size in sizes]
    each = [native.image_processor(image_of(*size), return_tensors="pt")["pixel_values"][0] for size in SIZES]
    assert torch.equal(batch["pixel_values"], torch.cat(each))
    assert set(ConversationCollator(tokenizer, layout)([dataset[1]])) == {"input_ids", "attention_mask", "labels"}


def test_tiles_and_shared_marks(tokenizer):
    found = tiles(tokenizer)
    dataset = build(RECORDS, TALK, tokenizer, found)
    assert not dataset.refused
    expected = [len(found.tokens(*size)) for size in SIZES]
    marks = [(dataset[i]["input_ids"] == found.image_token_id).sum() for i in range(4)]
    assert marks == [expected[0] - 2, 0, expected[1] + expected[2] - 4, expected[3] - 2]
    batch = ConversationCollator(tokenizer, found)([dataset[i] for i in range(4)])
    assert (4 * batch["tiles"]).tolist() == [count - 2 for count in expected]
    assert len(batch["pixel_values"]) == int(batch["tiles"].sum())
    idefics, _ = native_aspect(tokenizer)
    two = [talk([data(1), data(2)], "<image><image>\nwhat?", "c")]
    sample = build(two, TALK, tokenizer, idefics, chat_template="qa")[0]
    assert (sample["input_ids"] == idefics.shared).sum() == 3, "one mark between two images with nothing between them"
    assert (sample["input_ids"] == idefics.image_token_id).sum() == 8 and (sample["labels"] != -100).sum() == 2


# -- what is refused --------------------------------------------------------------------------------------------------


def test_too_many_tiles_are_refused_in_words(tokenizer, layout):
    records = [talk(data(2), "<image>\nq?", "fits"), talk(data(1), "<image>\nq?", "does not")]
    lengths = build(records, TALK, tokenizer, layout).lengths
    assert lengths[1] - lengths[0] > 8
    for image_token_limit in (int(lengths[1]) - 1, 90):
        dataset = build(records, TALK, tokenizer, layout, max_length=image_token_limit)
        assert len(dataset) == 1 and dataset.refused == {"longer than max_length": 1}
    [example] = dataset.bad_samples.examples
    of_images, text = len(layout.tokens(*SIZES[1])), int(lengths[1]) - len(layout.tokens(*SIZES[1]))
    assert f"{lengths[1]} tokens, max_length=90 ({of_images} of 1 images and {text} of text)" in example
    assert "let an image take fewer tiles" in example
    with pytest.raises(ValueError, match=r"no conversation of 2 can be used[\s\S]*of 1 images"):
        build(records, TALK, tokenizer, layout, max_length=30)
    exact = build(records, TALK, tokenizer, layout, max_length=int(lengths[1]))
    assert len(exact) == 2
    cut = build(records, TALK, tokenizer, layout, max_length=int(lengths[1]) - 1, on_truncation="truncate")
    assert len(cut[1]["input_ids"]) == lengths[1] - 1 and cut.truncated == 1
    refused = build(records, TALK, tokenizer, layout, max_length=90, on_truncation="truncate")
    assert refused.refused == {"truncation would cut image tokens": 1}
    assert f"{of_images} of 1 images" in refused.bad_samples.examples[0]


def test_images_that_cannot_be_read_are_refused_beforehand(tokenizer, layout, caplog):
    good = data(0)
    inside = [
        {"from": "human", "value": [{"type": "image", "image": "nowhere.png"}, part("q?")]},
        {"from": "gpt", "value": "a"},
    ]
    records = [talk(good, "<image>\nq?", "a"), talk([good, good[:20]], "<image><image>\nq?", "b"),
               {"image": None, "conversations": inside}, talk(b"text", "<image>\nq?", "c")]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        dataset = build(records, TALK, tokenizer, layout)
    assert len(dataset) == 1
    assert dataset.refused == {"the image cannot be decoded": 2, "the image does not exist": 1}
    assert "3 of 4 conversations are refused" in caplog.text
    assert "row 1: image of 20 bytes cannot be decoded" in dataset.bad_samples.examples[0]


def test_an_image_that_changed_is_not_trained_on(tokenizer, layout, tmp_path):
    file = tmp_path / "a.png"
    image_of(40, 90).save(file)
    dataset = build([talk(str(file), "<image>\nq?", "a")], TALK, tokenizer, layout)
    assert len(dataset[0]["images"]) == 1
    image_of(41, 90).save(file)
    with pytest.raises(ValueError, match=r"41x90 pixels, 40x90 when the data was opened"):
        dataset[0]


# -- questions, packing, streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["qa", "vicuna"])
def test_shuffled_and_shared_out_questions(tokenizer, layout, template):
    records = [asked(number, 5) for number in range(4)]
    dataset = build(records, QA, tokenizer, layout, chat_template=template, max_turns=2, seed=4)
    assert len(dataset) == 12
    for epoch in range(2):
        dataset.set_epoch(epoch)
        samples = [dataset[i] for i in range(12)]
        for index, sample in enumerate(samples):
            expected = len(layout.tokens(*SIZES[index // 3]))
            assert (sample["input_ids"] == layout.image_token_id).sum() == expected
            assert sample["images"][0].size == SIZES[index // 3][::-1]
        said = sorted(text.strip() for s in samples for text in supervised(s, tokenizer).split("</s>") if text.strip())
        assert said == sorted(f"{k} of {i}" for i in range(4) for k in range(5))


def test_packed_questions_share_the_tokens_of_their_image(tokenizer, layout):
    records = [asked(number, 3) for number in range(2)]
    samples = build(records, QA, tokenizer, layout, max_turns=1, shuffle_turns=False)
    packed = PackedConversations(samples, max_length=600)
    assert len(packed) == 2
    for row in range(2):
        found = packed[row]
        tokens = len(layout.tokens(*SIZES[row]))
        assert (found["input_ids"] == layout.image_token_id).sum() == tokens
        assert len(found["input_ids"]) == samples.lengths[3 * row : 3 * row + 3].sum() - 2 * (found["turns"] == 0).sum()
        for turn in (1, 2, 3):
            own = (found["turns"] == 0) | (found["turns"] == turn)
            assert found["input_ids"][own].tolist() == samples[3 * row + turn - 1]["input_ids"].tolist()


def test_rows_of_a_stream_read_their_sizes(tokenizer, layout):
    whole = build(RECORDS, TALK, tokenizer, layout)
    reader = build(RECORDS, TALK, tokenizer, layout, streamed=True)
    for index, record in enumerate(RECORDS):
        row = reader.read_record({"image": None, **record}, 5, index)
        assert row["input_ids"].tolist() == whole[index]["input_ids"].tolist()
    short = build(RECORDS, TALK, tokenizer, layout, streamed=True, max_length=40)
    with pytest.raises(ValueError, match=r"of 1 images and .* of text"):
        short.read_record(RECORDS[0], 5, 0)


# -- what is cached ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Sizes and tokens go through a cache of their own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "_IN_MEMORY", 0)
    monkeypatch.setattr(sizes_module, "_IN_MEMORY", 0)
    return tmp_path / "cache" / "mllm_vision"


def table(rows):
    from datasets import Dataset

    return Dataset.from_list(
        [row | {"image": row["image"] if isinstance(row["image"], list) else [row["image"]]} for row in rows]
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_sizes_are_those_in_memory(tokenizer, layout, cache, monkeypatch, workers):
    rows = [*RECORDS[:3], talk(data(3)[:20], "<image>\nq?", "bad")] * 40
    monkeypatch.setattr(sizes_module, "_workers", lambda rows: workers)
    plain = build(rows, TALK, tokenizer, layout)
    state = torch.get_rng_state()
    kept = build(table(rows), TALK, tokenizer, layout)
    assert torch.equal(torch.get_rng_state(), state), "a run that finds the sizes draws the same random numbers"
    assert kept.refused == plain.refused == {"the image cannot be decoded": 40}
    assert kept.bad_samples.examples == plain.bad_samples.examples
    assert kept.lengths.tolist() == plain.lengths.tolist()
    for index in (0, 1, 2, 50, 119):
        assert np.array_equal(kept[index]["input_ids"], plain[index]["input_ids"])
        assert np.array_equal(kept.sizes_of(index), plain.sizes_of(index))
    assert len(list(cache.glob("sizes-*.arrow"))) == 1 and not list(cache.glob("*.part"))
    monkeypatch.setattr(sizes_module, "image_size", None)  # the second time no header is read
    again = build(table(rows).select(range(160)), TALK, tokenizer, layout)
    assert again.lengths.tolist() == plain.lengths.tolist()


def test_selected_rows_have_their_own_sizes(cache):
    rows = table([{"image": data(number)} for number in range(4)])
    chosen = rows.select([3, 1])
    found = column_sizes(chosen, "image", progress=False).to_pylist()
    assert [row["sizes"] for row in found] == [list(SIZES[3]), list(SIZES[1])]
    assert len(list(cache.glob("sizes-*.arrow"))) == 1
    assert column_sizes(rows.select([1, 3]), "image", progress=False).to_pylist() == found[::-1]


def test_cached_sizes_are_never_stale(tokenizer, layout, cache, tmp_path):
    file, other = tmp_path / "a.png", tmp_path / "b.png"
    other.write_bytes(data(1))

    def lengths():
        rows = table([talk(str(each), "<image>\nq?", "a") for each in (file, other)])
        return build(rows, TALK, tokenizer, layout).lengths.tolist()

    image_of(40, 90).save(file)
    first = lengths()
    Image.new("RGB", (64, 64)).save(file)
    os.utime(file, ns=(1, 1))
    second = lengths()
    assert first[0] != second[0] and first[1] == second[1]
    assert (
        build(table([talk(str(file), "<image>\nq?", "a")]), TALK, tokenizer, tiles(tokenizer)).lengths[0] != second[0]
    )
