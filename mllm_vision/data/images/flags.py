"""The flags of a set of images without texts, shared by the recipes. Nothing here imports torch before it is opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mllm_vision.data.flags import COLUMN, DataArguments


@dataclass(kw_only=True)
class ImageArguments(DataArguments):
    """Which images are trained on."""

    label_column: str | None = field(default=None, metadata=COLUMN)
    decode_size: int | None = field(
        default=None,
        metadata={"help": "Shrink larger images to this shorter side; by default twice the encoder's.", "rare": True},
    )

    def dataset(self, records: Any, encoder: Any, *, seed: int, labelled: bool = False) -> Any:
        """A `ImageDataset` of the records, its images no larger than views of the encoder's size need.

        Args:
            records: of `load`, or the first rows of a stream.
            encoder: a `VisionEncoder`.
            seed: of the views.
            labelled: a row without a label is a bad one.
        """
        from mllm_vision.data.images.dataset import ImageDataset

        size = self.decode_size or 2 * encoder.image_size
        return ImageDataset(records, self.columns, seed=seed, decode_size=size, labelled=labelled)
