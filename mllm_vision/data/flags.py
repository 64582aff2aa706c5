"""The flags of training data, shared by the recipes. Nothing here imports torch before the data is opened."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

COLUMN = {"help": "The name of the column, where it is not recognised."}


@dataclass(kw_only=True)
class DataArguments:
    """Which rows are trained on."""

    dataset_name: str = field(metadata={"help": "The training data: a file, folder, pattern or Hub id."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration.", "rare": True})
    dataset_split: str = field(default="train", metadata={"help": "Its split to train on."})
    image_root: str | None = field(default=None, metadata={"help": "The folder that relative image paths start from."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on at most this many rows, drawn at random."}
    )
    image_column: str | None = field(default=None, metadata=COLUMN)

    @property
    def overrides(self) -> dict[str, str | None]:
        """Role -> column; None where it is to be found by its name."""
        names = [entry.name for entry in dataclasses.fields(self) if entry.name.endswith("_column")]
        return {name.removesuffix("_column"): getattr(self, name) for name in names}

    @property
    def columns(self) -> dict[str, str]:
        """Role -> column, of those that are named."""
        return {role: name for role, name in self.overrides.items() if name}

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

    def open(self, streams: Any, arguments: Any) -> tuple[Any, Any]:
        """(records, stream): all rows and None, or with `--streaming` the stream's first rows and the stream.

        Args:
            streams: the `StreamArguments`.
            arguments: the `TrainingArguments`; seed and number of steps are read.
        """
        if not streams.streaming:
            return self.load(), None
        limits = {"seed": arguments.seed, "max_steps": arguments.max_steps}
        stream = streams.open(self.dataset_name, **self.where, **limits)
        return stream.head(), stream


@dataclass(kw_only=True)
class PairArguments(DataArguments):
    """Which image-text pairs are trained on."""

    caption_column: str | None = field(default=None, metadata=COLUMN)
    label_column: str | None = field(default=None, metadata=COLUMN)
    crop_scale: list[float] = field(
        default_factory=lambda: [0.9, 1.0], metadata={"help": "The share of the image that a training crop keeps."}
    )
