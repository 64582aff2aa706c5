"""The flat mapping of results.json: ``stage/metric`` to a number."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from mllm_vision.report.chain import Chain, Stage, as_dict
from mllm_vision.utils import write_whole

logger = logging.getLogger(__name__)

# What stands before a metric's name. Answering questions is what stage two is for, so it needs no word.
TASK_WORDS = {"zero_shot": "zero_shot_", "retrieval": "retrieval_", "vqa": "", "geometry": "", "maps": None}
COUNTS = {"count", "images", "texts", "skipped", "dimensions", "step"}


def task_of(name: str, entry: dict[str, Any]) -> tuple[str, str]:
    """(variant, task) of an evaluation called ``name``: "unseen/zero_shot" gives ("unseen", "zero_shot")."""
    variant, _, task = name.rpartition("/")
    return variant.replace("/", "_"), str(entry.get("task") or task)


def numbers(values: Any) -> dict[str, float]:
    """The finite numbers of a dict."""
    return {
        key: float(value)
        for key, value in as_dict(values).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def baselines_of(entry: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Baseline name to metrics; where only one figure a baseline is given, it is the primary metric's."""
    full = as_dict(as_dict(entry.get("details")).get("baselines"))
    found = {name: numbers(values) for name, values in full.items()}
    primary = str(entry.get("primary_metric", "accuracy"))
    for name, value in as_dict(entry.get("baselines")).items():
        given = numbers(value) if isinstance(value, dict) else numbers({primary: value})
        found.setdefault(name, {}).update({key: v for key, v in given.items() if key not in found[name]})
    return {name: values for name, values in found.items() if values}


def _stage_results(stage: Stage) -> dict[str, float]:
    results: dict[str, float] = {}
    # A stage that no evaluation file measures has only what its run measured of itself.
    files = stage.files or {"": {"evaluations": stage.run.get("evaluations")}}
    for file_variant, content in sorted(files.items()):
        for name, entry in as_dict(content.get("evaluations")).items():
            entry = as_dict(entry)
            variant, task = task_of(name, entry)
            word = TASK_WORDS.get(task, f"{task}_")
            if word is None:
                continue
            head = "".join(f"{part}_" for part in (file_variant.replace("/", "_"), variant) if part)
            for metric, value in numbers(entry).items():
                if metric not in COUNTS:
                    results.setdefault(f"{stage.name}/{head}{word}{metric}", value)
            # an ablation's own baselines say nothing new
            for baseline, values in ({} if file_variant else baselines_of(entry)).items():
                for metric, value in values.items():
                    if metric in COUNTS or (baseline.startswith("majority") and metric.startswith("accuracy_")):
                        continue
                    chance = baseline == "chance"
                    key = f"{word}{metric}_chance" if chance else f"{baseline}_{word}{metric}"
                    results[f"{stage.name}/{head}{key}"] = value
    seconds = numbers(stage.run).get("seconds")
    if seconds is not None:
        results[f"{stage.name}/seconds"] = seconds
    return results


def flat_results(chain: Chain) -> dict[str, float]:
    """``stage/metric`` to number, from the evaluation files of a chain, else from what its runs measured themselves.

    ``<stage>/[<variant>_][<baseline>_][<task>_]<metric>[_chance]``: ``stage_zero/zero_shot_accuracy``,
    ``stage_zero/untrained_zero_shot_accuracy``, ``stage_zero/retrieval_r1_chance``, ``stage_one/captions_loss``,
    ``stage_two/accuracy``, ``stage_two/accuracy_<type>``, ``stage_two/blind_accuracy``. Fractions.
    """
    results: dict[str, float] = {}
    for stage in chain.stages:
        results |= _stage_results(stage)
    return {key: round(value, 6) for key, value in results.items()}


def write_results(chain: Chain, path: str | Path) -> dict[str, float]:
    """Write :func:`flat_results` as JSON, atomically, and return it."""
    results = flat_results(chain)
    write_whole(path, json.dumps(results, indent=2, sort_keys=True) + "\n")
    return results
