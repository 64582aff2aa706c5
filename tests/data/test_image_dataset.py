"""Images decoded once: rows, labels, bad rows, sizes, and the 8-bit batch."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import random_image

from mllm_vision.data import ImageCollator, ImageDataset, load_records


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def rows(count: int = 6, **columns) -> list[dict]:
    """Records of small PNGs, with further columns given as functions of the index."""
    made = []
    for index in range(count):
        made.append({"image": encoded(random_image(index, 16))})
        made[-1].update({name: value(index) for name, value in columns.items()})
    return made


def test_rows_and_draws() -> None:
    dataset = ImageDataset(rows(label=lambda i: i % 3), seed=5)
    row = dataset[2]
    assert (row["index"], row["label"], row["image"].size) == (2, 2, (16, 16))
    again = ImageDataset(rows(label=lambda i: i % 3), seed=5)
    assert again[2]["key"] == row["key"] and dataset[3]["key"] != row["key"]
    dataset.set_epoch(1)
    assert dataset[2]["key"] != row["key"]
    assert ImageDataset(rows(), seed=6)[2]["key"] != row["key"] and "label" not in ImageDataset(rows())[0]


def test_labels() -> None:
    words = ImageDataset(rows(label=lambda i: ["dog", "cat", "bird"][i % 3]))
    assert words.class_names == ["bird", "cat", "dog"] and words.labels.tolist() == [2, 1, 0, 2, 1, 0]
    numbers = ImageDataset(rows(fine=lambda i: 7 - i), {"label": "fine"})
    assert numbers.labels.tolist() == [7, 6, 5, 4, 3, 2] and numbers.class_names is None
    assert ImageDataset(rows()).labels is None
    gaps = ImageDataset(rows(label=lambda i: ["dog", "", " ", None, "cat", "dog"][i]))
    assert gaps.class_names == ["cat", "dog"] and gaps.labels.tolist() == [1, -1, -1, -1, 0, 1]


def test_labels_of_a_table(data_dir) -> None:
    dataset = ImageDataset(load_records(data_dir / "cifar10_test.parquet", max_rows=20))
    assert dataset.class_names[0] == "airplane" and dataset[7]["label"] == int(dataset.labels[7])


def test_bad_rows_are_passed_over() -> None:
    records = rows(label=lambda i: None if i == 4 else i)
    records[1]["image"] = b"not an image"
    dataset = ImageDataset(records, labelled=True)
    assert len(dataset) == 5 and [dataset[i]["label"] for i in range(5)] == [0, 2, 2, 3, 4]  # of 0, 1, 2, 3 and 5
    assert dataset.class_names == ["0", "1", "2", "3", "5"]
    assert dataset.bad_samples.count == 1 and dataset[1]["key"] != dataset[2]["key"]
    assert any("cannot be decoded" in example for example in dataset.bad_samples.examples)
    kept = ImageDataset(records)  # labels are for those who have them
    assert [kept[i]["index"] for i in range(6)] == [0, 2, 2, 3, 4, 5] and kept[4]["label"] == -1
    assert (kept.unlabelled, ImageDataset(rows()).unlabelled) == (1, 6)


def test_records_of_a_stream() -> None:
    """A row of a stream is that of the table; words are numbered without knowing the others."""
    records = rows(8, label=lambda i: None if i == 4 else i)
    dataset = ImageDataset(records, seed=5)
    for index in (2, 4):
        wanted, found = dataset[index], dataset.read_record(records[index], 77, index)
        assert (found["label"], found["key"]) == (wanted["label"], 77) and wanted["image"] == found["image"]
    words = rows(label=lambda i: ["dog", "cat"][i % 2])
    labels = [ImageDataset(words[:2]).read_record(word, 0, 0)["label"] for word in words]
    assert labels[0] == labels[2] != labels[1] == labels[3]
    assert ImageDataset(words[:2]).read_record(words[0] | {"label": ""}, 0, 0)["label"] == -1
    with pytest.raises(ValueError, match="cannot be decoded"):
        dataset.read_record({"image": b"none", "label": 1}, 0, 0)


@pytest.mark.parametrize(
    ("size", "decode_size", "expected"),
    [((90, 60), None, (90, 60)), ((90, 60), 30, (45, 30)), ((90, 60), 60, (90, 60)), ((400, 20), None, (80, 20))],
)
def test_sizes(size: tuple[int, int], decode_size: int | None, expected: tuple[int, int]) -> None:
    records = [{"image": Image.new("RGB", size)}]
    assert ImageDataset(records, decode_size=decode_size)[0]["image"].size == expected


def test_of_a_panorama_the_middle_is_kept() -> None:
    for long, box in (
        (Image.new("RGB", (400, 20)), (160, 0, 240, 20)),
        (Image.new("RGB", (20, 400)), (0, 160, 20, 240)),
    ):
        long.paste("red", box)
        assert ImageDataset([{"image": long}])[0]["image"].getcolors() == [(1600, (255, 0, 0))]


def test_a_jpeg_is_decoded_small() -> None:
    """The draft of a large JPEG shows what a full decode and resize shows."""
    smooth = random_image(0, 8).resize((640, 480), Image.Resampling.BICUBIC)
    made = ImageDataset([{"image": encoded(smooth, "JPEG")}], decode_size=60)[0]["image"]
    whole = smooth.resize((80, 60), Image.Resampling.BOX)
    assert made.size == (80, 60)
    assert np.abs(np.asarray(made, dtype=float) - np.asarray(whole, dtype=float)).mean() < 3.0


def test_the_batch() -> None:
    images = [random_image(0, 16), random_image(1, 16).resize((20, 12))]
    given = [{"image": image, "key": 5 + i, "index": 9 - i, "label": i} for i, image in enumerate(images)]
    batch = ImageCollator()(given)
    assert batch["pixels"].shape == (2, 3, 16, 20) and batch["pixels"].dtype == torch.uint8
    assert batch["sizes"].tolist() == [[16, 16], [12, 20]]
    assert (batch["seeds"].tolist(), batch["index"].tolist(), batch["labels"].tolist()) == ([5, 6], [9, 8], [0, 1])
    for place, image in enumerate(images):
        height, width = batch["sizes"][place].tolist()
        assert np.array_equal(batch["pixels"][place, :, :height, :width].permute(1, 2, 0), np.asarray(image))
    assert not batch["pixels"][0, :, :, 16:].any() and not batch["pixels"][1, :, 12:].any()
    assert "labels" not in ImageCollator()([{"image": images[0]}])


def test_errors() -> None:
    with pytest.raises(ValueError, match="decode_size=0"):
        ImageDataset(rows(), decode_size=0)
    with pytest.raises(ValueError, match="did you mean 'label'"):
        ImageDataset(rows(label=lambda i: i), {"label": "lable"})
    with pytest.raises(ValueError, match="empty"):
        ImageDataset([])
    with pytest.raises(ValueError, match="batch is empty"):
        ImageCollator()([])
