"""The data that evaluators are built from by flags: each file is opened once, labelled images are shared."""

from __future__ import annotations

from typing import Any

from mllm_vision.data import bind_columns, load_records
from mllm_vision.data.records.records import UsualSplit
from mllm_vision.evaluation.labelled.images import LabelledImages

ROLES = ("image", "caption", "label", "question", "answer")


class Sources:
    """Opens data and binds columns for `Evaluator.from_flags`.

    Args:
        flags: `dataset_split`, `training_dataset_name`, `<role>_column` and the limits, as in scripts/evaluate.py.
        kind: of the model: `"encoder"`, `"dual"` or `"vlm"`.
        processor: of a vision-language model.
    """

    def __init__(self, flags: Any, kind: str, processor: Any = None) -> None:
        self.flags, self.kind, self.processor = flags, kind, processor
        self.split = flags.dataset_split or UsualSplit("test", "--dataset_split")
        self.named = {role: name for role in ROLES if (name := getattr(flags, f"{role}_column"))}
        self._opened: dict[tuple[str, Any, int | None], Any] = {}
        self._labelled: dict[int, LabelledImages] = {}

    def test(self, path: str) -> Any:
        """Records of a test set."""
        return self._open(path, self.split, None)

    def training(self, max_rows: int | None = None) -> Any:
        """Records of `--training_dataset_name`; None without it."""
        name = self.flags.training_dataset_name
        return self._open(name, self.flags.training_split, max_rows) if name else None

    def columns(self, records: Any, *roles: str) -> dict[str, str]:
        """Role -> column; see `bind_columns`."""
        return bind_columns(records, roles, self.named)

    def labelled_images(self, name: str, records: Any) -> LabelledImages:
        """Training and test images; evaluators of one test set share them, so that they are encoded once.

        Raises:
            ValueError: no `--training_dataset_name`.
        """
        flags, training = self.flags, self.training()
        if training is None:
            raise ValueError(f"--task {name} needs labelled training images: set --training_dataset_name")
        if id(records) not in self._labelled:
            columns = {role: column for role, column in self.named.items() if role in ("image", "label")}
            limits = {"train_limit": flags.max_training_samples, "test_limit": flags.max_samples, "seed": flags.seed}
            settings = {"feature": flags.feature, "batch_size": flags.batch_size, **limits}
            self._labelled[id(records)] = LabelledImages(training, records, columns, **settings)
        return self._labelled[id(records)]

    def _open(self, path: str, split: Any, max_rows: int | None) -> Any:
        key = (path, split, max_rows)
        if key not in self._opened:
            self._opened[key] = load_records(path, split=split, max_rows=max_rows, image_root=self.flags.image_root)
        return self._opened[key]
