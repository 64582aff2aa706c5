"""Pictures for learning from images alone: decoded once, in 8 bits; their views are made of the batch (`views.py`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .columns import bind_columns
from .decoding import BadImage, load_image
from .sampling import BadRow, BadSamples, EpochDataset, only_columns, rows_of, text_id

_LONGEST = 4  # times the shorter side; of a longer panorama the middle is kept, so that it does not pad a whole batch


class PictureDataset(EpochDataset):
    """One picture a row, with its label where the data has one.

    Args:
        records: a `datasets.Dataset` (or a list of dicts) with undecoded pictures, see `load_records`.
        columns: role -> column for "image" and "label"; otherwise found by name and type (`bind_columns`).
        seed: with the epoch and the index it decides a sample's views.
        decode_size: pictures whose shorter side is longer are shrunk to it (a JPEG while it is decoded); the views
            have no use for more than about twice their own size. None leaves all as they are.
        labelled: every row must have its label.
        bad_samples: a counter to share; otherwise one is made (`bad_samples`).

    A row is {"image": PIL, "key": int, "index": int} and "label": int where there is a label column, -1 where the
    row has none. A row whose picture cannot be decoded (or which has no label, where all must be labelled) is counted
    and replaced by the next good one; `index` is then the other row's. Labels in words are numbered in alphabetical
    order.

    Attributes: `labels` `[rows]` int64 (-1 where missing) or None, `class_names` or None, `unlabelled`: how many rows
    have no label. Of a stream they are those of its first rows.

    Raises:
        ValueError: an empty data set, a column that does not exist or has the wrong type, or `decode_size` below 1.
    """

    def __init__(
        self,
        records: Any,
        columns: dict[str, str] | None = None,
        *,
        seed: int = 0,
        decode_size: int | None = None,
        labelled: bool = False,
        bad_samples: BadSamples | None = None,
    ) -> None:
        if decode_size is not None and decode_size < 1:
            raise ValueError(f"decode_size={decode_size} must be at least 1 pixel, or None")
        self._rows, self.decode_size, self.labelled = rows_of(records), decode_size, labelled
        self.columns = bind_columns(records, ("image", "label?"), columns)
        self.records = only_columns(records, [self.columns["image"]])
        self.labels, self.class_names = None, None
        if "label" in self.columns:
            self.labels, self.class_names = _read_labels(records, self.columns["label"])
        super().__init__(seed, self._rows, bad_samples)

    def __len__(self) -> int:
        return self._rows

    @property
    def unlabelled(self) -> int:
        return len(self) if self.labels is None else int((self.labels < 0).sum())

    def _read(self, index: int, key: int) -> dict[str, Any]:
        return self._row(self.records[index], None if self.labels is None else int(self.labels[index]), key, index)

    def read_record(self, record: dict[str, Any], key: int, index: int) -> dict[str, Any]:
        """A record of a stream as a row, a word's label being a number of its own; ValueError where it is of no use."""
        label = None
        if "label" in self.columns:
            label = record[self.columns["label"]]
            if no_label(label):
                label = -1
            elif isinstance(label, str):
                label = text_id(label)  # a stream's classes are not known beforehand, but equal words are one class
            label = int(label)
        return self._row(record, label, key, index)

    def _row(self, record: dict[str, Any], label: int | None, key: int, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {"key": key, "index": index}
        if label is not None:
            if label < 0 and self.labelled:
                raise BadRow("the row has no label", f"column {self.columns['label']!r} is empty")
            row["label"] = label
        value = record[self.columns["image"]]
        if isinstance(value, list | tuple):
            if not value:
                raise BadImage("the row has no image", "the image is missing")
            value = value[0]
        row["image"] = _bounded(load_image(value, draft=self._draft), self.decode_size)
        return row

    def _draft(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) that a JPEG must keep while it is decoded."""
        if self.decode_size is None:
            return height, width
        share = min(1.0, self.decode_size / min(height, width))
        return math.ceil(height * share), math.ceil(width * share)


class PictureCollator:
    """Rows of `PictureDataset` (or `{"image"}` dicts) to 8-bit pixels, for `ViewMaker` to make views of.

    Gives "pixels" `[B, 3, H, W]` uint8, the pictures at the top left of the largest height and width; "sizes"
    `[B, 2]` int64, height and width of each; "seeds" and "index" `[B]` int64, and "labels" `[B]` int64 where all
    rows have one. Rows without a key are seeded by their place in the batch.
    """

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        if len(rows) == 0:
            raise ValueError("no pictures: the batch is empty")
        arrays = [np.asarray(load_image(row["image"])) for row in rows]
        sizes = torch.tensor([array.shape[:2] for array in arrays], dtype=torch.int64)
        if bool((sizes == sizes[0]).all()):
            stacked = torch.from_numpy(np.stack(arrays))
        else:
            height, width = sizes.amax(0).tolist()
            stacked = torch.zeros(len(arrays), height, width, 3, dtype=torch.uint8)
            for place, array in enumerate(arrays):
                stacked[place, : array.shape[0], : array.shape[1]] = torch.tensor(array)
        batch = {"pixels": stacked.permute(0, 3, 1, 2), "sizes": sizes}  # channels last in memory, as decoded
        for column, name in (("seeds", "key"), ("index", "index")):
            values = [row.get(name, place) for place, row in enumerate(rows)]
            batch[column] = torch.tensor(values, dtype=torch.int64)
        if all(row.get("label") is not None for row in rows):
            batch["labels"] = torch.tensor([row["label"] for row in rows], dtype=torch.int64)
        return batch


def _bounded(image: Image.Image, decode_size: int | None) -> Image.Image:
    """The picture no longer than four times its shorter side, and that side no longer than `decode_size`."""
    width, height = image.size
    shorter = min(width, height)
    if max(width, height) > _LONGEST * shorter:
        wide, high = min(width, _LONGEST * shorter), min(height, _LONGEST * shorter)
        left, top = (width - wide) // 2, (height - high) // 2
        image = image.crop((left, top, left + wide, top + high))
    if decode_size is None or shorter <= decode_size:
        return image
    width, height = (max(decode_size, round(side * decode_size / shorter)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)


def no_label(value: Any) -> bool:
    """Whether a cell of a label column is empty: None, -1, or a text of nothing but blanks."""
    return value is None or value == -1 or (isinstance(value, str) and not value.strip())


def _read_labels(records: Any, column: str) -> tuple[Tensor, list[str] | None]:
    """Every row's label as a number, -1 where it is missing, and the names of the classes where they have any."""
    only = only_columns(records, [column])
    values = only[column][:] if hasattr(only, "column_names") else [record.get(column) for record in records]
    feature = getattr(records, "features", None)
    names = getattr(feature[column], "names", None) if feature is not None else None
    values = [None if no_label(value) else value for value in values]
    if any(isinstance(value, str) for value in values):
        names = sorted({value for value in values if value is not None})
        numbers = {name: number for number, name in enumerate(names)}
        values = [None if value is None else numbers[value] for value in values]
    labels = torch.tensor([-1 if value is None else int(value) for value in values], dtype=torch.int64)
    return labels, None if names is None else list(names)
