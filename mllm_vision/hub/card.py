"""Model cards, drawn from what the run wrote: lineage.json beside the weights, run.json in the run folder."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mllm_vision.encoder.families import FAMILIES
from mllm_vision.hub.citations import citations
from mllm_vision.hub.lineage import read_lineage
from mllm_vision.hub.snippets import snippet

_DUALS = ("clip", "siglip", "vision-text-dual-encoder", "mllm_vision_dual")
_PIPELINES = {
    "encoder": "image-feature-extraction",
    "dual": "zero-shot-image-classification",
    "vlm": "image-text-to-text",
}


def kind_of(config: dict[str, Any]) -> str:
    """`encoder`, `dual`, `vlm` or `model`, told from a config.json."""
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return "encoder"
    if model_type in _DUALS:
        return "dual"
    return "vlm" if model_type == "llava" else "model"


def describe(config: dict[str, Any]) -> str:
    """What a model is, in a few words."""
    words = {"encoder": "vision encoder", "dual": "image-text pair", "vlm": "vision-language model", "model": "model"}
    return f"{words[kind_of(config)]} ({config.get('model_type', 'unknown type')})"


def model_card(path: str | os.PathLike[str], *, name: str | None = None, run: dict[str, Any] | None = None) -> str:
    """The model card (README.md) of a saved model.

    Args:
        path: the directory; its lineage.json, and the run.json beside or above it, are read if they are there.
        name: the Hub id that the ten lines of use load; None uses the directory's own path.
        run: the content of a run.json to use instead.

    Returns:
        str: Markdown with the Hub's YAML header. Sections without facts are left out.
    """
    folder = Path(path)
    config = json.loads((folder / "config.json").read_text())
    lineage = read_lineage(folder) or {}
    facts = {**(run if run is not None else find_run(folder, lineage)), **lineage}
    kind = kind_of(config)
    title = name or folder.name
    parts = [
        _header(kind, facts),
        f"# {title.split('/')[-1]}",
        f"{_article(describe(config))}, made with mllm_vision. {_loads(config)}",
        _architecture(kind, config, folder),
        _section("Use", snippet(kind, config, name or str(folder), pooler=_has_pooler(config, folder))),
        _section("How it was trained", _training(facts)),
        _section("Results", _results(facts)),
        _section("Training data", _data(facts)),
        _section("Hyperparameters", _hyperparameters(_recipe(facts, folder))),
        _section("Training log", _log(facts)),
        _section("Versions", _versions(facts)),
        _section("Citation", citations(kind, config, (facts.get("method") or {}).get("citation", ""))),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def find_run(folder: Path, lineage: dict[str, Any]) -> dict[str, Any]:
    """run.json of the run that made these weights; empty if there is none, or it made others."""
    for file in (folder / "run.json", folder.parent / "run.json"):
        if not file.is_file():
            continue
        run = json.loads(file.read_text())
        made = {artifact.get("weights_sha256") for artifact in run.get("artifacts", [])}
        if lineage.get("weights_sha256") in made or file.parent == folder:
            return run
    return {}


def _article(words: str) -> str:
    return f"{'An' if words[0] in 'aeiou' else 'A'} {words}"


def _loads(config: dict[str, Any]) -> str:
    if config.get("model_type") == "mllm_vision_dual":
        return "Its towers are plain transformers checkpoints; the pair loads with mllm_vision."
    return "It is a plain transformers checkpoint and loads without that package."


def _header(kind: str, facts: dict[str, Any]) -> str:
    lines = ["---", "library_name: transformers"]
    if kind in _PIPELINES:
        lines.append(f"pipeline_tag: {_PIPELINES[kind]}")
    stage = facts.get("stage") or facts.get("kind")
    lines += ["tags:", "- mllm_vision"] + ([f"- {stage}"] if isinstance(stage, str) else [])
    return "\n".join([*lines, "---"])


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    rows = [[_cell(value) for value in row] for row in rows]
    if not rows:
        return ""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None:
        return ""
    return str(value).replace("|", "\\|").replace("\n", " ")


def _architecture(kind: str, config: dict[str, Any], folder: Path) -> str:
    vision = config if kind == "encoder" else config.get("vision_config") or {}
    own = vision.get("mllm_vision") or {}
    rows = [
        ("parameters", f"{_count_parameters(folder):,}"),
        ("image tower", vision.get("model_type")),
        ("image size", vision.get("image_size")),
        ("patch size", vision.get("patch_size")),
        ("width", vision.get("hidden_size")),
        ("layers", vision.get("num_hidden_layers")),
        ("select_layer", own.get("select_layer")),
        ("select_feature", own.get("select_feature")),
        ("language model", (config.get("text_config") or {}).get("model_type") if kind == "vlm" else None),
    ]
    return _table(("what", "value"), [row for row in rows if row[1] is not None])


def _count_parameters(folder: Path) -> int:
    from safetensors import safe_open

    total = 0
    for file in folder.rglob("*.safetensors"):
        if "adapter" in file.relative_to(folder).parts:
            continue
        with safe_open(file, framework="np") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                size = 1
                for length in tensors.get_slice(key).get_shape():
                    size *= length
                total += size
    return total


def _has_pooler(config: dict[str, Any], folder: Path) -> bool:
    """False of a ViT whose weights hold none, as stage zero leaves it."""
    from safetensors import safe_open

    if config.get("model_type") != "vit":
        return True
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            if any("pooler" in key.split(".") for key in tensors.keys()):  # noqa: SIM118  (safe_open is no mapping)
                return True
    return False


def _training(facts: dict[str, Any]) -> str:
    lines = []
    stage = facts.get("stage") or facts.get("kind")
    if stage:
        steps = f", {facts['steps']} steps" if facts.get("steps") else ""
        lines.append(f"Stage: {str(stage).replace('_', ' ')}{steps}.")
    if facts.get("artifact_is"):
        lines.append(f"These weights, and the results below, are those of {facts['artifact_is']}.")
    if isinstance(facts.get("seconds"), (int, float)):
        lines.append(f"Time: {facts['seconds'] / 60:.1f} minutes on {_machine(facts.get('machine'))}.")
    if facts.get("seed") is not None:
        lines.append(f"Seed: {facts['seed']}.")
    if facts.get("verdict"):
        lines += ["Verdict:", *(f"- {line}" for line in str(facts["verdict"]).splitlines())]
    if facts.get("command"):
        command = facts["command"]
        command = " ".join(map(str, command)) if isinstance(command, list) else str(command)
        lines.append(f"\n```bash\n{command}\n```")
    parents = [
        (entry.get("role"), Path(str(entry.get("path", ""))).name, (entry.get("weights_sha256") or "")[:16])
        for entry in facts.get("parents") or []
    ]
    table = _table(("inherited", "from", "sha256 of its weights"), parents)
    return "\n".join(lines) + (f"\n\n{table}" if table else "")


def _machine(machine: Any) -> str:
    if isinstance(machine, dict):
        return ", ".join(f"{key} {value}" for key, value in machine.items() if value not in (None, "", [], False))
    return str(machine or "one machine")


def _results(facts: dict[str, Any]) -> str:
    rows: list[tuple[Any, ...]] = []
    evaluations = {name: entry for name, entry in (facts.get("evaluations") or {}).items() if isinstance(entry, dict)}
    names = list(dict.fromkeys(name for entry in evaluations.values() for name in _baselines(entry)))
    for evaluation, entry in evaluations.items():
        metrics = [key for key, value in entry.items() if isinstance(value, (int, float)) and key != "count"]
        first = entry.get("primary_metric") if entry.get("primary_metric") in metrics else next(iter(metrics), None)
        for metric in metrics:
            known = [_baseline(_baselines(entry).get(name), metric, metric == first) for name in names]
            rows.append((evaluation, metric, float(entry[metric]), *known))
    return _table(("evaluation", "metric", "this model", *names), rows)


def _baselines(entry: dict[str, Any]) -> dict[str, Any]:
    details = entry.get("details")
    full = details.get("baselines") if isinstance(details, dict) else None
    return {**(entry.get("baselines") or {}), **(full or {})}


def _baseline(value: Any, metric: str, primary: bool) -> Any:
    """A baseline is one number for the first metric, or a number for each."""
    return value.get(metric) if isinstance(value, dict) else value if primary else None


def _data(facts: dict[str, Any]) -> str:
    parts = []
    for role, entry in (facts.get("data") or {}).items():
        if not isinstance(entry, dict):
            continue
        columns = ", ".join(f"{key}: {value}" for key, value in (entry.get("columns") or {}).items()) or None
        rows = [("rows", entry.get("rows")), ("columns", columns), ("fingerprint", entry.get("fingerprint"))]
        parts.append(f"**{role}**\n\n" + _table(("what", "value"), [row for row in rows if row[1] is not None]))
        samples = entry.get("samples") or []
        if samples:
            parts.append("\n".join(f"- {_sample(sample)}" for sample in samples[:3]))
    return "\n\n".join(parts)


def _sample(sample: Any) -> str:
    text = json.dumps(sample, ensure_ascii=False) if isinstance(sample, (dict, list)) else str(sample)
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."


def _recipe(facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    recipe = facts.get("recipe")
    if not isinstance(recipe, dict) and (folder / "recipe.yaml").is_file():
        import yaml

        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    return recipe if isinstance(recipe, dict) else {}


def _hyperparameters(recipe: dict[str, Any]) -> str:
    """Flags that differ from the Trainer's defaults (and all flags of our own that say something) come first."""
    if not recipe:
        return ""
    from transformers import TrainingArguments

    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    chosen, rest = [], []
    for name, value in recipe.items():
        usual = value == defaults[name] if name in defaults else value in (None, "", False, [], {})
        (rest if usual or value is None else chosen).append((f"`{name}`", value))
    table = _table(("flag", "value"), sorted(chosen))
    if rest:
        listed = ", ".join(f"{name} {_cell(value)}".strip() for name, value in sorted(rest))
        table += f"\n\n<details><summary>{len(rest)} flags left at their defaults</summary>\n\n{listed}\n\n</details>"
    return table


