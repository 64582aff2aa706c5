"""The flags of retrieval and zero-shot classification. Nothing here imports torch before they are built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class PairEvaluationArguments:
    """What an image-text pair of towers is measured on."""

    eval_dataset_name: str | None = field(default=None, metadata={"help": "Image-text pairs for retrieval R@1/5/10."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Their split; by default validation, or the only one."}
    )
    max_eval_samples: int | None = field(default=1000, metadata={"help": "Images in retrieval, at most."})
    zero_shot_dataset_name: str | None = field(
        default=None, metadata={"help": "Labelled images for zero-shot classification."}
    )
    zero_shot_split: str | None = field(
        default=None, metadata={"help": "Their split; by default test, or the only one."}
    )
    templates: list[str] = field(
        default_factory=lambda: ["a photo of a {}."], metadata={"help": "Prompts of zero-shot; {} is the class."}
    )

    def build_evaluators(
        self, columns: Mapping[str, str], run: Any, batch_size: int, image_root: str | None = None
    ) -> list[Any]:
        """Retrieval and zero-shot, each where its data set is named; the run's record gets their data.

        Args:
            columns: role -> column, of those that are named.
            run: the `Run`.
            batch_size: images encoded at once.
            image_root: see `load_records`.

        Raises:
            ValueError: columns that are not there.
        """
        from mllm_vision.data import bind_columns, load_records
        from mllm_vision.data.records.records import UsualSplit
        from mllm_vision.evaluation import Retrieval, ZeroShot

        evaluators: list[Any] = []
        if self.eval_dataset_name:
            split = self.eval_split or UsualSplit("validation", "--eval_split")
            records = load_records(self.eval_dataset_name, split=split, image_root=image_root)
            bound = bind_columns(records, ("image", "caption"), columns)
            run.describe_data("validation", records, bound)
            limits = {"limit": self.max_eval_samples, "batch_size": batch_size}
            evaluators.append(Retrieval("retrieval", records, bound, distinct=True, **limits))
        if self.zero_shot_dataset_name:
            split = self.zero_shot_split or UsualSplit("test", "--zero_shot_split")
            records = load_records(self.zero_shot_dataset_name, split=split, image_root=image_root)
            bound = bind_columns(records, ("image", "label"), columns)
            run.describe_data("zero_shot", records, bound)
            evaluators.append(ZeroShot("zero_shot", records, None, self.templates, bound, batch_size))
        return evaluators
