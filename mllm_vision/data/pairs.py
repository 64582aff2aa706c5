"""Image-caption pairs for contrastive training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm_vision.data.images.files import BadImage, describe, first_image, image_source
from mllm_vision.data.images.transforms import ImageTransform, load_image
from mllm_vision.data.records.columns import bind_columns
from mllm_vision.data.records.forms import warn_of_further_images
from mllm_vision.data.records.sampling import (
    BadRow,
    BadSamples,
    EpochDataset,
    bytes_id,
    draw_key,
    only_columns,
    rows_of,
    text_id,
)
from mllm_vision.data.text_length import cut_text


class PairDataset(EpochDataset):
    """One image and one of its captions a row.

    Args:
        records: a `datasets.Dataset` (or a list of dicts) with undecoded images, see `load_records`.
        columns: role -> column for "image" and "caption", as `bind_columns` gives it.
        transform: decodes with its own settings (large JPEGs at reduced scale in training); optional.
        seed: with the epoch and the index it decides which caption is drawn, and the sample's random crop.
        bad_samples: a counter to share; otherwise one is made (`bad_samples`).

    A row is {"image": PIL, "caption": str, "image_id": int, "key": int, "index": int}. A row whose image cannot
    be decoded or that has no non-empty caption is counted and replaced by the next good one; `index` is then
    the other row's.

    Raises:
        ValueError: an empty data set, or a column that does not exist or has the wrong type.
    """

    def __init__(
        self,
        records: Any,
        columns: dict[str, str] | None = None,
        *,
        transform: ImageTransform | None = None,
        seed: int = 0,
        bad_samples: BadSamples | None = None,
    ) -> None:
        self._rows = rows_of(records)
        self.columns = bind_columns(records, ("image", "caption"), columns)
        self.records = only_columns(records, list(self.columns.values()))
        self.transform = transform
        warn_of_further_images(self.records, self.columns["image"])
        super().__init__(seed, self._rows, bad_samples)

    def __len__(self) -> int:
        return self._rows

    def captions(self, index: int) -> list[str]:
        """All non-empty captions of a row."""
        return captions_of(only_columns(self.records, [self.columns["caption"]])[index][self.columns["caption"]])

    def _read(self, index: int, key: int) -> dict[str, Any]:
        return self.read_record(self.records[index], key, index)

    def read_record(self, record: dict[str, Any], key: int, index: int) -> dict[str, Any]:
        """A record as a row, wherever it comes from (a stream's do); ValueError when it cannot be used."""
        captions = captions_of(record.get(self.columns["caption"]))
        if not captions:
            raise BadRow("the caption is empty")
        value = first_image(record.get(self.columns["image"]))
        crop_key = draw_key(key, 1)
        image = self.transform.load(value, crop_key) if self.transform is not None else load_image(value)
        return {
            "image": image,
            "caption": captions[key % len(captions)],
            "image_id": image_id(value),
            "key": crop_key,
            "index": index,
        }


class PairCollator:
    """Rows of `PairDataset` (or `{"image", "caption"}` dicts) to the batch that contrastive objectives take.

    Args:
        transform: images to pixel values.
        tokenizer: of the text tower; it must have a padding token, and add by itself what the tower expects.
        max_length: in tokens; longer captions are cut (special tokens stay).
        padding: "longest", or "max_length" for towers that read a fixed position (SigLIP).

    Gives "pixel_values" `[B, 3, H, W]`, "input_ids" and "attention_mask" `[B, T]`, and "caption_ids" and
    "image_ids" `[B]` int64: equal ids mean the very same caption or image, so that the loss does not take
    one for the other's negative.
    """

    def __init__(self, transform: ImageTransform, tokenizer: Any, max_length: int, *, padding: str = "longest") -> None:
        if max_length < 2:
            raise ValueError(f"max_length={max_length} leaves no room for text; use at least 2 tokens")
        if padding not in ("longest", "max_length"):
            raise ValueError(f"padding={padding!r} is neither 'longest' nor 'max_length'")
        if getattr(tokenizer, "pad_token_id", None) is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no padding token; set tokenizer.pad_token = tokenizer.eos_token"
            )
        self.transform, self.tokenizer, self.max_length, self.padding = transform, tokenizer, int(max_length), padding

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        captions = [row["caption"] for row in rows]
        images = [row["image"] for row in rows]
        keys = [row["key"] for row in rows] if all("key" in row for row in rows) else None
        text = self.tokenizer(
            [cut_text(caption, self.tokenizer, self.max_length) for caption in captions],
            padding=self.padding,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,  # SigLIP's tokenizer gives none by itself
            return_tensors="pt",
        )
        ids = [row["image_id"] if "image_id" in row else image_id(row["image"]) for row in rows]
        return {
            "pixel_values": self.transform(images, keys=keys),
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "caption_ids": torch.tensor([text_id(caption) for caption in captions], dtype=torch.int64),
            "image_ids": torch.tensor(ids, dtype=torch.int64),
        }


def image_id(value: Any) -> int:
    """A stable 63-bit id of an image: of its encoded bytes where they are known, otherwise of its pixels.

    Two encodings of the same pixels get two ids; a path is read, so that copies of a file are recognised.
    """
    source = image_source(value)
    if isinstance(source, Path):
        try:
            source = source.read_bytes()
        except OSError as error:
            raise BadImage(f"{describe(value)} cannot be read: {error}", "the image cannot be read") from error
    if isinstance(source, bytes):
        return bytes_id(source)
    image = load_image(source)
    return bytes_id(f"{image.size}".encode() + image.tobytes())


def captions_of(value: Any) -> list[str]:
    """The non-empty captions of a cell that holds one or a list of them; values that are not text are ignored.

    A whole number is its digits: captions of digits are integers in Parquet and JSON.
    A lone surrogate, half of a character that no text can hold, becomes a question mark.
    """
    texts = value if isinstance(value, list | tuple) else [value]
    texts = [str(text) if isinstance(text, int) and not isinstance(text, bool) else text for text in texts]
    found = [text.encode("utf-8", "replace").decode() for text in texts if isinstance(text, str)]
    return [text.strip() for text in found if text.strip()]
