"""Evaluation takes the rows that training takes, counts those it leaves out, and draws where it takes fewer."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from datasets import Dataset
from tiny import image_bytes, random_image

from mllm_vision.data import PairDataset
from mllm_vision.data.records.sampling import EpochDataset, OwnRows
from mllm_vision.evaluation import Geometry, LabelledImages, Retrieval, ZeroShot
from mllm_vision.evaluation.base import examine
from mllm_vision.evaluation.language.question_answering import read_questions

IMAGE, BROKEN = image_bytes(random_image(0, 16)), b"broken"


class FakeDual:
    def encode_images(self, images):
        return torch.stack([torch.tensor([image.getpixel((0, 0))], dtype=torch.float32)[0] + 1 for image in images])

    def encode_texts(self, texts):
        return torch.stack([torch.tensor([len(text), 1.0, 2.0]) for text in texts])


def cells(*values):
    """An image column of lists, as `datasets` stores several images a row."""
    return [None if value is None else [{"bytes": each, "path": None} for each in value] for value in values]


def test_zero_shot_counts_what_it_leaves_out(caplog) -> None:
    images = cells([IMAGE], [IMAGE, IMAGE], [BROKEN], None, [], [IMAGE])
    data = Dataset.from_dict({"images": images, "kind": ["ape", "bee", "ape", "bee", "ape", None]})
    with caplog.at_level(logging.WARNING):
        evaluator = ZeroShot("zs", data, columns={"image": "images", "label": "kind"})
        result = evaluator.examine(FakeDual())
    assert evaluator.examine(FakeDual()).refused == result.refused  # not counted twice
    assert result.metrics["count"] == 2 and result.metrics["skipped"] == 4
    assert result.refused == {
        "the image is missing": 2,
        "the image cannot be decoded": 1,
        "the row has no label": 1,
    }
    assert result.record()["details"]["refused"] == result.refused
    assert "1 others are left out" in caplog.text and "row 2" in caplog.text


def test_a_sorted_set_is_drawn_from_and_its_classes_are_all_known() -> None:
    data = Dataset.from_dict({"image": [{"bytes": IMAGE, "path": None}] * 60, "label": ["ape"] * 30 + ["bee"] * 30})
    evaluator = ZeroShot("zs", data, limit=12)
    assert len(evaluator.rows) == 12 and evaluator.class_names == ["ape", "bee"]
    assert 2 <= sum(row < 30 for row in evaluator.rows) <= 10
    assert evaluator.rows == ZeroShot("zs", data, limit=12).rows != ZeroShot("zs", data, limit=12, seed=1).rows
    assert evaluator.examine(FakeDual()).baselines["chance"]["accuracy"] == 0.5
    captions = Dataset.from_dict({"image": data["image"], "captions": [[f"row {i}"] for i in range(60)]})
    retrieval = Retrieval("r", captions, limit=12)
    assert len(retrieval.rows) == 12 and max(retrieval.rows) > 20
    asked = Dataset.from_dict({"image": data["image"], "q": ["what?"] * 60, "a": ["yes"] * 30 + ["no"] * 30})
    questions = read_questions(asked, {"image": "image", "question": "q", "answer": "a"}, None, limit=12)
    assert {question.answers[0] for question in questions} == {"yes", "no"} and len(questions) == 12


def test_retrieval_leaves_out_rows_without_captions_as_training_does() -> None:
    captions = [["a dog"], [None, " "], None, ["", "two  words"], ["a cat"], ["x"]]
    images = cells([IMAGE], [IMAGE], [IMAGE], [None, IMAGE], [BROKEN], [IMAGE])
    images[3] = [None, *images[3][1:]]
    data = Dataset.from_dict({"image": images, "captions": captions})
    result = Retrieval("r", data).examine(FakeDual())
    assert result.metrics["images"] == 3 and result.metrics["texts"] == 3 and result.metrics["skipped"] == 3
    assert result.refused == {"the caption is empty": 2, "the image cannot be decoded": 1}
    dataset = PairDataset(data)
    taken = [isinstance(OwnRows(dataset)[row], dict) for row in range(6)]
    assert taken == [True, False, False, True, False, True] and dataset.bad_samples.seen == 0
    geometry = Geometry("g", data, {"image": "image", "caption": "captions"}, feature="embedding")
    assert geometry.examine(FakeDual()).refused == {"the image cannot be decoded": 1}


def test_labelled_sets_take_labels_of_two_types() -> None:
    train = [{"image": IMAGE, "label": label} for label in (0.0, 1.0, float("nan"), 1.0)]
    test = [{"image": IMAGE, "label": label} for label in (True, False, None, 0.5)]
    data = LabelledImages(train, test)
    assert data.class_names == ["0", "1"] and data.train_labels == [0, 1, -1, 1] and data.test_labels == [1, 0, -1, -1]
    assert data.count() == (3, 2) and sorted(why.reason for why in data.refused.values()) == [
        "the label is not an integer",
        "the row has no label",
        "the row has no label",
    ]
    with pytest.raises(ValueError, match="none of the 1 rows of the test set has a label"):
        LabelledImages(train, test[2:3])


def test_a_held_out_row_that_cannot_be_used_is_left_out_and_none_counts_twice(caplog) -> None:
    from mllm_vision.vlm import HeldOutLoss

    class Rows(EpochDataset):
        def __len__(self) -> int:
            return 5

        def _read(self, index, key):
            if index == 2:
                raise KeyError("image")
            return {"input_ids": torch.tensor([index, index]), "labels": torch.tensor([-100, index])}

    class Model(torch.nn.Linear):
        """Its loss is the mean of the supervised tokens."""

        def forward(self, input_ids, labels):
            return type("Output", (), {"loss": labels[:, 1].double().mean()})

    def collate(rows):
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    with caplog.at_level(logging.WARNING):
        result = examine(HeldOutLoss("loss", Rows(0, 5, None), collate, 2), Model(1, 1))
    assert result.metrics == pytest.approx({"loss": (0 + 1 + 3 + 4) / 4, "perplexity": math.exp(2), "skipped": 1.0})
    assert caplog.text.count("row 2") == 1
