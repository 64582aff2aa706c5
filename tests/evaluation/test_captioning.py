"""Captions of a tiny model against its own figures by a second path, and the rows that are left out."""

from __future__ import annotations

import pytest
import tiny
import torch
from datasets import Dataset

from mllm_vision.data import CHAT_TEMPLATES, bind_conversations, load_image, load_records
from mllm_vision.encoder import VisionEncoder
from mllm_vision.evaluation import Captioning
from mllm_vision.evaluation.language.caption_scores import bleu, cider_d
from mllm_vision.evaluation.language.captions import Captioned, shuffled
from mllm_vision.evaluation.language.generation import AnswerGenerator
from mllm_vision.vlm import build_vlm
from mllm_vision.vlm.measure import answer

COLUMNS = {"image": "image", "caption": "captions"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = tiny.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
    language_model = tiny.tiny_llama(len(tokenizer), initializer_range=0.4)
    model, processor = build_vlm(encoder, language_model, tokenizer=tokenizer, chat_template=CHAT_TEMPLATES["plain"])
    with torch.no_grad():
        for parameter in model.model.model.multi_modal_projector.parameters():
            parameter.mul_(20)
    return model.eval(), processor


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.parquet"
    return load_records(str(tiny.write_pairs_parquet(path, n=7, captions_each=3)))


def test_figures_are_those_of_captions_one_by_one(pair, records) -> None:
    """The second path: `answer`, which encodes and generates a single image."""
    model, processor = pair
    result = Captioning("c", records, COLUMNS, processor, batch_size=3, max_new_tokens=6).examine(model)
    asked = [{"role": "user", "content": [{"type": "image"}]}]
    said = [answer(model, processor, asked, [load_image(row["image"])], max_new_tokens=6) for row in records]
    assert len(set(said)) > 3  # otherwise the comparison would say nothing
    references = [row["captions"] for row in records]
    each = cider_d(said, references)
    assert result.metrics == pytest.approx({"cider": sum(each) / 7, "bleu4": bleu(said, references), "count": 7.0})
    assert result.errors["cider"] == pytest.approx(float(torch.tensor(each).std(correction=0)) / 7**0.5)
    assert [sample["prediction"] for sample in result.samples] == said
    assert [sample["references"] for sample in result.samples] == references
    assert set(result.baselines) == {"shuffled", "no_image"}
    assert result.record()["details"]["errors"] == result.errors


def test_a_perfect_captioner_beats_its_own_shuffled_captions(pair, records, monkeypatch) -> None:
    model, processor = pair
    words = iter([row["captions"][0] for row in records] + ["a"] * 7)
    monkeypatch.setattr(AnswerGenerator, "answer", lambda self, images, asked: [next(words) for _ in asked])
    result = Captioning("c", records, COLUMNS, processor).examine(model)
    references = [row["captions"] for row in records]
    perfect = cider_d([each[0] for each in references], references)
    assert result.metrics["cider"] == pytest.approx(sum(perfect) / 7) and result.metrics["cider"] > 1
    # Images 0-3 show four colours of one shape, 4-6 of another: captions of others are worse.
    assert result.baselines["shuffled"]["cider"] < result.metrics["cider"]
    assert result.baselines["no_image"]["cider"] == 0.0


def test_shuffled_gives_every_image_the_caption_of_another() -> None:
    captioned = [Captioned(row, f"caption {row}", [f"reference {row}"]) for row in range(9)]
    moved = shuffled(captioned)
    assert sorted(each.row for each in moved) == list(range(9)) and moved == shuffled(captioned)
    assert all(each.references == [f"reference {each.row}"] for each in moved)
    assert all(each.text != f"caption {each.row}" for each in moved)
    assert sorted(each.text for each in moved) == sorted(each.text for each in captioned)


def test_blind_captions_are_generated_once(pair, records, monkeypatch) -> None:
    model, processor = pair
    generated = []
    inner = AnswerGenerator._generate
    monkeypatch.setattr(
        AnswerGenerator, "_generate", lambda self, *given: generated.append(len(given[0])) or inner(self, *given)
    )
    result = Captioning("c", records, COLUMNS, processor, blind=True, max_new_tokens=3).examine(model)
    assert generated == [1] and len({sample["prediction"] for sample in result.samples}) == 1
    assert "no_image" not in result.baselines


def test_conversations_several_images_and_prompts(pair) -> None:
    model, processor = pair
    images = [tiny.random_image(number) for number in range(3)]
    turns = [
        [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a red circle"}],
        [{"from": "human", "value": "<image> and <image>?"}, {"from": "gpt", "value": "a circle"}],
        [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hello"}],
    ]
    rows = Dataset.from_dict({"image": [images[:1], images[1:], []], "conversations": turns})
    columns = {"image": "image", "conversations": "conversations"}
    evaluator = Captioning("c", rows, columns, processor, max_new_tokens=4, no_image_baseline=False)
    result = evaluator.examine(model)
    assert result.metrics["count"] == 2 and result.metrics["skipped"] == 1 and result.refused == {"no image": 1}
    asked = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nwhat is it?"}]}]]
    two = [{"type": "image"}, {"type": "text", "text": " and "}, {"type": "image"}, {"type": "text", "text": "?"}]
    asked.append([{"role": "user", "content": two}])
    said = [answer(model, processor, one, own, max_new_tokens=4) for one, own in zip(asked, (images[:1], images[1:]))]
    assert [sample["prediction"] for sample in result.samples] == said
    prompted = Captioning("c", rows, columns, processor, prompt="describe", max_new_tokens=4).examine(model)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "describe"}]}]
    assert prompted.samples[0]["prediction"] == answer(model, processor, question, images[:1], max_new_tokens=4)