def _log(facts: dict[str, Any], limit: int = 12) -> str:
    """Up to `limit` steps of the history, evenly spaced, with the best one marked."""
    history = [row for row in facts.get("history") or [] if isinstance(row, dict) and "step" in row]
    merged: dict[Any, dict[str, Any]] = {}
    for row in history:
        merged.setdefault(row["step"], {}).update(row)
    scores = [key for row in merged.values() for key in row if key.startswith("eval_")]
    scores = [key for key in dict.fromkeys(scores) if not key.endswith(("_runtime", "_per_second"))][:3]
    wanted = (facts.get("recipe") or {}).get("metric_for_best_model") or (scores[0] if scores else "loss")
    wanted = wanted if wanted == "loss" or wanted.startswith("eval_") else f"eval_{wanted}"
    rows = [row for row in merged.values() if any(key in row for key in ("loss", *scores))]
    if not rows:
        return ""
    known = [row for row in rows if isinstance(row.get(wanted), (int, float))]
    pick = min if "loss" in wanted else max
    best = pick(known, key=lambda row: row[wanted])["step"] if known else None
    count = min(limit, len(rows))
    even = {round(index * (len(rows) - 1) / max(1, count - 1)) for index in range(count)}
    shown = [row for index, row in enumerate(rows) if index in even or row["step"] == best]
    cells = [
        (f"**{row['step']}**" if row["step"] == best else row["step"], *(row.get(key) for key in ("loss", *scores)))
        for row in shown
    ]
    note = f"\n\nBold: the best step by `{wanted}`." if best is not None else ""
    return _table(("step", "loss", *(f"`{key}`" for key in scores)), cells) + note


def _versions(facts: dict[str, Any]) -> str:
    versions = facts.get("versions") or {}
    return ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else ""
