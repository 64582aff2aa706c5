"""The flags of kNN and linear probe, online and at the end. Nothing here imports torch before they are built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mllm_vision.errors import unknown_name
from mllm_vision.evaluation.registry import LABELLED, load_evaluator

NAMES = ", ".join(LABELLED)


@dataclass
class LabelledArguments:
    """Which labelled images an encoder is measured with, when and how.

    Raises:
        ValueError: an unknown evaluator.
    """

    eval_dataset_name: str | None = field(default=None, metadata={"help": "Labelled images to measure accuracy on."})
    eval_split: str | None = field(default=None, metadata={"help": "Their split; by default test, or the only one."})
    eval_train_dataset_name: str | None = field(
        default=None, metadata={"help": "Labelled images that kNN and probe learn from; by default the training set."}
    )
    evaluators: list[str] = field(
        default_factory=lambda: ["knn"], metadata={"help": f"Measure these while training: {NAMES}."}
    )
    final_evaluators: list[str] = field(
        default_factory=lambda: ["knn", "probe"], metadata={"help": f"Measure these before and after it: {NAMES}."}
    )
    knn_k: int = field(default=20, metadata={"help": "Neighbours of kNN: 20 (DINO), 200 (MoCo).", "rare": True})
    knn_temperature: float = field(
        default=0.07, metadata={"help": "Temperature of their votes: 0.07 (DINO), 0.1 (MoCo).", "rare": True}
    )
    raw_pixels: bool = field(default=False, metadata={"help": "Measure the raw pixels too (slow).", "rare": True})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Test images, at most, drawn at random."})
    max_eval_train_samples: int | None = field(
        default=None, metadata={"help": "Labelled training images, at most.", "rare": True}
    )
    eval_cache_gb: float = field(
        default=4.0, metadata={"help": "GiB of decoded images that a process keeps of each of the two.", "rare": True}
    )

    def __post_init__(self) -> None:
        for name in [*self.evaluators, *self.final_evaluators]:
            if name not in LABELLED:
                raise ValueError(unknown_name("evaluator", name, LABELLED))

    def check_labels(self, dataset: Any, streaming: bool, *, objective: str = "") -> None:
        """Refuses a training set without labels where the method or a measurement is to learn from them.

        Args:
            dataset: the `ImageDataset`.
            streaming: whether it reads a stream.
            objective: the method that learns from labels.

        Raises:
            ValueError: it has no labels; it is a stream, and kNN and probe are to learn from it.
        """
        labelled = dataset.labels is not None and (streaming or dataset.unlabelled < len(dataset))
        if objective and not labelled:
            raise ValueError(
                f"--objective {objective} learns from labels, and no row has one; name the column: --label_column"
            )
        if not self.eval_dataset_name or self.eval_train_dataset_name:
            return
        if streaming:
            raise ValueError(
                "a stream cannot be the bank of kNN and probe: name labelled images, --eval_train_dataset_name"
            )
        if not labelled:
            raise ValueError(
                "kNN and the probe learn from labelled images, and the training set has none: name a labelled set, "
                "--eval_train_dataset_name, or the column, --label_column; without --eval_dataset_name nothing is "
                "measured"
            )

    def prepare(self, training: Any, images: Any, arguments: Any, run: Any) -> tuple[list[Any], list[Any]]:
        """As `build`; the test set is noted in the run, and without evaluators none run while training.

        Args:
            training: records of the training set.
            images: the `ImageArguments`; columns and `image_root` are read.
            arguments: the `RecipeArguments`.
            run: the `Run`.

        Raises:
            ValueError: `load_best_model_at_end` without evaluators; see `build`.
        """
        before, after = self.build(training, images.columns, arguments.per_device_eval_batch_size, images.image_root)
        if after:
            run.describe_data("test", after[0].records, after[0].data.test_columns)
        if not before and arguments.load_best_model_at_end:
            raise ValueError("--load_best_model_at_end needs --eval_dataset_name")
        if not before:  # a share of steps would be warned of on --resume
            arguments.eval_strategy, arguments.eval_steps = "no", None
        return before, after

    @staticmethod
    def with_geometry(evaluators: list[Any]) -> list[Any]:
        """The evaluators and, beside any, `Geometry`: not for a verdict, but it shows a collapse."""
        from mllm_vision.evaluation.geometry import Geometry

        if not evaluators:
            return []
        image = {"image": evaluators[0].data.image_column()}
        return [*evaluators, Geometry("geometry", evaluators[0].records, image, limit=2000)]

    def build(
        self, training: Any, columns: Mapping[str, str], batch_size: int = 256, image_root: str | None = None
    ) -> tuple[list[Any], list[Any]]:
        """(evaluators while training, those before and after it); none without a labelled set.

        Args:
            training: records of the training set, the bank where no other is named.
            columns: role -> column for "image" and "label", where their names do not tell.
            batch_size: images encoded at once, on each rank.
            image_root: what relative image paths start from, see `load_records`.

        Raises:
            ValueError: a set without labels, one with several splits of which none is called test, or what kNN cannot
                be with so many images.
        """
        if not self.eval_dataset_name:
            return [], []
        from mllm_vision.data import load_records
        from mllm_vision.data.records.records import UsualSplit
        from mllm_vision.evaluation.labelled.images import LabelledImages

        named = self.eval_train_dataset_name
        bank = load_records(named, image_root=image_root) if named else training
        split = self.eval_split or UsualSplit("test", "--eval_split")
        test = load_records(self.eval_dataset_name, split=split, image_root=image_root)
        limits: dict[str, Any] = {"train_limit": self.max_eval_train_samples, "test_limit": self.max_eval_samples}
        limits |= {"batch_size": batch_size, "cache_gb": self.eval_cache_gb}
        data = LabelledImages(bank, test, dict(columns), **limits)
        names = dict.fromkeys([*self.evaluators, *self.final_evaluators])
        kinds: dict[str, Any] = {name: load_evaluator(name) for name in names}
        made = {name: kind.of_images(name, data, self) for name, kind in kinds.items()}
        return [made[name] for name in dict.fromkeys(self.evaluators)], list(made.values())
