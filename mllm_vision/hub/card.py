"""Model cards, drawn from what the run wrote: lineage.json beside the weights, run.json in the run folder."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mllm_vision.encoder.families import FAMILIES
from mllm_vision.hub.citations import citations
from mllm_vision.hub.lineage import read_lineage

_DUALS = ("clip", "siglip", "vision-text-dual-encoder", "mllm_vision_dual")
_PIPELINES = {
    "encoder": "image-feature-extraction",
    "dual": "zero-shot-image-classification",
    "vlm": "image-text-to-text",
}
_WORDS = {"encoder": "vision encoder", "dual": "image-text pair", "vlm": "vision-language model", "model": "model"}


def kind_of(config: Mapping[str, Any]) -> str:
    """`encoder`, `dual`, `vlm` or `model`, from the `model_type` of a config.json."""
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return "encoder"
    if model_type in _DUALS:
        return "dual"
    return "vlm" if {"vision_config", "text_config"} <= set(config) else "model"


def describe(config: Mapping[str, Any]) -> str:
    """What a model is, in a few words."""
    return f"{_WORDS[kind_of(config)]} ({config.get('model_type', 'unknown type')})"


def model_card(path: str | os.PathLike[str], *, name: str | None = None, run: dict[str, Any] | None = None) -> str:
    """The model card (README.md) of a saved model.

    Args:
        path: the directory; its lineage.json, and the run.json beside or above it, are read if they are there.
        name: the Hub id that the lines of use load; None uses the directory's own path.
        run: the content of a run.json to use instead.

    Returns:
        str: Markdown with the Hub's YAML header. Sections without facts are left out.
    """
    folder = Path(path)
    config = json.loads((folder / "config.json").read_text())
    lineage = read_lineage(folder) or {}
    facts = {**(run if run is not None else find_run(folder, lineage)), **lineage}
    kind, title = kind_of(config), (name or folder.name).split("/")[-1]
    shapes = _shapes(folder)
    pooler = config.get("model_type") != "vit" or any("pooler" in key.split(".") for key, _ in shapes)
    recipe = _recipe(facts, folder)
    chosen, rest = _hyperparameters(recipe)
    evaluations = {key: entry for key, entry in (facts.get("evaluations") or {}).items() if isinstance(entry, dict)}
    baselines = list(dict.fromkeys(key for entry in evaluations.values() for key in _baselines(entry)))
    text = _template().render(
        card_data=_card_data(kind, title, facts, evaluations).to_yaml().strip(),
        title=title,
        what=describe(config),
        snippet="own_dual" if config.get("model_type") == "mllm_vision_dual" else kind,
        name=name or str(folder),
        tokens=_tokens(config, pooler) if kind == "encoder" else "",
        pooler=pooler,
        config=config,
        vision=config if kind == "encoder" else config.get("vision_config") or {},
        parameters=sum(math.prod(shape) for _, shape in shapes),
        facts=facts,
        baselines=baselines,
        results=_results(evaluations, baselines),
        chosen=chosen,
        rest=rest,
        log=_log(facts, recipe),
        citation=citations(kind, config, (facts.get("method") or {}).get("citation", "")),
    )
    return str(ModelCard(text))


def _card_data(kind: str, title: str, facts: dict[str, Any], evaluations: dict[str, dict[str, Any]]) -> ModelCardData:
    """The Hub's YAML header; the primary metric of each evaluation goes into the Hub's own table of results."""
    stage, task = facts.get("stage") or facts.get("kind"), _PIPELINES.get(kind)
    results = []
    for name, entry in evaluations.items():
        metrics, primary = _metrics(entry)
        if primary is not None:
            value = metrics[primary]
            results.append(EvalResult(task or "other", name, name, primary, value, dataset_split="validation"))
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["mllm_vision", *([stage] if isinstance(stage, str) else [])],
        model_name=title if results else None,
        eval_results=results or None,
    )


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader,
        undefined=jinja2.ChainableUndefined,  # a fact that a run does not have is empty
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": _cell, "sample": _sample, "basename": lambda path: Path(str(path or "")).name}
    return environment.get_template("card.md")


def find_run(folder: Path, lineage: dict[str, Any]) -> dict[str, Any]:
    """run.json of the run that made these weights; empty if there is none, or it made others."""
    for file in (folder / "run.json", folder.parent / "run.json"):
        if not file.is_file():
            continue
        run: dict[str, Any] = json.loads(file.read_text())
        made = {artifact.get("weights_sha256") for artifact in run.get("artifacts", [])}
        if lineage.get("weights_sha256") in made or file.parent == folder:
            return run
    return {}


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def _shapes(folder: Path) -> list[tuple[str, list[int]]]:
    """Names and shapes of all saved tensors but an adapter's, which are merged into the model's own."""
    from safetensors import safe_open

    found = []
    for file in folder.rglob("*.safetensors"):
        if "adapter" not in file.relative_to(folder).parts:
            with safe_open(file, framework="np") as tensors:
                found += [(key, tensors.get_slice(key).get_shape()) for key in tensors.keys()]  # noqa: SIM118
    return found


def _tokens(config: dict[str, Any], pooler: bool) -> str:
    """How plain Python takes the selected tokens out of the `outputs` of a vision encoder."""
    own = config.get("mllm_vision") or {}
    feature, family = own.get("select_feature", "patch"), FAMILIES[config["model_type"]]
    registers = int(config.get("num_register_tokens") or 0)
    states = f"outputs.hidden_states[{own.get('select_layer', -1)}]"
    if feature == "pooled":
        return "outputs.pooler_output.flatten(1)[:, None]" if pooler else "outputs.last_hidden_state[:, :1]"
    if family.convolutional:
        return f"{states}.flatten(2).transpose(1, 2)"
    if feature == "cls":
        return f"{states}[:, :1]"
    if feature == "cls_patch":
        return f"{states}[:, [0, *range({registers + 1}, {states}.shape[1])]]" if registers else states
    prefix = int(family.has_cls) + registers
    return f"{states}[:, {prefix}:]" if prefix else states


def _metrics(entry: dict[str, Any]) -> tuple[dict[str, float], str | None]:
    """The numbers of an evaluation, and which of them is the primary one."""
    metrics = {key: float(value) for key, value in entry.items() if isinstance(value, (int, float)) and key != "count"}
    primary = entry.get("primary_metric")
    return metrics, primary if primary in metrics else next(iter(metrics), None)


def _results(evaluations: dict[str, dict[str, Any]], baselines: list[str]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for name, entry in evaluations.items():
        metrics, primary = _metrics(entry)
        known = _baselines(entry)
        for metric, value in metrics.items():
            beside = [_baseline(known.get(baseline), metric, metric == primary) for baseline in baselines]
            rows.append((name, metric, value, *beside))
    return rows


def _baselines(entry: dict[str, Any]) -> dict[str, Any]:
    details = entry.get("details")
    full = details.get("baselines") if isinstance(details, dict) else None
    return {**(entry.get("baselines") or {}), **(full or {})}


def _baseline(value: Any, metric: str, primary: bool) -> Any:
    """A baseline is one number for the primary metric, or a number for each."""
    return value.get(metric) if isinstance(value, dict) else value if primary else None


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


def _hyperparameters(recipe: dict[str, Any]) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """Flags that differ from the Trainer's defaults (and all flags of our own that say something), then the rest."""
    from transformers import TrainingArguments

    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    chosen, rest = [], []
    for name, value in sorted(recipe.items()):
        usual = value == defaults[name] if name in defaults else value in (None, "", False, [], {})
        if usual or value is None:
            rest.append((name, value))
        else:
            chosen.append((f"`{name}`", value))
    return chosen, rest


