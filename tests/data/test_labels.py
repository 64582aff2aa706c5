"""Labels of every form as class numbers, or a refusal in words."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from tiny import image_bytes, random_image

from mllm_vision.data import BadRow, ImageDataset, bind_columns, load_records
from mllm_vision.data.records.labels import column_labels, label_value, read_labels


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[(empty, None) for empty in (None, float("nan"), -1, -1.0, "", " \t", np.float32("nan"))],
        *[(3, 3), (3.0, 3), (np.int64(3), 3), (np.float32(2.0), 2), (True, 1), (np.bool_(False), 0), ([4], 4)],
        *[("cat", "cat"), (" cat\n", "cat"), (b"dog", "dog"), ("3", "3"), ("None", "None"), ("-1", "-1")],
    ],
)
def test_values_that_are_labels(value, expected) -> None:
    assert label_value(value) == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        *[(0.5, "the label is not an integer"), (float("inf"), "the label is not an integer")],
        *[(-2, "the label is negative"), (2**80, "the label is too large a number")],
        *[
            ([1, 2], "the label is not a class"),
            ([], "the label is not a class"),
            ({"id": 1}, "the label is not a class"),
        ],
        *[
            (np.arange(2), "the label is not a class"),
            (b"\xff\xfe", "the label is not text"),
            (1j, "the label is not a class"),
        ],
    ],
)
def test_values_that_are_none(value, reason) -> None:
    with pytest.raises(BadRow) as caught:
        label_value(value)
    assert caught.value.reason == reason and str(caught.value).startswith(f"{reason}: ")


def test_columns_of_every_kind() -> None:
    words = read_labels(["dog", None, "cat ", "", "dog"])
    assert words.numbers.tolist() == [1, -1, 0, -1, 1] and words.names == ["cat", "dog"] and words.labelled == [0, 2, 4]
    mixed = read_labels(["dog", 3, True, 2.0])
    assert mixed.names == ["1", "2", "3", "dog"] and mixed.numbers.tolist() == [3, 2, 0, 1]
    gaps = read_labels([7.0, float("nan"), 9.0, 0.5])
    assert gaps.numbers.tolist() == [7, -1, 9, -1] and gaps.names is None and list(gaps.bad) == [3]
    assert gaps.numbered().names == ["7", "9"] and gaps.numbered().numbers.tolist() == [0, -1, 1, -1]
    assert read_labels([0, 1, 2]).numbered().numbers.tolist() == [0, 1, 2]
    named = read_labels(["bee", 0, "wasp", 5, -1], ["ape", "bee"])
    assert named.numbers.tolist() == [1, 0, -1, -1, -1]
    assert {row: why.reason for row, why in named.bad.items()} == dict.fromkeys(
        [2, 3], "the label is not one of the classes"
    )
    features = Features({"label": ClassLabel(names=["ape", "bee"])})
    classes = column_labels(Dataset.from_dict({"label": [1, None, 0]}, features=features), "label")
    assert classes.numbers.tolist() == [1, -1, 0] and classes.names == ["ape", "bee"]


@pytest.mark.parametrize("kind", [Value("float32"), Value("bool"), Value("int8"), Value("string"), Value("null")])
def test_every_type_of_column_is_bound_by_its_name(kind) -> None:
    features = Features({"image": Value("binary"), "target": kind})
    values = {"string": ["1", "0", None], "null": [None] * 3}.get(str(kind.dtype), [1, 0, None])
    data = Dataset.from_dict({"image": [image_bytes(random_image(0, 8))] * 3, "target": values}, features=features)
    assert bind_columns(data, ("image", "label"))["label"] == "target"
    dataset = ImageDataset(data)
    assert dataset.labels.tolist() == ([-1] * 3 if kind.dtype == "null" else [1, 0, -1])


def test_a_table_of_comma_separated_values(tmp_path) -> None:
    for number in range(4):
        random_image(number, 8).save(tmp_path / f"{number}.png")
    (tmp_path / "sums.csv").write_text("image,class\n0.png,2\n1.png,\n2.png,5\n3.png,2\n")
    dataset = ImageDataset(load_records(tmp_path / "sums.csv"), labelled=True)
    assert len(dataset) == 3 and [dataset[index]["label"] for index in range(3)] == [0, 1, 0]
    assert dataset.class_names == ["2", "5"] and [dataset.record_of(index) for index in range(3)] == [0, 2, 3]


def test_partly_labelled_rows(caplog) -> None:
    """Unlabelled rows are left out and told; a label that is none is a bad row, counted up to the limit."""
    labels = [0, None, 1, 0.5, None, 1]
    rows = [{"image": image_bytes(random_image(i, 8)), "label": label} for i, label in enumerate(labels)]
    with caplog.at_level(logging.WARNING):
        dataset = ImageDataset(rows, labelled=True)
    assert "4 of the 6 rows have a label" in caplog.text and "row 3: the label is not an integer" in caplog.text
    assert len(dataset) == 4 and {dataset[index]["label"] for index in range(4)} == {0, 1}
    assert dataset.bad_samples.count == 1 and dataset.bad_samples.examples[0].startswith(
        "row 3: the label is not an integer"
    )
    free = ImageDataset(rows)  # where labels are not asked for, none of them is a reason to lose an image
    assert [free[index]["label"] for index in range(6)] == [0, -1, 1, -1, -1, 1] and free.bad_samples.count == 0
    for nothing in ([None] * 3, [0.25] * 3):
        with pytest.raises(ValueError, match="none of the 3 rows has a label in column 'label'.*--label_column"):
            ImageDataset([{"image": b"?", "label": label} for label in nothing], labelled=True)
