"""POPE's figures of an evaluator against hand counts."""

from __future__ import annotations

import pytest
import tiny
from datasets import Dataset

from mllm_vision.data import CHAT_TEMPLATES
from mllm_vision.encoder import VisionEncoder
from mllm_vision.evaluation import YesNo
from mllm_vision.evaluation.language.generation import AnswerGenerator
from mllm_vision.vlm import build_vlm

ASKED = [  # question, answer, category, what the model says
    ("is there a dog?", "yes", "random", "Yes, there is."),
    ("is there a cat?", "no", "random", "yes"),
    ("is there a fox?", "no", "popular", "No"),
    ("is there a cow?", ["yes", "yes", "no"], "popular", "There is not."),
    ("is there a hen?", "no", "popular", "a hen"),
    ("how many dogs?", "2", "popular", "no"),
    ("is there a pig?", ["yes", "no"], "popular", "no"),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    tokenizer = tiny.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
    return build_vlm(encoder, tiny.tiny_llama(len(tokenizer)), tokenizer=tokenizer, chat_template=CHAT_TEMPLATES["qa"])


def rows(asked=ASKED):
    listed = [
        {"image": tiny.random_image(n), "question": q, "answer": a if isinstance(a, list) else [a], "category": kind}
        for n, (q, a, kind, _) in enumerate(asked)
    ]
    return Dataset.from_list(listed)


def test_figures_and_baselines_by_hand(pair, monkeypatch) -> None:
    model, processor = pair
    said = {question: text for question, _, _, text in ASKED}
    monkeypatch.setattr(AnswerGenerator, "answer", lambda self, images, asked: [said[text] for _, text in asked])
    columns = {"image": "image", "question": "question", "answer": "answer"}
    result = YesNo("pope", rows(), columns, processor, by="category", no_image_baseline=True).examine(model)
    # Labels yes no no yes no; read as yes yes no no yes. The last two questions have no label.
    expected = {"f1": 2 * (1 / 3 * 1 / 2) / (1 / 3 + 1 / 2), "precision": 1 / 3, "recall": 1 / 2, "accuracy": 2 / 5}
    expected |= {"yes_ratio": 3 / 5, "neither": 2 / 5, "count": 5.0}
    expected |= {"f1_random": 2 / 3, "accuracy_random": 1 / 2, "f1_popular": 0.0, "accuracy_popular": 1 / 3}
    assert result.metrics == pytest.approx(expected)
    assert result.baselines["always_yes"]["f1"] == pytest.approx(2 * 0.4 / 1.4)
    assert result.baselines["majority"] | {"f1": 0.0, "accuracy": 0.6} == result.baselines["majority"]
    assert result.baselines["no_image"] == result.metrics  # the stand-in for the model does not look
    table = {row["name"]: row for row in result.tables["question_type"]}
    assert table["popular"]["count"] == 3 and table["popular"]["majority_answer"] == "no"
    assert table["popular"]["accuracy"] == pytest.approx(1 / 3) and table["popular"]["majority"] == pytest.approx(2 / 3)
    right = {sample["question"]: sample["correct"] for sample in result.samples}
    assert right == {"is there a dog?": True, "is there a cat?": False, "is there a fox?": True,
                     "is there a cow?": False, "is there a hen?": False}  # fmt: skip


def test_a_set_without_yes_or_no_is_refused(pair) -> None:
    columns = {"image": "image", "question": "question", "answer": "answer"}
    with pytest.raises(ValueError, match="no question of 1 has yes or no as answer"):
        YesNo("pope", rows(ASKED[5:6]), columns, pair[1])
