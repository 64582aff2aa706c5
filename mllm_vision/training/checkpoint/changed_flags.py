"""Flags that differ from those a run was started with: which take effect on `--resume`, and which are refused.

A flag is refused where the checkpoint contains what it decides (the kind of optimizer, the shape of the model, the
order of the rows). Any other applies from the first step after the checkpoint, as `recipe.yaml` then records.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mllm_vision.hub.lineage import plain
from mllm_vision.training.recipe.arguments import RecipeArguments

# of `RecipeArguments`; its other flags take effect on resuming
_REFUSED = {
    "optim": "The checkpoint has no state for another optimizer",
    "seed": "The rows would come in another order",
    "data_seed": "The rows would come in another order",
    "dataloader_drop_last": "The length of an epoch would change",
    "train_sampling_strategy": "The rows would come in another order",
    "metric_for_best_model": "The best checkpoint so far was found by the other one",
    "greater_is_better": "The best checkpoint so far was found by the other one",
}
# of recipes, methods and data; their other flags are in the checkpoint or decide what a row is
_APPLIED = re.compile(
    r"(eval_|max_eval_|zero_shot_|knn_).*|.*learning_rate|.*weight_decay|"
    r"evaluators|final_evaluators|raw_pixels|templates|sample_count|max_new_tokens|artifact_name|"
    r"dataset_name|image_root|mix_datasets|eval_cache_gb|cache_features|features_dir"  # the trainer compares the rows
)
_NOTE = re.compile(r"# from step (\d+) on ")
_WHY = "The checkpoint was made with the other value"


def recipe_before(folder: Path, checkpoint: str | None) -> dict[str, Any]:
    """The flags of the run to resume; empty where there is no checkpoint or no recipe.yaml.

    Args:
        folder: the run folder.
        checkpoint: as named, perhaps in another folder; None means the newest.
    """
    source = Path(checkpoint).parent if checkpoint else folder
    if checkpoint is None and not any(folder.glob("checkpoint-*")):
        return {}
    file = source / "recipe.yaml"
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML ({error}); restore it from an artifact of the run") from error
    return found if isinstance(found, dict) else {}


def notes_before(folder: Path, step: int) -> list[str]:
    """The changes up to a step, from the first lines of `recipe.yaml`."""
    file = folder / "recipe.yaml"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    found = [(line.removeprefix("# "), match) for line in lines if (match := _NOTE.match(line))]
    return [line for line, match in found if int(match.group(1)) <= step]


def notes_of(changed: Mapping[str, tuple[Any, Any]], step: int) -> list[str]:
    """A line for each changed flag, as `notes_before` reads it."""
    return [f"from step {step + 1} on {name}: {now!r}; before {old!r}" for name, (old, now) in changed.items()]


def changed_flags(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Flag -> (value before, value now), of those that differ.

    Args:
        before: the recipe from `recipe.yaml`.
        now: the recipe of this start.

    Raises:
        ValueError: one that cannot take effect, with both values and the remedy.
    """
    now = yaml.safe_load(yaml.safe_dump(plain(now), sort_keys=False))
    own = {field.name for field in dataclasses.fields(RecipeArguments)}
    changed: dict[str, tuple[Any, Any]] = {}
    refused: list[str] = []
    for name, value in now.items():
        if name not in before or name == "output_dir" or _same(before[name], value):
            continue
        applied = name not in _REFUSED if name in own else bool(_APPLIED.fullmatch(name))
        if name == "ema_decay" and None in (before[name], value):
            applied = False
        changed[name] = (before[name], value)
        refused += [] if applied else [name]
    if refused:
        first, *others = refused
        also = f" (and another {', '.join(others)})" if others else ""
        raise ValueError(
            f"--resume with another {first}: {now[first]!r}, the run was started with {before[first]!r}{also}. "
            f"{_REFUSED.get(first, _WHY)}; give the flags of the run's recipe.yaml (--config, with --resume), or start "
            "from scratch in another --output_dir"
        )
    return changed


def _same(left: Any, right: Any) -> bool:
    """Equal values, or two spellings of one path."""
    if left == right:
        return True
    if not (isinstance(left, str) and isinstance(right, str)) or "/" not in left + right:
        return False
    return Path(left).exists() and Path(right).exists() and Path(left).resolve() == Path(right).resolve()
