"""What every evaluator shares: its result, its calling convention, and its behaviour on several processes.

An evaluator is a callable ``(model, step) -> dict`` of plain floats with a ``name`` and a ``primary_metric``
(trainers log the items as ``eval_<name>_<metric>``). `examine` gives the full result, with baselines, tables, sample
images and small arrays. Nothing of a result stays in the evaluator: a figure of one model can never be reported for
another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from mllm_vision.data.records.sampling import BadRow
from mllm_vision.distributed import agree_on_error, all_gather, all_reduce, communication_device, row_counts
from mllm_vision.functional.precision import full_fp32

COUNTS = ("count", "images", "texts", "skipped", "dimensions")  # metrics that say how much was measured, not how well


@dataclass
class Evaluation:
    """Result of one evaluator.

    ``metrics`` are floats; ``baselines`` maps a baseline's name ("chance", "majority", ...) to the same
    metrics as far as they make sense for it; ``tables`` are rows by class or question type; ``samples`` and
    ``arrays`` hold thumbnails and small nested lists for the report; ``parts`` are tensors and images that an
    evaluator's own ``draw`` needs, and no record holds; ``refused`` says how many rows were left out, by reason;
    ``errors`` are standard errors of metrics that are not a share of ``count`` cases.
    """

    primary_metric: str
    metrics: dict[str, float]
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    arrays: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The JSON entry of ``run.json["evaluations"][name]``: metrics at the top, ``baselines`` as one float
        each (the primary metric), everything else under ``details``."""
        entry: dict[str, Any] = {key: float(value) for key, value in self.metrics.items()}
        entry["primary_metric"] = self.primary_metric
        entry["baselines"] = {
            name: float(values[self.primary_metric])
            for name, values in self.baselines.items()
            if self.primary_metric in values
        }
        entry["details"] = {"baselines": self.baselines, "tables": self.tables}
        if self.refused:
            entry["details"]["refused"] = dict(self.refused)
        if self.errors:
            entry["details"]["errors"] = dict(self.errors)
        return entry

    def add_baseline(self, name: str, other: Evaluation) -> None:
        """Put another model's result beside this one; of its arrays only spectrum and deviations are kept."""
        self.baselines[name] = {key: value for key, value in other.metrics.items() if key not in COUNTS}
        for key, value in other.arrays.items():
            if key in ("spectrum", "deviations") and key in self.arrays:
                self.arrays[key][name] = value["values"]

    def store(self, record: dict[str, Any], name: str, **facts: Any) -> None:
        """Put this result under ``name`` into a run.json-like dict: its entry, samples and arrays.

        ``facts`` (the step, the hash of the weights that were measured) go into the entry.
        """
        record.setdefault("evaluations", {})[name] = {**self.record(), **facts}
        others = [sample for sample in record.get("samples", []) if sample.get("evaluation") != name]
        record["samples"] = others + [{"evaluation": name, **sample} for sample in self.samples]
        arrays = record.setdefault("arrays", {})
        for key, value in self.arrays.items():
            arrays[f"{name}/{key}"] = value


