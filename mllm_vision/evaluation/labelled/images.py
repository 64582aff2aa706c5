"""Two sets of labelled images, one to learn from and one to be judged on, as features of whatever encoder comes.

What kNN and the linear probe share: images are decoded once and kept as bytes, the features of one encoder are
computed once for all evaluators that ask, and every rank holds only the rows that it encoded.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mllm_vision.data.records.columns import bind_columns
from mllm_vision.data.records.labels import column_labels
from mllm_vision.data.records.sampling import BadRow
from mllm_vision.distributed import all_reduce
from mllm_vision.evaluation.base import (
    Evaluation,
    Evaluator,
    agree_on_error,
    batches,
    evaluation_mode,
    exact_arithmetic,
    image_model,
    my_share,
)
from mllm_vision.evaluation.images import check_columns, draw_rows, usable_images
from mllm_vision.evaluation.loading import finite_rows
from mllm_vision.functional.precision import wide_dtype

logger = logging.getLogger(__name__)

FEATURES = ("pooled", "tokens", "pixels")


class Labelled(NamedTuple):
    """This rank's rows: ``features [n, D]`` float32, ``labels [n]`` int64 and ``rows``, their places in the data."""

    features: Tensor
    labels: Tensor
    rows: list[int]


class _Kept(NamedTuple):
    feature: str
    fingerprint: Tensor
    train: Labelled
    test: Labelled


class LabelledImages:
    """A training set and a test set of labelled images, encoded by every model that is evaluated.

    Args:
        train: rows with an image and a label: the bank of kNN, what the probe is fitted to.
        test: rows that accuracy is measured on.
        columns: roles ``image`` and ``label`` to column names, where their names do not tell; for both sets.
        feature: "pooled" (the encoder's own vector, before any head of the training), "tokens" (mean of the
            selected tokens) or "pixels" (the pixel values as the encoder gets them: what no encoder at all reaches).
        batch_size: images encoded at once, on each rank.
        train_limit: use only so many training rows, drawn at random by ``seed``.
        test_limit: likewise of the test rows.
        seed: of the draws.
        cache: keep the decoded images (one byte a value) so that the next evaluation need not read them again.
        cache_gb: what each set may keep on each process, in GiB; images beyond it are decoded again each time.

    Attributes: ``class_names``; ``train_labels`` and ``test_labels``, one index a row of the data.

    Rows without a label (empty or -1), or with an invalid one (0.5), are left out, and their number is told.
    Images that cannot be read, or whose features are not finite, are left out with a warning. ``refused`` says why,
    by set and row.

    Raises:
        ValueError: no label column (kNN and the probe need labels), a set without one labelled row, labels of the
            test set that the training set lacks, an unknown feature, fewer than two classes.
    """

    def __init__(
        self,
        train: Any,
        test: Any,
        columns: dict[str, str] | None = None,
        *,
        feature: str = "pooled",
        batch_size: int = 256,
        train_limit: int | None = None,
        test_limit: int | None = None,
        seed: int = 0,
        cache: bool = True,
        cache_gb: float = 4.0,
    ) -> None:
        if feature not in FEATURES:
            raise ValueError(f"feature={feature!r} is none of {', '.join(map(repr, FEATURES))}")
        for name, limit in (("train_limit", train_limit), ("test_limit", test_limit), ("batch_size", batch_size)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name}={limit} leaves no images; use 1 or more")
        if not cache_gb >= 0:
            raise ValueError(f"cache_gb={cache_gb} must not be negative; 0 keeps no image")
        self.feature, self.batch_size, self.cache = feature, batch_size, int(cache_gb * 2**30) if cache else 0
        self._train = _Part("training", train, columns, train_limit, seed)
        self._test = _Part("test", test, columns, test_limit, seed)
        self.train, self.test = train, test
        self.class_names, self.train_labels, self.test_labels = _same_classes(self._train, self._test)
        self._kept: _Kept | None = None

    @property
    def classes(self) -> int:
        return len(self.class_names)

    def image_column(self) -> str:
        """Name of the test set's image column."""
        return self._test.columns["image"]

    @property
    def test_columns(self) -> dict[str, str]:
        """Role -> column of the test set."""
        return dict(self._test.columns)

    def count(self) -> tuple[int, int]:
        """(training rows, test rows) that are used, over all ranks."""
        return len(self._train.wanted), len(self._test.wanted)

    @property
    def refused(self) -> dict[Any, BadRow]:
        """(set, row) -> why it is left out."""
        parts = (self._train, self._test)
        return {(part.name, row): why for part in parts for row, why in part.refused.items()}

    def skipped(self, count: int) -> float:
        """Test rows left out, where so many were measured."""
        return float(len(self._test.wanted) - count + self._test.unlabelled)

    def train_rows(self) -> list[int]:
        """The training rows that are used, over all ranks."""
        return self._train.wanted

    def features(self, model: Any, feature: str | None = None) -> tuple[Labelled, Labelled]:
        """(training rows, test rows) of this rank, encoded by ``model``; the same call on every rank.

        The last features are kept until a weight of the encoder changes.

        Raises:
            ValueError: ``model`` holds no VisionEncoder, or not one image could be read or has finite features.
        """
        feature = feature or self.feature
        encoder = image_model(model)
        fingerprint = _fingerprint(encoder)
        if self._kept is not None and self._kept.feature == feature:
            changed = torch.tensor([int(not torch.equal(self._kept.fingerprint, fingerprint))], device=_device(encoder))
            if not all_reduce(changed, op="max"):  # every rank the same answer: encoding is a common work
                return self._kept.train, self._kept.test
        with evaluation_mode(encoder), torch.no_grad():
            parts = [self._encode(encoder, part, feature) for part in (self._train, self._test)]
        self._kept = _Kept(feature, fingerprint, *parts)
        return parts[0], parts[1]

    def test_features(self, model: Any) -> Labelled:
        """The test rows of this rank alone, encoded again; the same call on every rank."""
        encoder = image_model(model)
        with evaluation_mode(encoder), torch.no_grad():
            return self._encode(encoder, self._test, self.feature)

    def forget(self) -> None:
        """Drop the features kept (not the images): a long training need not hold them between evaluations."""
        self._kept = None

    def _encode(self, encoder: Any, part: _Part, feature: str) -> Labelled:
        device = _device(encoder)
        features: list[Tensor] = []
        rows: list[int] = []
        error: Exception | None = None
        try:
            for chunk, pixels in part.pixel_values(encoder.processor, self.batch_size, self.cache):
                found = _features_of(encoder, pixels.to(device), feature).float()
                sound = finite_rows(found, chunk, f"the {part.name} set")
                rows.extend(chunk[place] for place in sound)
                places = torch.tensor(sound, dtype=torch.int64, device=device)
                features.append(found if len(sound) == len(found) else found[places])
        except Exception as problem:
            error = problem
        agree_on_error(error)
        own = torch.tensor([features[0].shape[1] if features else 0], device=device)
        width = int(all_reduce(own, op="max"))
        if width == 0:
            raise ValueError(f"none of the {len(part.wanted)} images of the {part.name} set could be read")
        if not all_reduce(torch.tensor([len(rows)], device=device)):
            raise ValueError(f"no image of the {part.name} set has finite features; look at the encoder's weights")
        whole = torch.cat(features) if features else torch.empty(0, width, device=device)
        return Labelled(whole, torch.tensor([part.labels[row] for row in rows], device=device, dtype=torch.int64), rows)


