"""The end of a run: machine and versions, the verdict against the baselines, the end table."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Mapping
from typing import Any

from mllm_vision.utils import columns, duration

_PACKAGES = (
    *("mllm_vision", "torch", "transformers", "accelerate", "peft", "datasets"),
    *("huggingface_hub", "tokenizers", "sentencepiece", "safetensors", "numpy", "pillow"),
)
_FIRST = ("accuracy", "zero_shot_accuracy", "r1", "image_to_text_r1", "perplexity", "loss")
# numbers of an evaluation that are not metrics
_COUNTS = ("count", "step", "skipped", "images", "texts", "dimensions")
_ASIDE = (*_COUNTS, "converged", "gradient", "iterations", "regularisation")
_SECRET = ("hub_token", "token", "api_key", "password")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results; absent ones are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine(processes: int = 1) -> dict[str, Any]:
    """Platform, cores, memory, accelerators; no host or user name."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    described: dict[str, Any] = {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_cores": cores,
        "torch_threads": torch.get_num_threads(),
        "processes": processes,
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        described["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return described


def command_line() -> str:
    """The command of this process, with secrets redacted."""
    words, hidden = [], False
    folder, file = os.path.split(sys.argv[0])
    program = [os.path.basename(sys.executable), sys.argv[0]]
    if os.path.isabs(folder) and os.path.basename(folder) in ("recipes", "scripts"):  # run by `mllm-vision`
        program = ["mllm-vision", file.removesuffix(".py").replace("_", "-")]
    for word in [*program, *(word.replace(f"{folder}/configs/", "") for word in sys.argv[1:])]:
        flag, equals, _ = word.partition("=")
        secret = flag.lstrip("-").replace("-", "_") in _SECRET
        if hidden:
            word = "REDACTED"
        elif secret and equals:
            word = f"{flag}=REDACTED"
        hidden = secret and not equals
        words.append(f"'{word}'" if any(sign in word for sign in ' {}*?"') else word)
    return " ".join(words)


def primary_metric(evaluation: Mapping[str, Any]) -> str | None:
    """The primary metric of an evaluation: the one it names, else the first usual one, else the first number."""
    named = evaluation.get("primary_metric")
    if isinstance(named, str) and isinstance(evaluation.get(named), (int, float)):
        return named
    numbers = [key for key, value in evaluation.items() if _is_number(value) and key not in _COUNTS]
    return next((key for key in _FIRST if key in numbers), numbers[0] if numbers else None)


def verdict(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per evaluation against each of its baselines: better, within noise, worse.

    Noise is two standard errors of the difference of two fractions where the evaluation has a `count`,
    else one hundredth of the baseline.
    """
    lines = []
    for name, evaluation in evaluations.items():
        metric = primary_metric(evaluation)
        baselines = evaluation.get("baselines") or {}
        if metric is None:
            continue
        for against, value in baselines.items():
            if isinstance(value, Mapping):  # a baseline may be a whole evaluation
                value = value.get(metric)
            if not _is_number(value):
                continue
            word = compare(metric, evaluation[metric], value, evaluation.get("count"), _own_error(evaluation, metric))
            lines.append(f"{name} {metric} {evaluation[metric]:.4g} against {against} {value:.4g}: {word}")
    return "\n".join(lines)


def compare(metric: str, value: float, baseline: float, count: float | None = None, error: float | None = None) -> str:
    """ "better", "within noise" or "worse"; losses and perplexities are better when lower.

    `error` is the standard error of a metric that is not a fraction of `count`, taken for the baseline's as well.
    """
    gain = baseline - value if metric == "perplexity" or metric.endswith("loss") else value - baseline
    errors = [each for of in (value, baseline) if (each := standard_error(of, count)) is not None]
    errors = errors if error is None else [error, error]
    noise = 2 * math.hypot(*errors) if len(errors) == 2 else abs(baseline) / 100
    return "within noise" if abs(gain) <= noise else ("better" if gain > 0 else "worse")


def standard_error(value: float, count: float | None) -> float | None:
    """Of a fraction of `count` independent cases; None for other numbers."""
    return math.sqrt(value * (1 - value) / count) if count and 0 <= value <= 1 else None


def _own_error(evaluation: Mapping[str, Any], metric: str) -> float | None:
    """The standard error that an evaluator gives itself."""
    return ((evaluation.get("details") or {}).get("errors") or {}).get(metric)


def metric_table(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The lines of a table of all metrics, with standard errors and baselines where they are known."""
    rows = [("metric", "value", "+/-", "baselines")]
    for name, evaluation in evaluations.items():
        chief = primary_metric(evaluation)
        baselines = {**(evaluation.get("baselines") or {}), **(evaluation.get("details") or {}).get("baselines", {})}
        for metric, value in evaluation.items():
            if not _is_number(value) or metric in _ASIDE:
                continue
            known = {key: of.get(metric) if isinstance(of, Mapping) else of for key, of in baselines.items()}
            beside = [f"{key} {of:.4g}" for key, of in known.items() if _is_number(of)] if metric == chief else []
            error = _own_error(evaluation, metric)
            if error is None and metric == chief:
                error = standard_error(value, evaluation.get("count"))
            rows.append(
                (f"{name} {metric}", f"{value:.4g}", "" if error is None else f"{error:.2g}", ", ".join(beside))
            )
    return columns(rows, right=(1, 2)) if len(rows) > 1 else []


def end_table(record: Mapping[str, Any]) -> str:
    """The last lines of a run: metrics beside their baselines, the verdict, paths, the time and the next command."""
    lines = ["", f"== {record.get('kind')}: {record.get('name')} ==", *metric_table(record.get("evaluations") or {})]
    lines += left_out(record) if record.get("evaluations") else ["nothing was measured", *left_out(record)]
    lines += [f"verdict: {line}" for line in str(record.get("verdict") or "").splitlines()]
    for entry in record.get("missing") or []:
        remedy = f"; {entry['remedy']}" if entry.get("remedy") else ""
        lines.append(f"missing: {entry['step']} ({entry['cause']}){remedy}")
    owner = f" ({record['artifact_is']})" if record.get("artifact_is") else ""
    lines += [f"{entry['kind']}: {entry['path']}{owner}" for entry in record.get("artifacts", [])]
    lines.append(f"time: {duration(record.get('seconds', 0))}")
    if record.get("next"):
        lines.append(f"next: {record['next']}")
    return "\n".join(lines)


def left_out(record: Mapping[str, Any]) -> list[str]:
    """A line for each data set and evaluation with left-out rows: how many, and why."""
    lines = []
    for role, data in (record.get("data") or {}).items():
        if counts := {**(data.get("left_out") or {}), **(data.get("refused") or {})}:
            lines.append(f"left out of {role}: {_counted(counts)}")
    bad = record.get("bad_samples") or {}
    if bad.get("count"):
        reasons = f" ({_counted(bad['reasons'])})" if bad.get("reasons") else ""
        lines.append(f"bad samples skipped: {bad['count']}{reasons}")
    for name, evaluation in (record.get("evaluations") or {}).items():
        refused = (evaluation.get("details") or {}).get("refused") or {}
        skipped = sum(refused.values()) or evaluation.get("skipped") or 0
        if skipped:
            lines.append(f"left out of {name}: {skipped:g} rows" + (f" ({_counted(refused)})" if refused else ""))
    return lines


def _counted(counts: Mapping[str, Any]) -> str:
    """`{"hidden files": 3}` -> `3 hidden files`, the most frequent first."""
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items(), key=lambda pair: -pair[1]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
