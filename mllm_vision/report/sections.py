"""What the page shows of one stage, as data for the templates; empty where a run has no such data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from mllm_vision.report import charts
from mllm_vision.report.chain import Stage, as_dict, as_list
from mllm_vision.report.charts import Line
from mllm_vision.report.format import duration, is_fraction, label, number, shown, tint
from mllm_vision.report.results import COUNTS, baselines_of, numbers, task_of

SERIES = ("model", "blind", "right", "other", "wrong", "untrained")
ABLATIONS = ("untrained_encoder", "blind")
TASKS = {
    "zero_shot": "Zero-shot classification",
    "retrieval": "Retrieval",
    "vqa": "Questions about images",
    "yes_no": "Yes/no questions",
    "captioning": "Captions",
    "geometry": "Geometry of the embeddings",
    "board": "Geometry of the embeddings",
    "knn": "Nearest neighbours",
    "probe": "Linear probe",
}
ENTROPIES = ("teacher_entropy", "prototype_entropy", "divergence")


class History:
    """The logged quantities of a run as series of (step, value)."""

    def __init__(self, run: dict[str, Any]) -> None:
        self.series: dict[str, list[tuple[float, float]]] = {}
        for entry in map(as_dict, as_list(run.get("history"))):
            values = numbers(entry)
            step = values.pop("step", None)
            if step is not None:
                for key, value in values.items():
                    self.series.setdefault(key, []).append((step, value))

    def __getitem__(self, key: str) -> list[tuple[float, float]]:
        return self.series.get(key, [])

    def lines(self, keys: Iterable[str], remove: str = "") -> list[Line]:
        """One line for each key that was logged, its name without the pattern `remove`."""
        logged = [key for key in keys if key in self.series]
        return [Line(label(re.sub(remove, "", key)), self[key], colour) for key, colour in zip(logged, SERIES)]


def from_images_alone(run: dict[str, Any]) -> bool:
    """Whether the training set of a stage zero had images and no captions."""
    columns = as_dict(as_dict(as_dict(run.get("data")).get("train")).get("columns"))
    return run.get("kind") == "stage_zero" and "image" in columns and "caption" not in columns


def intro(stage: Stage) -> dict[str, Any]:
    """The run, what kind of training it was, and the facts of its first line."""
    run, history = stage.run, History(stage.run)
    facts = []
    for role, data in as_dict(run.get("data")).items():
        rows = numbers(data).get("rows")
        if rows is not None:
            facts.append(f"{number(rows)} {role.replace('_', ' ')} rows")
    steps = max((points[-1][0] for points in history.series.values()), default=0)
    speed = sorted(value for _, value in history["samples_per_second"])
    seconds, bad = numbers(run).get("seconds"), numbers(run.get("bad_samples")).get("count")
    facts += [f"{number(steps)} steps"] if steps else []
    facts += [f"{number(round(speed[len(speed) // 2]))} samples a second"] if speed else []
    facts += [duration(seconds)] if seconds else []
    facts += [f"{number(bad)} bad samples skipped"] if bad else []
    kind = "images_alone" if from_images_alone(run) else stage.name
    return {"run": run, "kind": kind, "facts": facts} if run else {}


def curves(stage: Stage) -> dict[str, list[Any]]:
    """Loss, evaluation metrics and the other logged quantities against the step."""
    run, history = stage.run, History(stage.run)
    method = as_dict(run.get("method"))
    rates = [key for key in history.series if key.startswith("learning_rate")]
    main: list[charts.Chart | None] = [_loss(stage, history), _validation(run, history)]
    if from_images_alone(run):  # both fall when all images get the same embedding
        for ending, title in (
            ("_spread", "Spread of the embeddings: 1 even, 0 collapsed"),
            ("_rank", "Effective rank"),
        ):
            keys = [key for key in history.series if key.endswith(ending) and not key.startswith("eval_")]
            unit = "dimensions" if ending == "_rank" else "spread"
            main.append(charts.line_chart(title, history.lines(keys, f"{ending}$"), unit=unit, zero=True))
    folded = [
        charts.line_chart("Parts of the loss", history.lines(map(str, as_list(method.get("loss_parts"))))),
        charts.line_chart("Entropy of the teacher's outputs", history.lines(ENTROPIES), unit="nats"),
        charts.line_chart("Scale and bias of the loss", history.lines(("logit_scale", "logit_bias")), unit="logits"),
        charts.line_chart(
            "Perplexity on held-out text",
            history.lines(("eval_perplexity", "perplexity"), "^eval_"),
            unit="perplexity, logarithmic",
            log_y=True,
        ),
        charts.line_chart("Learning rate", history.lines(rates), zero=True),
        charts.line_chart("Gradient norm", history.lines(("grad_norm",)), unit="L2 norm", zero=True),
    ]
    main, folded = [chart for chart in main if chart], [chart for chart in folded if chart]
    return {"main": main or folded, "folded": folded if main else []}


def _loss(stage: Stage, history: History) -> charts.Chart | None:
    loss = history["loss"]
    lines = [Line("training", loss, SERIES[0], faint=len(loss) > 25)]
    if len(loss) > 25:
        lines.append(Line("training", charts.smooth(loss), SERIES[0]))
    evaluated = [key for key in history.series if re.fullmatch(r"eval_(\w+_)?loss", key)]
    for key, colour in zip(evaluated, ("wrong", "right")):
        name = label(key.removeprefix("eval_").removesuffix("loss").strip("_"))
        lines.append(Line(f"validation, {name}" if name else "validation", history[key], colour))
    for variant, other in stage.runs.items():
        lines.append(Line(label(variant), charts.smooth(History(other)["loss"]), tint(variant), dashed=True))
    chance = numbers(stage.run.get("method")).get("chance_loss")
    rules = [] if chance is None else [(chance, f"chance {number(chance)}")]
    tokens = stage.name in ("language_model", "stage_one", "stage_two")
    return charts.line_chart("Loss", lines, unit="nats per token" if tokens else "loss", rules=rules, zero=True)


def _validation(run: dict[str, Any], history: History) -> charts.Chart | None:
    """Evaluation fractions logged while training, beside chance; where there are many, the primary ones."""
    keys = [key for key in history.series if key.startswith("eval_") and is_fraction(key) and "mean_class" not in key]
    if len(keys) > len(SERIES):
        keys = [key for key in keys if re.search(r"(?<!5)(_accuracy|[^e]_r1|retrieval_r1)$", key)] or keys
    chosen = [key for key in keys if not re.search(r"(image_to_text|text_to_image)", key)] or keys
    chosen = [key for key in chosen if not re.search(r"_accuracy_\w+$", key)] or chosen
    rules: list[tuple[float, str]] = []
    for name, entry in as_dict(run.get("evaluations")).items():
        metric = str(as_dict(entry).get("primary_metric", "accuracy"))
        chance = baselines_of(as_dict(entry)).get("chance", {}).get(metric)
        drawn = f"eval_{name}_{metric}" in chosen
        if chance is not None and drawn and all(abs(chance - other) > 0.06 for other, _ in rules):
            rules.append((chance, f"chance {shown(metric, chance)}"))
    lines = history.lines(chosen, "^eval_")
    return charts.line_chart("Validation, while training", lines, unit="per cent", as_percent=True, rules=rules)


def evaluations(stage: Stage) -> dict[str, Any]:
    """A table for each evaluation: metrics down, the model and its baselines across, the untrained one first."""
    tables = []
    datasets = as_dict(stage.own.get("datasets"))
    for name, entry in stage.evaluations().items():
        entry = as_dict(entry)
        variant, task = task_of(name, entry)
        if task == "maps":
            continue
        beside = baselines_of(entry)
        for ablation in ABLATIONS:
            other = numbers(stage.find(task, ablation)) if not variant and ablation in stage.files else {}
            beside |= {ablation: other} if other else {}
        order = sorted(beside, key=lambda column: (not column.startswith("untrained"), column == "chance"))
        columns = {"model": numbers(entry)} | {column: beside[column] for column in order}
        metrics = [metric for metric in columns["model"] if metric not in COUNTS and not metric.startswith("accuracy_")]
        rows = [
            (metric, [shown(metric, values[metric]) if metric in values else "" for values in columns.values()])
            for metric in metrics
        ]
        title = ", ".join([TASKS.get(task, label(task)), *([label(variant)] if variant else [])])
        source = re.split(r"[\\/]", str(as_dict(datasets.get(name)).get("path", "")).rstrip("/\\"))[-1]
        if rows:
            about = {"title": title, "count": numbers(entry).get("count"), "source": source}
            tables.append({**about, "columns": list(columns), "rows": rows, "wide": len(columns) > 3})
    return {"split": stage.split, "tables": tables} if tables else {}


def by_type(stage: Stage) -> dict[str, Any]:
    """Accuracy by question type, beside the ablations and the majority answer of the type."""
    entry = as_dict(stage.find("vqa"))
    rows = [as_dict(row) for row in as_list(as_dict(as_dict(entry.get("details")).get("tables")).get("question_type"))]
    rows = rows or [
        {"name": key.removeprefix("accuracy_"), "accuracy": value}
        for key, value in numbers(entry).items()
        if key.startswith("accuracy_")
    ]
    variants = ["unseen", *(name for name in ("blind", "untrained_encoder") if name in stage.files)]
    beside = {name: numbers(stage.find("vqa", name)) for name in variants}
    groups, used = [], {"model": None}
    for row in rows:
        name, values = str(row.get("name", "")), numbers(row)
        key = "accuracy_" + re.sub(r"\W+", "_", name.strip().lower()).strip("_")
        bars = {"model": values["accuracy"]} | {other: found[key] for other, found in beside.items() if key in found}
        for other in ("no_image", "majority"):
            if other in values and not (other == "no_image" and "blind" in beside):
                bars[other] = values[other]
        used |= dict.fromkeys(bars)
        count = number(values["count"]) if "count" in values else ""
        hint = row.get("majority_answer")
        groups.append({"name": name.replace("_", " "), "count": count, "bars": bars, "majority": hint or ""})
    return {"legend": list(used), "groups": groups, "split": stage.split} if groups else {}


def spectrum(stage: Stage) -> charts.Chart | None:
    """Eigenvalues of the embeddings' covariance, trained and untrained, with the effective rank of each."""
    data, entry = as_dict(stage.array("spectrum")), as_dict(stage.find("geometry"))
    lines, marks = [], []
    for key, name in (("values", "trained"), ("untrained", "untrained")):
        values = [float(v) for v in as_list(data.get(key)) if isinstance(v, (int, float))]
        if not values:
            continue
        colour, top = "model" if key == "values" else key, max(values[0], 1e-30)
        # Below a millionth of the first value there is rounding, not signal.
        lines.append(Line(name, [(i + 1.0, v / top) for i, v in enumerate(values) if v > 1e-6 * top], colour))
        rank = (numbers(entry) if key == "values" else baselines_of(entry).get(key, {})).get("effective_rank")
        if rank:
            marks.append((rank, f"effective rank {rank:.1f}", colour))
    return charts.line_chart(
        "Spectrum of the embeddings",
        lines,
        unit="variance, first = 1, logarithmic",
        x_label="direction, strongest first",
        log_y=True,
        last=False,
        marks=marks,
        note="A steep fall means that few directions carry the embeddings; the effective rank counts them.",
    )


