"""Recipes as a function call, for notebooks and scripts: the same code, flags and run folder as the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from mllm_vision.cli import program

RECIPES = ("align", "instruct", "finetune", "language_model")  # the others are selected by their method


@dataclass(frozen=True)
class TrainedRun:
    """The result of a training run.

    Attributes:
        folder: the run folder, `output_dir`.
        artifact: the folder of the model for the next stage: the encoder, or the vision-language model.
        artifacts: every saved model by name.
        metrics: the final evaluation, `eval_<evaluator>_<metric>` -> number.
        record: the content of run.json.
    """

    folder: Path
    artifact: Path
    artifacts: dict[str, Path] = field(repr=False)
    metrics: dict[str, float]
    record: dict[str, Any] = field(repr=False)


def train(
    method: str | type,
    data: str | Path | Sequence[str | Path] | None = None,
    *,
    output_dir: str | Path,
    callbacks: Sequence[Any] = (),
    **flags: Any,
) -> TrainedRun:
    """Trains with a recipe in this process, like `mllm-vision <verb> --flag value ...`.

    Example:
        >>> run = mllm_vision.train("simclr", "images/", encoder="vit_small", output_dir="runs/simclr")
        >>> encoder = mllm_vision.VisionEncoder.from_pretrained(run.artifact)

    Args:
        method: a method of `list_objectives()`, `"package.module:Class"` or the class; or another recipe:
            `"align"`, `"instruct"`, `"finetune"`, `"language_model"`.
        data: file, folder, pattern or Hub id of the training data (`dataset_name`); text files for `"language_model"`.
        output_dir: the run folder.
        callbacks: `transformers.TrainerCallback` objects.
        **flags: any flag of the recipe by its name (`encoder="vit_small"`, `max_steps=100`,
            `encoder_overrides={"patch_size": 8}`).

    Returns:
        Folder, artifact and final metrics of the run.

    Raises:
        ValueError: an unknown method or flag (the nearest known one is named), an invalid value.
        FileNotFoundError: data or model that does not exist.
        FileExistsError: `output_dir` contains a run, and neither `overwrite=True` nor `resume=True` was given.
        IncompleteRun: the model is trained and saved, but a later step failed.
    """
    verb, chosen = _recipe_of(method)
    given = {**chosen, **flags, "output_dir": output_dir}
    if data is not None:
        given["text_files" if verb == "language-model" else "dataset_name"] = data
    words = _words(given)
    with _as_program(verb, words):
        _load(verb).main(words, callbacks=list(callbacks))
    record = json.loads((Path(output_dir) / "run.json").read_text(encoding="utf-8"))
    artifacts = {entry["name"]: Path(entry["path"]) for entry in record["artifacts"]}
    metrics = {
        f"eval_{name}_{metric}": float(value)
        for name, evaluation in record["evaluations"].items()
        for metric, value in evaluation.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    return TrainedRun(Path(output_dir), next(iter(artifacts.values())), artifacts, metrics, record)


def _recipe_of(method: str | type) -> tuple[str, dict[str, Any]]:
    """The verb that trains a method, and the flag that selects the method."""
    if isinstance(method, str) and method.replace("-", "_") in RECIPES:
        return method.replace("_", "-"), {}
    from mllm_vision.objectives import ImageTextObjective, load_objective

    name = method if isinstance(method, str) else f"{method.__module__}:{method.__qualname__}"
    try:
        pairs = issubclass(load_objective(name), ImageTextObjective)
    except ValueError as error:
        raise ValueError(f"{error}; other recipes are {', '.join(RECIPES)}") from error
    return ("pretrain" if pairs else "pretrain-images"), {"objective": name}


def _words(flags: Mapping[str, Any]) -> list[str]:
    """Flags as command-line arguments; None is the default."""
    words: list[str] = []
    for name, value in flags.items():
        if value is None:
            continue
        if isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, Mapping):
            value = json.dumps(dict(value))
        if isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]
    return words


def _load(verb: str) -> Any:
    """The module of a recipe, under its name in a wheel."""
    file = program(verb)
    name = f"mllm_vision.recipes.{file.stem}"
    if name not in sys.modules:
        spec = spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[name] = module  # dataclasses resolve annotations there
        spec.loader.exec_module(module)
    return sys.modules[name]


@contextmanager
def _as_program(verb: str, words: Sequence[str]) -> Iterator[None]:
    """`sys.argv` as on the command line, which the run records."""
    before = sys.argv
    sys.argv = [str(program(verb)), *words]
    try:
        yield
    finally:
        sys.argv = before