class _Part:
    """One of the two sets: its columns, labels and the rows that are used; this rank's images, once decoded."""

    def __init__(self, name: str, records: Any, columns: dict[str, str] | None, limit: int | None, seed: int) -> None:
        self.name, self.records = name, records
        try:
            self.columns = bind_columns(records, ("image", "label"), columns)
        except ValueError as error:
            raise ValueError(f"kNN and the linear probe need labelled images; the {name} set: {error}") from error
        check_columns(records, self.columns, ("image", "label"), f"the {name} set")
        found = column_labels(records, self.columns["label"]).numbered()
        self.labelled = found.labelled
        if not self.labelled:
            raise ValueError(
                f"none of the {len(records)} rows of the {name} set has a label in column {self.columns['label']!r}; "
                "kNN and the linear probe need labels: name the column with --label_column, or leave them out"
            )
        self.class_names: list[str] = found.names or []
        self.label_names = [self.class_names[number] if number >= 0 else "" for number in found.numbers.tolist()]
        self.unlabelled = len(records) - len(self.labelled)
        self.refused: dict[Any, BadRow] = found.refusals(f"the {name} set is the other rows")
        self.labels: list[int] = []  # places in the class names of the training set, -1 for none
        self.wanted = [self.labelled[place] for place in draw_rows(len(self.labelled), limit, seed)]
        self._kept: tuple[str, dict[int, tuple[list[int], Tensor]]] | None = None  # processor, batch -> its pixels

    def pixel_values(self, processor: Any, batch_size: int, cache: int) -> Iterator[tuple[list[int], Tensor]]:
        """This rank's rows in batches, with their pixel values ``[B, 3, H, W]``; up to `cache` bytes are kept."""
        from mllm_vision.data.images.transforms import ImageTransform

        transform = ImageTransform(processor, train=False)
        if self._kept is None or self._kept[0] != repr(processor):
            self._kept = (repr(processor), {})
        kept = self._kept[1]
        room = cache - sum(pixels.nbytes for _, pixels in kept.values())
        share = [self.wanted[place] for place in my_share(len(self.wanted))]
        for number, chunk in enumerate(batches(share, batch_size)):
            if number in kept:
                rows, pixels = kept[number]
                yield rows, transform.normalise(pixels)
                continue
            images, rows = usable_images(self.records, self.columns["image"], chunk, self.refused)
            if not images:
                continue
            made = transform.pixels(images)
            if made is None:
                yield rows, transform(images)
                continue
            if made.nbytes <= room:
                kept[number] = (rows, made)
                room -= made.nbytes
            yield rows, transform.normalise(made)