def _log(facts: dict[str, Any], recipe: dict[str, Any], limit: int = 12) -> dict[str, Any]:
    """Up to `limit` steps of the history, evenly spaced, with the best one marked."""
    merged: dict[Any, dict[str, Any]] = {}
    for row in facts.get("history") or []:
        if isinstance(row, dict) and "step" in row:
            merged.setdefault(row["step"], {}).update(row)
    scores = dict.fromkeys(key for row in merged.values() for key in row if key.startswith("eval_"))
    shown = ["loss", *[key for key in scores if not key.endswith(("_runtime", "_per_second"))][:3]]
    wanted = str(recipe.get("metric_for_best_model") or (shown[1] if len(shown) > 1 else "loss"))
    wanted = wanted if wanted == "loss" or wanted.startswith("eval_") else f"eval_{wanted}"
    rows = [row for row in merged.values() if any(key in row for key in shown)]
    if not rows:
        return {}
    known = [row for row in rows if isinstance(row.get(wanted), (int, float))]
    pick = min if "loss" in wanted else max
    best = pick(known, key=lambda row: row[wanted])["step"] if known else None
    count = min(limit, len(rows))
    even = {round(index * (len(rows) - 1) / max(1, count - 1)) for index in range(count)}
    kept = [row for index, row in enumerate(rows) if index in even or row["step"] == best]
    cells = [
        (f"**{row['step']}**" if row["step"] == best else row["step"], *(row.get(key) for key in shown)) for row in kept
    ]
    head = ["step", "loss", *(f"`{key}`" for key in shown[1:])]
    return {"head": head, "rows": cells, "wanted": wanted, "best": best}
