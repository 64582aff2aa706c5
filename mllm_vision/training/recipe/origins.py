"""Parent artifacts and data sets of a run, for its record and its log."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_vision.hub.lineage import check_lineage, hash_weights, plain
from mllm_vision.training.recipe.summary import primary_metric

TEXT_ROLES = ("caption", "question", "answer", "messages", "conversations", "text", "label")


def describe_parent(role: str, path_or_id: str) -> tuple[dict[str, Any], str]:
    """The entry of a parent artifact in `record["parents"]`, and a line for the log.

    Raises:
        ValueError: the hash of the parent's weights differs from its lineage.
    """
    path = Path(path_or_id)
    parent: dict[str, Any] = {"role": role, "path": str(path_or_id), "kind": None, "weights_sha256": None}
    if not path.is_dir():
        return parent, "from the Hub or its cache"
    lineage = check_lineage(path)
    if lineage is None:
        if any(path.glob("*.safetensors")):
            parent["weights_sha256"] = hash_weights(path)
        note = "a directory without lineage"
    else:
        parent |= {key: lineage.get(key) for key in ("kind", "weights_sha256", "run")}
        parent["parents"] = lineage.get("parents", [])
        evaluations = lineage.get("evaluations") or {}
        chief = {name: metric for name, entry in evaluations.items() if (metric := primary_metric(entry)) is not None}
        numbers = [f"{name} {metric} {evaluations[name][metric]:.4g}" for name, metric in chief.items()]
        note = f"{lineage.get('kind')} of run {lineage.get('run')!r}; {', '.join(numbers) or 'no metrics'}"
    if parent["weights_sha256"]:
        note += f"; weights sha256 {parent['weights_sha256'][:12]}"
    return parent, note


def describe_data(dataset: Any, columns: Mapping[str, str]) -> dict[str, Any]:
    """The entry of a data set in `record["data"]`: fingerprint, rows, bound and unused columns, three texts.

    Args:
        dataset: records, a stream, or a list of texts.
        columns: role -> column; empty where rows are used unchanged.
    """
    rows = len(dataset) if hasattr(dataset, "__len__") else getattr(dataset, "total", None)
    view = dataset.head() if hasattr(dataset, "head") else dataset  # of a stream, its first rows
    names = getattr(view, "column_names", None) or []
    samples = _samples(view, columns, getattr(dataset, "column_names", None) or ["text"])
    fingerprint = getattr(dataset, "_fingerprint", None)
    if fingerprint is None:
        fingerprint = hashlib.sha256(json.dumps([rows, plain(samples)]).encode()).hexdigest()[:16]
    return {
        "fingerprint": fingerprint,
        "rows": rows,
        "columns": dict(columns),
        "unused_columns": [
            name for name in names if columns and name not in columns.values() and not name.startswith("__")
        ],
        "left_out": dict(getattr(dataset, "left_out", None) or {}),
        "samples": samples,
    }


def _samples(view: Any, columns: Mapping[str, str], names: list[str]) -> list[dict[str, str]]:
    """The texts of the first, middle and last row, without decoding images."""
    wanted = [column for bound, column in columns.items() if bound in TEXT_ROLES]
    if not columns:
        wanted = [name for name in names if "image" not in name]
    count = len(view) if hasattr(view, "__len__") else 0
    if hasattr(view, "select_columns"):
        wanted = [name for name in wanted if name in view.column_names]
        view, count = view.select_columns(wanted), count if wanted else 0  # images only: no texts
    samples = []
    for index in sorted({0, count // 2, count - 1}) if count else []:
        row = view[index]
        row = {name: row[name] for name in wanted if name in row} if isinstance(row, Mapping) else {"text": row}
        samples.append({name: _shorten(value) for name, value in row.items()})
    return samples


def _shorten(value: Any, limit: int = 200) -> str:
    text = value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 3] + "..."
