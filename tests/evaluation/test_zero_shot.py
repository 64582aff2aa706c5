"""Zero-shot accuracy against embeddings whose answer is known beforehand."""

from __future__ import annotations

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from tiny import image_bytes, random_image

from mllm_vision.evaluation import ZeroShot
from mllm_vision.evaluation.zero_shot import class_embeddings

COLUMNS = {"image": "image", "label": "label"}


def records(labels: list, seen: list[int], feature: object = None) -> Dataset:
    """Images whose first pixel says which class FakeDual will see in them."""
    images = []
    for number in seen:
        image = random_image(0, 8)
        image.putpixel((0, 0), (number, 0, 0))
        images.append({"bytes": image_bytes(image), "path": None})
    features = None
    if feature is not None:
        features = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "label": feature})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


class FakeDual:
    """Embeds an image by its first pixel and a text by the position of its first letter in "abc...": one-hot."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode_images(self, images):
        return torch.eye(16)[[image.getpixel((0, 0))[0] for image in images]]

    def encode_texts(self, texts):
        self.texts += texts
        return torch.eye(16)[["abcdefghijklmnop".index(text.split()[-1][0]) for text in texts]]


def test_accuracy_per_class_and_confusion() -> None:
    data = records([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2], ClassLabel(names=["ape", "bee", "cat"]))
    evaluator = ZeroShot("zs", data, templates=["a {}", "one {}"], columns=COLUMNS, batch_size=4)
    result = evaluator.examine(FakeDual())
    metrics = result.metrics
    assert evaluator(FakeDual(), 3) == metrics
    assert metrics["accuracy"] == pytest.approx(4 / 6)  # right: rows 0, 1, 3, 5
    assert metrics["mean_class_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert result.baselines["chance"]["accuracy"] == pytest.approx(1 / 3)
    assert result.baselines["most_frequent_class"]["accuracy"] == pytest.approx(3 / 6)
    table = {row["name"]: (row["count"], row["accuracy"]) for row in result.tables["class"]}
    assert table == {"ape": (3, pytest.approx(2 / 3)), "bee": (2, 0.5), "cat": (1, 1.0)}
    assert result.arrays["confusion"]["counts"] == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    wrong = [sample for sample in result.samples if not sample["correct"]]
    assert [(sample["answer"], sample["prediction"]) for sample in wrong] == [("ape", "bee"), ("bee", "cat")]
    entry = result.record()
    assert entry["primary_metric"] == "accuracy" and entry["baselines"]["chance"] == pytest.approx(1 / 3)


def test_templates_are_ensembled_in_embedding_space() -> None:
    class Angles:
        """Angle of a prompt in degrees, with lengths that must not count."""

        table = {"x one": (1.0, 0.0), "y one": (0.0, 3.0), "x two": (0.0, 5.0), "y two": (0.0, 1.0)}

        def encode_texts(self, texts):
            return torch.tensor([self.table[text] for text in texts])

    rows = class_embeddings(Angles(), ["one", "two"], ["x {}", "y {}"])
    assert torch.allclose(rows, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))


def test_labels_as_names_and_top_five() -> None:
    names = [f"{letter}x" for letter in "abcdefghijkl"]
    data = records([names[0], names[11]], [0, 3])
    metrics = ZeroShot("zs", data, names, ("{}",), COLUMNS)(FakeDual(), 0)
    assert metrics["accuracy"] == 0.5
    assert metrics["top5_accuracy"] == 0.5  # the other classes tie at zero: counted against, so eleven stand before


def test_collapsed_model_scores_nothing() -> None:
    class Collapsed(FakeDual):
        def encode_images(self, images):
            return torch.ones(len(images), 4)

        def encode_texts(self, texts):
            return torch.ones(len(texts), 4)

    data = records([0, 1], [0, 1], ClassLabel(names=["ape", "bee"]))
    assert ZeroShot("zs", data, columns=COLUMNS)(Collapsed(), 0)["accuracy"] == 0.0


def test_bad_input() -> None:
    data = records([0, 5], [0, 1])
    with pytest.raises(ValueError, match="numbers without names; pass class_names"):
        ZeroShot("zs", data, columns=COLUMNS)
    with pytest.raises(ValueError, match="row 1 has label 5, which is none of the 2 classes"):
        ZeroShot("zs", data, ["ape", "bee"], columns=COLUMNS)
    with pytest.raises(ValueError, match="duplicates"):
        ZeroShot("zs", data, ["ape", "ape"], columns=COLUMNS)
    with pytest.raises(ValueError, match="no place for the class name"):
        ZeroShot("zs", records(["a"], [0]), ["a"], ["a photo"], COLUMNS)
    with pytest.raises(ValueError, match="needs a column for 'label'"):
        ZeroShot("zs", data, ["ape"], columns={"image": "image"})
    with pytest.raises(ValueError, match="letters, digits"):
        ZeroShot("zero shot", data, ["ape"], columns=COLUMNS)
    broken = Dataset.from_dict({"image": [{"bytes": b"x", "path": None}], "label": ["a"]})
    with pytest.raises(ValueError, match="none of the 1 images"):
        ZeroShot("zs", broken, ["a"], columns=COLUMNS)(FakeDual(), 0)
