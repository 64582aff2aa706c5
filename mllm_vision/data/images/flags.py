"""The flags of a set of images without texts, shared by the recipes. Nothing here imports torch before it is opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ImageArguments:
    """What the images are."""

    dataset_name: str = field(metadata={"help": "Images: a file, folder, pattern or Hub id."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that relative image paths start from."})
    image_column: str | None = field(default=None, metadata={"help": "Image column, where its name does not tell."})
    label_column: str | None = field(default=None, metadata={"help": "Label column, likewise."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use at most so many rows, drawn at random."})
    decode_size: int | None = field(
        default=None, metadata={"help": "Shrink larger images to this shorter side; default: twice the encoder's."}
    )

    @property
    def columns(self) -> dict[str, str]:
        """Role -> column, of those that are named."""
        named = {"image": self.image_column, "label": self.label_column}
        return {role: column for role, column in named.items() if column}

    @property
    def where(self) -> dict[str, Any]:
        """Which rows, as `load_records` and `StreamArguments.open` take it."""
        return {
            "split": self.dataset_split,
            "config_name": self.dataset_config_name,
            "max_rows": self.max_train_samples,
            "image_root": self.image_root,
        }

    def load(self) -> Any:
        """The records.

        Raises:
            ValueError: see `load_records`.
        """
        from mllm_vision.data.records.records import load_records

        return load_records(self.dataset_name, **self.where)

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
