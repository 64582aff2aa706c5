"""Images for learning from images alone: decoded once, in 8 bits; their views are made of the batch (`views.py`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mllm_vision.data.images.decoding import load_image
from mllm_vision.data.images.files import first_image
from mllm_vision.data.records.columns import bind_columns
from mllm_vision.data.records.forms import warn_of_further_images
from mllm_vision.data.records.labels import column_labels, label_value
from mllm_vision.data.records.sampling import BadRow, BadSamples, EpochDataset, only_columns, rows_of, text_id

logger = logging.getLogger(__name__)
_LONGEST = 4  # times the shorter side; of a longer panorama the middle is kept, so that it does not pad a whole batch


class ImageDataset(EpochDataset):
    """One image a row, with its label where the data has one.

    Args:
        records: a `datasets.Dataset` (or a list of dicts) with undecoded images, see `load_records`.
        columns: role -> column for "image" and "label"; otherwise found by name and type (`bind_columns`).
        seed: with the epoch and the index it decides a sample's views.
        decode_size: images whose shorter side is longer are shrunk to it (a JPEG while it is decoded); the views
            have no use for more than about twice their own size. None leaves all as they are.
        labelled: take the rows that have a label alone; their number is reported.
        bad_samples: a counter to share; otherwise one is made (`bad_samples`).

    A row is {"image": PIL, "key": int, "index": int} and "label": int where there is a label column, -1 where the
    row has none. A row whose image cannot be decoded is counted and replaced by the next good one; `index` is then
    the other row's. Of a list of images the first one is used. Labels are read by `labels.read_labels`: strings
    are numbered in alphabetical order, and with `labelled` integers too, where they are not 0, 1, 2...; a value
    that is not a class (0.5) counts as missing and is reported; with `labelled` it is a bad row.

    Attributes: `labels` `[rows of the records]` int64 (-1 where missing) or None, `class_names` or None, `unlabelled`:
    how many rows have no label. Of a stream they are those of its first rows.

    Raises:
        ValueError: an empty data set, a column that does not exist or has the wrong type, `decode_size` below 1, or
            with `labelled` not one label.
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
        warn_of_further_images(self.records, self.columns["image"])
        self.labels: Tensor | None = None
        self.class_names: list[str] | None = None
        self._places: np.ndarray | None = None  # the rows that are taken, where not all are
        self._bad_labels: dict[int, BadRow] = {}
        if "label" in self.columns:
            self._take_labels(records)
        super().__init__(seed, len(self), bad_samples)

    def _take_labels(self, records: Any) -> None:
        found = column_labels(records, self.columns["label"])
        found.report(f"column {self.columns['label']!r}")
        if self.labelled:
            found, self._bad_labels = found.numbered(), found.bad
            kept = (found.numbers >= 0).numpy()
            kept[list(found.bad)] = True
            self._places = np.flatnonzero(kept)
            if not found.labelled:
                why = f", such as row {min(found.bad)}: {found.bad[min(found.bad)]}" if found.bad else ""
                raise ValueError(
                    f"none of the {self._rows} rows has a label in column {self.columns['label']!r}{why}; name another "
                    "column with --label_column"
                )
            if len(self._places) < self._rows:
                message = "%d of the %d rows have a label in column %r: these are trained on"
                logger.warning(message, len(self._places), self._rows, self.columns["label"])
        self.labels, self.class_names = found.numbers, found.names

    def __len__(self) -> int:
        return self._rows if self._places is None else len(self._places)

    @property
    def unlabelled(self) -> int:
        return self._rows if self.labels is None else int((self.labels < 0).sum())

    def record_of(self, index: int) -> int:
        """The row of the records that a sample comes from."""
        return index if self._places is None else int(self._places[index])

    def _read(self, index: int, key: int) -> dict[str, Any]:
        row = self.record_of(index)
        if row in self._bad_labels:
            raise self._bad_labels[row]
        return self._row(self.records[row], None if self.labels is None else int(self.labels[row]), key, index)

    def read_record(self, record: dict[str, Any], key: int, index: int) -> dict[str, Any]:
        """A record of a stream as a row, a word's label being a number of its own; ValueError where it is of no use."""
        if "label" not in self.columns:
            return self._row(record, None, key, index)
        label = label_value(record.get(self.columns["label"])) if self.labelled else self._label_or_none(record)
        if isinstance(label, str):
            label = text_id(label)  # a stream's classes are not known beforehand, but equal names are one class
        return self._row(record, -1 if label is None else label, key, index)

    def _label_or_none(self, record: dict[str, Any]) -> int | str | None:
        try:
            return label_value(record.get(self.columns["label"]))
        except BadRow:  # reported for the first rows; this one is trained on without
            return None

    def _row(self, record: dict[str, Any], label: int | None, key: int, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {"key": key, "index": index}
        if label is not None:
            if label < 0 and self.labelled:
                raise BadRow("the row has no label", f"column {self.columns['label']!r} is empty")
            row["label"] = label
        value = first_image(record.get(self.columns["image"]))
        row["image"] = _bounded(load_image(value, draft=self._draft), self.decode_size)
        return row

    def _draft(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) that a JPEG must keep while it is decoded."""
        if self.decode_size is None:
            return height, width
        share = min(1.0, self.decode_size / min(height, width))
        return math.ceil(height * share), math.ceil(width * share)


class ImageCollator:
    """Rows of `ImageDataset` (or `{"image"}` dicts) to 8-bit pixels, for `ViewMaker` to make views of.

    Gives "pixels" `[B, 3, H, W]` uint8, the images at the top left of the largest height and width; "sizes"
    `[B, 2]` int64, height and width of each; "seeds" and "index" `[B]` int64, and "labels" `[B]` int64 where all
    rows have one. Rows without a key are seeded by their place in the batch.
    """

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        if len(rows) == 0:
            raise ValueError("no images: the batch is empty")
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
    """The image no longer than four times its shorter side, and that side no longer than `decode_size`."""
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