def confusion(stage: Stage) -> charts.HeatMap | None:
    """What was taken for what in zero-shot classification."""
    data = as_dict(stage.array("confusion"))
    return charts.confusion_matrix(
        list(map(str, as_list(data.get("classes")))), list(map(as_list, as_list(data.get("counts"))))
    )


def classes(stage: Stage) -> charts.HeatMap | None:
    """Zero-shot accuracy by class, where the classes are pairs of words such as colour and shape."""
    cells: dict[tuple[str, str], tuple[float, int, bool]] = {}
    for variant in ("", "unseen"):
        entry = as_dict(stage.find("zero_shot", variant))
        for row in as_list(as_dict(as_dict(entry.get("details")).get("tables")).get("class")):
            words, found = str(as_dict(row).get("name", "")).split(), numbers(row)
            if len(words) != 2 or "accuracy" not in found:
                return None
            cells[words[0], words[1]] = (found["accuracy"], int(found.get("count", 0)), variant == "unseen")
    return charts.pair_grid(cells)


def similarity(stage: Stage) -> charts.HeatMap | None:
    """Cosines of some images and texts."""
    data = as_dict(stage.array("similarity"))
    matrix: Sequence[Any] = [as_list(row) for row in as_list(data.get("matrix"))]
    return charts.similarity_matrix(matrix, list(map(str, as_list(data.get("captions")))), as_list(data.get("images")))


def modules(stage: Stage) -> dict[str, Any]:
    """The freeze audit: what trained, at which rate, and whether its weights moved."""
    rows = [as_dict(module) for module in as_list(stage.run.get("modules"))]
    return {"rows": rows, "artifact_is": stage.run.get("artifact_is")} if any(rows) else {}


def recipe(stage: Stage) -> dict[str, Any]:
    """The run, of which the template shows command, flags, samples of the data and the samples that were skipped."""
    return stage.run if any(stage.run.get(key) for key in ("command", "recipe", "data", "bad_samples")) else {}