def test_rows_that_cannot_be_captioned_are_counted(pair, caplog) -> None:
    model, processor = pair
    good = tiny.image_bytes(tiny.random_image(0))
    cells = [{"bytes": each, "path": None} for each in (good, b"broken", good, good)] + [None]
    rows = Dataset.from_dict({"image": cells, "captions": [["a"], ["b"], [], ["c", None], ["d"]]})
    result = Captioning("c", rows, COLUMNS, processor, max_new_tokens=2).examine(model)
    assert result.metrics["count"] == 2 and result.metrics["skipped"] == 3
    assert result.refused == {
        "the image cannot be decoded": 1, "the caption is empty": 1, "the caption has no image": 1,
    }  # fmt: skip
    assert "row 1" in caplog.text and [sample["references"] for sample in result.samples] == [["a"], ["c"]]
    nothing = Dataset.from_dict({"image": cells[1:2], "captions": [["b"]]})
    with pytest.raises(ValueError, match="none of 1 rows can be captioned .the image cannot be decoded"):
        Captioning("c", nothing, COLUMNS, processor).examine(model)


def test_captions_and_conversations_give_the_same_figures(pair) -> None:
    """Stage one's template writes the image alone, whatever a conversation asks."""
    image = tiny.image_bytes(tiny.random_image(3))
    ask = {"from": "human", "value": "Describe it.\n<image>"}
    captions = [{"image": image, "caption": text} for text in (["a star"], "a circle", None)]
    talks = [
        {"image": [image], "conversations": [ask, {"from": "gpt", "value": text}]}
        for text in ("a star", "a circle", "")
    ]
    found = [
        Captioning("c", records, bind_conversations(records), pair[1], max_new_tokens=4).examine(pair[0])
        for records in (captions, talks)
    ]
    assert found[0].metrics == found[1].metrics and found[0].samples == found[1].samples
    assert [sample["answer"] for sample in found[0].samples] == ["a star", "a circle"]
    assert sum(found[0].refused.values()) == sum(found[1].refused.values()) == 1
