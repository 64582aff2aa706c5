"""Zero-shot classification: an image belongs to the class whose name is nearest to it.

Source: Radford et al. 2021 (CLIP), section 3.1.4: prompt templates are ensembled in embedding space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from mllm_vision.data.records.labels import Labels, column_labels, read_labels
from mllm_vision.data.records.sampling import column_values
from mllm_vision.evaluation.base import Evaluation, Evaluator, dual_model, encode_rows, exact_arithmetic
from mllm_vision.evaluation.images import check_columns, column_of, data_uri, draw_rows, row_image
from mllm_vision.evaluation.loading import encode_images

DEFAULT_TEMPLATES = ("a photo of a {}.",)
CONFUSION_LIMIT = 40  # more classes than this make an unreadable (and long) table


def class_embeddings(
    dual: Any, class_names: Sequence[str], templates: Sequence[str], batch_size: int = 256
) -> torch.Tensor:
    """One unit vector a class ``[C, E]``: the normalised mean of its normalised prompts.

    Raises:
        ValueError: a template without ``{}``, or no class.
    """
    if not class_names or not templates:
        raise ValueError(f"zero-shot needs classes and templates; got {len(class_names)} and {len(templates)}")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"template {template!r} has no place for the class name; write it as '{{}}'")
    prompts = [template.replace("{}", str(name)) for name in class_names for template in templates]
    rows = encode_rows(prompts, dual.encode_texts, batch_size)
    rows = F.normalize(rows, dim=-1).view(len(class_names), len(templates), -1)
    return F.normalize(rows.mean(dim=1), dim=-1)


def label_indices(records: Any, column: str, class_names: Sequence[str] | None) -> Labels:
    """Labels as indices (-1 where there is none), and the names they index.

    Names come from ``class_names``, else from the column's ClassLabel feature, else from the strings found.

    Raises:
        ValueError: a label outside the classes, integers with nothing that names them, or not one label.
    """
    found = column_labels(records, column)
    if class_names is not None:
        names = list(class_names)
        if len(set(names)) != len(names):
            raise ValueError(f"class_names has duplicates: {sorted({name for name in names if names.count(name) > 1})}")
        found = read_labels(column_values(records, column), names)
    outside = next((row for row, why in found.bad.items() if why.reason == "the label is not one of the classes"), None)
    if outside is not None:
        label = column_values(records, column)[outside]
        names = found.names or []
        raise ValueError(f"row {outside} has label {label!r}, which is none of the {len(names)} classes {names[:8]}")
    if not found.labelled:
        raise ValueError(f"none of the {len(records)} rows has a label in column {column!r}; zero-shot needs labels")
    if found.names is None:
        raise ValueError(f"column {column!r} holds numbers without names; pass class_names (--class_names)")
    return found


class ZeroShot(Evaluator):
    """Zero-shot accuracy of an image-text model.

    Args:
        name: evaluator name.
        records: rows with an image and a label (index or class name).
        class_names: names by label index; None takes them from the label feature (or the strings found).
        templates: prompts with ``{}``; several are ensembled.
        columns: roles ``image`` and ``label`` to column names.
        batch_size: images encoded at once.
        limit: at most so many labelled rows, drawn at random by ``seed``; the classes are those of all rows.
        per_class: also fill ``tables["class"]`` and, for few classes, ``arrays["confusion"]``.

    Rows without a label, or with an invalid one (0.5), are left out and reported, as are unreadable images.

    Metrics: ``accuracy``, ``top5_accuracy`` (ten classes or more), ``mean_class_accuracy``, ``count``; ``skipped``
    where rows were left out; baselines ``chance`` (one over the classes) and ``most_frequent_class``.

    Raises:
        ValueError: missing columns, labels outside the classes, templates without ``{}``, no usable image.
    """

    primary_metric = "accuracy"
    models = ("dual",)

    @classmethod
    def from_flags(cls, name: str, records: Any, flags: Any, sources: Any) -> ZeroShot:
        columns = sources.columns(records, "image", "label")
        names = flags.class_names or None
        return cls(name, records, names, flags.templates, columns, flags.batch_size, limit=flags.max_samples)

    def __init__(
        self,
        name: str,
        records: Any,
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        columns: dict[str, str] | None = None,
        batch_size: int = 64,
        *,
        limit: int | None = None,
        seed: int = 0,
        per_class: bool = True,
        sample_count: int = 12,
    ) -> None:
        super().__init__(name)
        self.records, self.batch_size, self.per_class = records, batch_size, per_class
        self.columns = columns or {"image": "image", "label": "label"}
        check_columns(records, self.columns, ("image", "label"), f"ZeroShot {name!r}")
        labels = label_indices(records, column_of(self.columns, "label", "ZeroShot"), class_names)
        self.labels, self.class_names = labels.numbers.tolist(), labels.names or []
        self.refused |= labels.refusals("zero-shot leaves them out")
        self.rows = [labels.labelled[place] for place in draw_rows(len(labels.labelled), limit, seed)]
        self.templates = (templates,) if isinstance(templates, str) else tuple(templates)
        self.sample_count = sample_count
        for template in self.templates:
            if "{}" not in template:
                raise ValueError(f"template {template!r} has no place for the class name; write it as '{{}}'")

    def evaluate(self, model: Any) -> Evaluation:
        dual = dual_model(model)
        classes = class_embeddings(dual, self.class_names, self.templates)
        images, kept = encode_images(
            dual, self.records, self.columns["image"], self.rows, self.batch_size, self.refused
        )
        with exact_arithmetic():
            scores = images @ classes.T  # [N, C]
        truth = torch.tensor([self.labels[index] for index in kept])
        return self._summary(scores, truth, kept)

    def _summary(self, scores: torch.Tensor, truth: torch.Tensor, kept: Sequence[int]) -> Evaluation:
        classes = len(self.class_names)
        own = scores.gather(1, truth[:, None])
        # Ties count against the model: a collapsed encoder gives every class the same score and must not win.
        ahead = (scores >= own).sum(dim=1) - 1
        right = ahead == 0
        counts = torch.bincount(truth, minlength=classes)
        hits = torch.bincount(truth[right], minlength=classes)
        seen = counts > 0
        metrics = {
            "accuracy": right.float().mean().item(),
            "mean_class_accuracy": (hits[seen] / counts[seen]).mean().item(),
            "count": float(len(truth)),
        }
        chance = {"accuracy": 1 / classes, "mean_class_accuracy": 1 / classes}
        if classes >= 10:
            metrics["top5_accuracy"] = (ahead < 5).float().mean().item()
            chance["top5_accuracy"] = 5 / classes
        if left_out := len(self.rows) - len(kept) + self.labels.count(-1):
            metrics["skipped"] = float(left_out)
        result = Evaluation(self.primary_metric, metrics, {"chance": chance})
        result.baselines["most_frequent_class"] = {"accuracy": counts.max().item() / len(truth)}
        guess = scores.argmax(dim=1)
        if self.per_class:
            result.tables["class"] = [
                {"name": name, "count": int(counts[i]), "accuracy": hits[i].item() / max(int(counts[i]), 1)}
                for i, name in enumerate(self.class_names)
                if counts[i]
            ]
            if classes <= CONFUSION_LIMIT:
                table = torch.zeros(classes, classes, dtype=torch.long)
                table.index_put_((truth, guess), torch.ones_like(truth), accumulate=True)
                result.arrays["confusion"] = {"classes": list(self.class_names), "counts": table.tolist()}
        result.samples = self._samples(truth, guess, right, kept)
        return result

    def _samples(
        self, truth: torch.Tensor, guess: torch.Tensor, right: torch.Tensor, kept: Sequence[int]
    ) -> list[dict]:
        """A few wrong answers first, then right ones, with thumbnails."""
        half = self.sample_count // 2
        wrong_rows = (~right).nonzero().flatten().tolist()[:half]
        right_rows = right.nonzero().flatten().tolist()
        step = max(1, len(right_rows) // max(1, self.sample_count - len(wrong_rows)))
        rows = wrong_rows + right_rows[::step][: self.sample_count - len(wrong_rows)]
        return [
            {
                "image": data_uri(row_image(self.records, self.columns["image"], kept[row])),
                "answer": self.class_names[int(truth[row])],
                "prediction": self.class_names[int(guess[row])],
                "correct": bool(right[row]),
            }
            for row in rows
        ]
