"""Reading run.json and evaluation files into stages; what is missing or broken is left out with a warning."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

STAGES = ("stage_zero", "language_model", "stage_one", "stage_two")
TITLES = {
    "stage_zero": "Stage zero",
    "language_model": "Language model",
    "stage_one": "Stage one",
    "stage_two": "Stage two",
}

RUN_NAMES = {"vqa": ("answers",)}  # what a recipe calls the same evaluation in its own run.json


@dataclass
class Stage:
    """One stage: its run, and evaluations by variant ("" is the stage's own model, "blind" an ablation of it)."""

    name: str
    run: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)  # ablation runs by variant
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # evaluation files by variant

    @property
    def title(self) -> str:
        return TITLES.get(self.name, self.name.replace("_", " ").capitalize())

    @property
    def own(self) -> dict[str, Any]:
        """The evaluation file of the stage's own model, or an empty one."""
        return self.files.get("", {})

    @property
    def split(self) -> str:
        """What `evaluations` were measured on: "test" for an evaluation file, "validation" for the run's own."""
        return "test" if as_dict(self.own.get("evaluations")) else "validation"

    def evaluations(self) -> dict[str, dict[str, Any]]:
        """Evaluations by name: those of the evaluation file, else of the run itself."""
        return dict(as_dict(self.own.get("evaluations")) or as_dict(self.run.get("evaluations")))

    def find(self, task: str, variant: str = "") -> dict[str, Any] | None:
        """The evaluation entry of a task: the stage's own (in-file variants such as "unseen" by ``variant``),
        or an ablation's."""
        for name in (task, *RUN_NAMES.get(task, ())):
            found = as_dict(self.evaluations().get(f"{variant}/{name}" if variant else name))
            if found:
                return found
        other = as_dict(as_dict(self.files.get(variant)).get("evaluations")) if variant else {}
        return as_dict(other.get(task)) or None

    def array(self, key: str) -> Any:
        """An array whose key ends in ``key``: from the evaluation file, else from the run."""
        for source in (self.own, self.run):
            for name, value in as_dict(source.get("arrays")).items():
                if name == key or name.endswith("/" + key):
                    return value
        return None

    def samples(self) -> list[dict[str, Any]]:
        """Sample predictions of the evaluation file, else of the run."""
        for source in (self.own, self.run):
            samples = [sample for sample in as_list(source.get("samples")) if isinstance(sample, Mapping)]
            if samples:
                return [dict(sample) for sample in samples]
        return []


@dataclass
class Chain:
    """All stages that were found, in order."""

    stages: list[Stage] = field(default_factory=list)
    others: list[dict[str, Any]] = field(default_factory=list)

    def stage(self, name: str) -> Stage | None:
        return next((stage for stage in self.stages if stage.name == name), None)


def as_dict(value: Any) -> dict[str, Any]:
    """``value`` if it is a dict, else an empty one: broken parts of a file must not break the page."""
    return dict(value) if isinstance(value, Mapping) else {}


def as_list(value: Any) -> list[Any]:
    """``value`` if it is a list, else an empty one."""
    return list(value) if isinstance(value, (list, tuple)) else []


def read_json(path: str | Path, inner: str = "run.json") -> dict[str, Any] | None:
    """A JSON object from a file, or from ``inner`` inside a folder; None with a warning where that fails."""
    file = Path(path)
    if file.is_dir():
        file = file / inner
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        logger.warning("left out of the report: %s (%s)", file, error)
        return None
    if not isinstance(value, dict):
        logger.warning("left out of the report: %s holds %s, not an object", file, type(value).__name__)
        return None
    return value


def split_name(text: str) -> tuple[str, str, str]:
    """``NAME[/VARIANT]=PATH`` into (name, variant, path); a bare path has an empty name.

    An ``=`` inside a path does not separate: a name holds letters, digits, ``_`` and one ``/`` only.
    """
    name, equals, path = text.partition("=")
    if not equals or not name.replace("/", "").replace("_", "").replace("-", "").isalnum() or name.count("/") > 1:
        return "", "", text
    stage, _, variant = name.partition("/")
    return stage, variant, path


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    """Merge a further evaluation file of the same name: dicts by key, lists one after the other."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            into[key].update(value)
        elif isinstance(value, list) and isinstance(into.get(key), list):
            into[key] = into[key] + value
        else:
            into.setdefault(key, value)


def load_chain(runs: Iterable[str | Path] = (), evaluations: Iterable[str] = ()) -> Chain:
    """Read a chain.

    Args:
        runs: run folders or run.json files; the stage is what the file's ``kind`` says, or ``NAME=`` in
            front. The first run of a kind is the stage, ``NAME/VARIANT=`` marks an ablation. Evaluation files
            are welcome too.
        evaluations: ``NAME=file.json`` or ``NAME/VARIANT=file.json``; several of one name are merged.

    Returns:
        Chain: possibly empty; unreadable files are logged and left out.
    """
    stages: dict[str, Stage] = {}
    chain = Chain()

    def stage_of(name: str) -> Stage:
        return stages.setdefault(name, Stage(name))

    files = [(True, str(text)) for text in runs] + [(False, str(text)) for text in evaluations]
    for is_run, text in files:
        name, variant, path = split_name(text)
        content = read_json(path)
        if content is None:
            continue
        if content.get("kind") == "evaluation" or not is_run:
            _merge(stage_of(name or "stage_zero").files.setdefault(variant, {}), content)
            continue
        stage = stage_of(name or str(content.get("kind", "run")))
        if variant:
            stage.runs.setdefault(variant, content)
        elif stage.run:
            chain.others.append(content)
        else:
            stage.run = content
    order = {name: place for place, name in enumerate(STAGES)}
    chain.stages = sorted(stages.values(), key=lambda stage: order.get(stage.name, len(order)))
    return chain