class Evaluator(ABC):
    """Base of all evaluators. Subclasses implement :meth:`evaluate`; every rank must call them.

    Args:
        name: used in the logged keys ``eval_<name>_<metric>``; letters, digits, ``_``, ``-`` and ``/``.

    Attributes:
        primary_metric: the metric that a verdict and the baselines are about.
        models: the kinds of model that it measures: encoder, dual (an image-text pair), vlm.
        of_encoder: of a vision-language model it measures the vision tower.
        has_figures: False for what is only to be looked at: an untrained model is not compared.
        Flags: a dataclass whose fields become flags of scripts/evaluate.py, beside those it has.
    """

    primary_metric: str = "accuracy"
    models: ClassVar[tuple[str, ...]] = ("encoder", "dual", "vlm")
    of_encoder: ClassVar[bool] = False
    has_figures: ClassVar[bool] = True
    Flags: ClassVar[type | None] = None

    def __init__(self, name: str) -> None:
        if not name or not all(ch.isalnum() or ch in "_-/" for ch in name):
            raise ValueError(f"evaluator name={name!r} must consist of letters, digits, '_', '-' or '/'")
        self.name = name
        self.refused: dict[Any, BadRow] = {}  # row -> why it is left out

    @classmethod
    def from_flags(cls, name: str, records: Any, flags: Any, sources: Any) -> Evaluator:
        """The evaluator that scripts/evaluate.py runs.

        Args:
            name: of its result.
            records: the test set.
            flags: every flag, by name.
            sources: binds columns and opens further data (`evaluation.sources.Sources`).

        Raises:
            ValueError: data that do not fit, before anything is measured.
        """
        raise ValueError(f"{cls.__name__} has no from_flags, so --task cannot run it; call it from Python")

    @abstractmethod
    def evaluate(self, model: Any) -> Evaluation:
        """Measure ``model`` and return everything that was found."""

    def draw(self, result: Evaluation, folder: str | Path) -> list[Path]:
        """Write images of a result into a folder; their paths. Most evaluators draw none."""
        return []

    def examine(self, model: Any) -> Evaluation:
        """Everything about ``model``, measured in evaluation mode; training modes come back as they were."""
        with evaluation_mode(model), torch.no_grad():
            result = self.evaluate(model)
        result.refused = refusal_counts(self.refused)
        return result

    def __call__(self, model: Any, step: int = 0) -> dict[str, float]:
        """The metrics of `examine`."""
        return dict(self.examine(model).metrics)


def examine(evaluator: Callable[..., Any], model: Any, step: int = 0) -> Evaluation:
    """The full result of any evaluator, ours or a plain callable ``(model, step) -> dict``.

    Of a callable's dict the numbers are metrics (the first is the primary one, unless it has a ``primary_metric``);
    ``baselines`` (name -> the primary metric, or a dict of metrics), ``samples``, ``arrays`` and ``tables`` are taken
    as they are.
    """
    if isinstance(evaluator, Evaluator):
        return evaluator.examine(model)
    with evaluation_mode(model), torch.no_grad():
        given = dict(evaluator(model, step))
    metrics = {key: float(value) for key, value in given.items() if _is_number(value)}
    chief = getattr(evaluator, "primary_metric", None) or next(iter(metrics), "")
    baselines = {
        name: {chief: float(value)} if _is_number(value) else dict(value)
        for name, value in (given.get("baselines") or {}).items()
    }
    more = {key: given[key] for key in ("tables", "samples", "arrays") if given.get(key)}
    return Evaluation(chief, metrics, baselines, **more)


def name_of(evaluator: Any) -> str:
    """What an evaluator's figures are called."""
    return str(getattr(evaluator, "name", type(evaluator).__name__.lower()))


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Switch every sub-module to ``eval()`` and restore each one's own mode afterwards.

    Restoring by module matters: a frozen tower that was kept in ``eval()`` during training must not come back
    in ``train()``.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def unwrap(model: Any) -> Any:
    """The model inside DistributedDataParallel and similar wrappers (``module``), and inside peft's (LoRA)."""
    while isinstance(model, nn.Module) and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def dual_model(model: Any) -> Any:
    """The object with ``encode_images`` and ``encode_texts``: the model itself, or its ``.dual``.

    Raises:
        ValueError: neither has them.
    """
    model = unwrap(model)
    for candidate in (model, getattr(model, "dual", None)):
        if hasattr(candidate, "encode_images") and hasattr(candidate, "encode_texts"):
            return candidate
    raise ValueError(
        f"{type(model).__name__} has no encode_images/encode_texts, nor a .dual that has them; zero-shot and "
        "retrieval need an image-text pair such as DualEncoder.from_pretrained(path)"
    )