def _same_classes(train: _Part, test: _Part) -> tuple[list[str], list[int], list[int]]:
    """Class names and the labels of both sets as places in them."""
    names = train.class_names
    if len(names) < 2:
        raise ValueError(f"the training set has {len(names)} class ({names}); a classifier needs two or more")
    place = {name: index for index, name in enumerate(names)}
    for part in (train, test):
        unknown = sorted({part.label_names[row] for row in part.labelled} - {*place})
        if unknown:
            raise ValueError(
                f"the {part.name} set has labels that the training set lacks: {unknown[:5]}; it has {names[:8]}"
            )
        part.labels = [place.get(name, -1) for name in part.label_names]
    return names, train.labels, test.labels


def _features_of(encoder: Any, pixels: Tensor, feature: str) -> Tensor:
    """``[B, D]`` of pixel values ``[B, 3, H, W]``."""
    if feature == "pixels":
        return pixels.flatten(1)
    wanted = feature == "pooled"
    found = encoder(pixels.to(encoder.dtype), pooled=wanted, tokens=not wanted)
    return found.pooled if wanted else found.tokens.mean(dim=1)


@torch.no_grad()
def _fingerprint(model: nn.Module) -> Tensor:
    """A sum over every weight and buffer: a training step does not leave them as they were."""
    kind = wide_dtype(next(model.parameters()))
    sums = [value.to(kind).sum() + value.to(kind).square().sum() for value in model.state_dict().values()]
    return torch.stack(sums).cpu()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def sum_counts(*counts: Tensor) -> list[Tensor]:
    """Tensors of counts summed over ranks, in one collective."""
    sizes = [count.numel() for count in counts]
    whole = all_reduce(torch.cat([count.flatten() for count in counts]))
    return [part.view_as(count) for part, count in zip(whole.split(sizes), counts, strict=True)]


class LabelledEvaluator(Evaluator):
    """Accuracy among labelled images; `measure` says how it is reached from two sets of features.

    Args:
        name: evaluator name.
        data: the labelled images; share one object and each model encodes them once for all evaluators.
        raw_pixels: also the accuracy of the pixels themselves, as baseline ``raw_pixels`` (computed once).
    """

    primary_metric = "accuracy"
    of_encoder = True

    @classmethod
    def from_flags(cls, name: str, records: Any, flags: Any, sources: Any) -> LabelledEvaluator:
        return cls.of_images(name, sources.labelled_images(name, records), flags)

    @classmethod
    @abstractmethod
    def of_images(cls, name: str, data: LabelledImages, flags: Any) -> LabelledEvaluator:
        """The evaluator on labelled images, with the settings among `flags`; also while an encoder trains."""

    def __init__(self, name: str, data: LabelledImages, *, raw_pixels: bool) -> None:
        super().__init__(name)
        self.data, self.records = data, data.test
        self._pixels: dict[str, float] | None = {} if raw_pixels else None

    @abstractmethod
    def measure(self, train: Labelled, test: Labelled) -> Evaluation:
        """The result on `test`, learnt from `train`."""

    def evaluate(self, model: Any) -> Evaluation:
        if self._pixels == {}:  # first, so that the features stay for the next evaluator
            self._pixels = _accuracies(self._measure(*self.data.features(model, "pixels")))
        result = self._measure(*self.data.features(model))
        self.refused |= self.data.refused
        if self._pixels:
            result.baselines["raw_pixels"] = self._pixels
        return result

    def _measure(self, train: Labelled, test: Labelled) -> Evaluation:
        with exact_arithmetic():
            return self.measure(train, test)


def _accuracies(result: Evaluation) -> dict[str, float]:
    """The metrics that mean the same for any features: accuracies."""
    return {name: value for name, value in result.metrics.items() if "accuracy" in name}


def guessing(table: Sequence[dict[str, Any]], classes: int) -> dict[str, dict[str, float]]:
    """What guessing reaches: any class at random, and the most frequent one always."""
    counts = [row["count"] for row in table]
    return {
        "chance": {"accuracy": 1 / classes, "mean_class_accuracy": 1 / classes},
        "most_frequent_class": {"accuracy": max(counts) / sum(counts)},
    }


def predictions_summary(
    predicted: Tensor, truth: Tensor, class_names: Sequence[str]
) -> tuple[float, float, list[dict[str, Any]]]:
    """(accuracy, mean accuracy of the classes, rows by class) of this rank's predictions ``[n]``, over all ranks."""
    classes = len(class_names)
    counts = torch.bincount(truth, minlength=classes)
    hits = torch.bincount(truth[predicted == truth], minlength=classes)
    counts, hits = sum_counts(counts, hits)
    seen = counts > 0
    rows = [
        {"name": name, "count": int(counts[i]), "accuracy": float(hits[i] / counts[i])}
        for i, name in enumerate(class_names)
        if counts[i]
    ]
    return float(hits.sum() / counts.sum()), float((hits[seen] / counts[seen]).mean()), rows