def image_model(model: Any) -> Any:
    """The VisionEncoder inside ``model``: the model itself, its artifact, its ``.encoder`` or ``.vision``, its dual's.

    Of an objective it is ``.artifact_encoder``, what the run saves: DINO's teacher, not its student.

    Raises:
        ValueError: there is none.
    """
    model = unwrap(model)
    dual = getattr(model, "dual", None)
    candidates = (
        model,
        getattr(model, "artifact_encoder", None),
        getattr(model, "encoder", None),
        getattr(model, "vision", None),
        getattr(dual, "vision", None),
    )
    for candidate in candidates:
        if hasattr(candidate, "encode") and hasattr(candidate, "backbone"):
            return candidate
    raise ValueError(f"{type(model).__name__} holds no VisionEncoder (looked at .encoder, .vision and .dual.vision)")


def world() -> tuple[int, int]:
    """(rank, world size); (0, 1) outside torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def my_share(count: int) -> list[int]:
    """The indices of ``range(count)`` that this rank works on: every ``world_size``-th one."""
    rank, size = world()
    return list(range(rank, count, size))


def gather_items(items: Sequence[tuple[int, Any]]) -> list[Any]:
    """All ranks' ``(index, item)`` pairs merged and ordered by index; the items, on every rank."""
    merged = list(items)
    _, size = world()
    if size > 1:
        parts: list[Any] = [None] * size
        dist.all_gather_object(parts, merged)
        merged = [pair for part in parts for pair in part]
    return [item for _, item in sorted(merged, key=lambda pair: pair[0])]


def refusal_counts(refused: Mapping[Any, BadRow]) -> dict[str, int]:
    """How many rows were refused for which reason, over all ranks; a row that several ranks read counts once."""
    pairs = gather_items([(rank, (repr(row), why.reason)) for rank in world()[:1] for row, why in refused.items()])
    return dict(Counter(dict(sorted(pairs)).values()).most_common())


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive slices of at most ``size`` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def gather_rows(parts: Sequence[torch.Tensor], indices: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
    """All ranks' rows in the order of their indices: as tensors, never as pickled objects.

    Args:
        parts: this rank's rows in pieces ``[n, ...]``, possibly none; other ranks have the same shape behind n.
        indices: of each row, over all pieces.

    Returns:
        (rows ``[N, ...]`` float32 on the CPU, their indices), the same on every rank.
    """
    own = torch.cat([part.detach().float().cpu() for part in parts]) if parts else torch.empty(0)
    places = torch.tensor(list(indices), dtype=torch.int64)
    if world()[1] > 1:
        device = communication_device()
        # a rank without rows does not know their shape: the others tell
        shape = torch.zeros(8, dtype=torch.int64)
        if parts:
            shape[: own.ndim] = torch.tensor([own.ndim, *own.shape[1:]])
        found = all_reduce(shape.to(device), op="max").tolist()
        if found[0] == 0:  # nobody has any
            return own, []
        own = own.view(len(places), *found[1 : found[0]])
        sizes = row_counts(places)
        own, places = (all_gather(value.to(device), sizes=sizes).cpu() for value in (own, places))
    order = places.argsort(stable=True)
    return own[order], places[order].tolist()


def encode_rows(items: Sequence[Any], encode: Any, batch_size: int) -> torch.Tensor:
    """Encode ``items`` shared out over the ranks and return all rows ``[N, D]`` (float32, CPU) on every rank.

    ``encode`` maps a list of items to a tensor ``[n, D]``.
    """
    share = my_share(len(items))
    rows: list[torch.Tensor] = []
    error: Exception | None = None
    try:
        for chunk in batches(share, batch_size):
            rows.append(encode([items[index] for index in chunk]).detach().float().cpu())
    except Exception as problem:
        error = problem
    agree_on_error(error)
    return gather_rows(rows, share)[0]


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Outside of any autocast and TF32, on the CPU and on the accelerator: figures in the precision of features.

    Models are called in the precision of their training; what is made of their features is not.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    with ExitStack() as stack:
        for device in [torch.device("cpu"), *([] if accelerator is None else [accelerator])]:
            stack.enter_context(full_fp32(device))
        yield
