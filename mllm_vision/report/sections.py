"""The parts of the page that belong to one stage. Each returns HTML, or "" when its data is not there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mllm_vision.report import charts, gallery, images_alone
from mllm_vision.report.chain import Stage, as_dict, as_list
from mllm_vision.report.charts import Line
from mllm_vision.report.markup import (
    bar,
    details,
    duration,
    esc,
    is_fraction,
    label,
    legend,
    number,
    percent,
    short_hash,
    shown,
    table,
)
from mllm_vision.report.results import COUNTS, baselines_of, numbers, task_of

SERIES = ("var(--model)", "var(--blind)", "var(--right)", "var(--other)", "var(--wrong)", "var(--untrained)")
ABLATIONS = ("blind", "untrained_encoder", "untrained")
ABOUT = {
    "stage_zero": "A vision encoder learns from images and their texts: what belongs together is pulled together, "
    "everything else in the batch is pushed apart.",
    "language_model": "A small language model learns to read and write, from text alone. It has never seen an image.",
    "stage_one": "Encoder and language model are frozen; a projector between them learns, from captions, to say in the "
    "language model's terms what the encoder sees.",
    "stage_two": "The pair learns to answer questions about images. Only the assistant's words are learnt from.",
}
TASKS = {
    "zero_shot": "Zero-shot classification",
    "retrieval": "Retrieval",
    "vqa": "Questions about images",
    "geometry": "Geometry of the embeddings",
    "board": "Geometry of the embeddings",
    "knn": "Nearest neighbours",
    "probe": "Linear probe",
}


def history(run: dict[str, Any], key: str) -> list[tuple[float, float]]:
    """(step, value) of one logged quantity."""
    points = []
    for entry in as_list(run.get("history")):
        entry = as_dict(entry)
        step, value = entry.get("step"), entry.get(key)
        if isinstance(step, (int, float)) and isinstance(value, (int, float)) and not isinstance(value, bool):
            points.append((float(step), float(value)))
    return points


def history_keys(run: dict[str, Any]) -> list[str]:
    """All logged quantities, in the order of their first appearance."""
    keys: dict[str, None] = {}
    for entry in as_list(run.get("history")):
        keys.update(dict.fromkeys(key for key in as_dict(entry) if key != "step"))
    return list(keys)


def intro(stage: Stage) -> str:
    """What the stage was, its data, its time."""
    run = stage.run
    facts = []
    for role, data in as_dict(run.get("data")).items():
        rows = numbers(data).get("rows")
        if rows is not None:
            facts.append(f"{number(rows)} {esc(role.replace('_', ' '))} rows")
    steps = max((point[0] for key in history_keys(run) for point in history(run, key)[-1:]), default=0)
    if steps:
        facts.append(f"{number(steps)} steps")
    speed = [value for _, value in history(run, "samples_per_second")]
    if speed:
        facts.append(f"{number(round(sorted(speed)[len(speed) // 2]))} samples a second")
    if numbers(run).get("seconds"):
        facts.append(duration(numbers(run)["seconds"]))
    bad = numbers(run.get("bad_samples")).get("count")
    if bad:
        facts.append(f"{number(bad)} bad samples skipped")
    about = images_alone.ABOUT if images_alone.from_images_alone(run) else ABOUT.get(stage.name, "")
    line = f"<p class=facts>{' <i>·</i> '.join(facts)}</p>" if facts else ""
    return f"<p class=about>{esc(about)}</p>{line}{verdict(run)}{warnings(run)}"


def verdict(run: dict[str, Any]) -> str:
    """The run's own verdict lines, coloured by their outcome."""
    items = []
    for text in str(run.get("verdict") or "").splitlines():
        outcome = text.rpartition(":")[2].strip()
        css = {"better": "good", "worse": "bad"}.get(outcome, "even")
        items.append(f"<li class={css}>{esc(text.replace('_', ' '))}</li>")
    return f"<ul class=verdict>{''.join(items)}</ul>" if items else ""


def warnings(run: dict[str, Any]) -> str:
    """What the health watch warned of while it trained (a collapse belongs beside the figures that hide it), and what
    failed after it."""
    items = []
    for entry in (as_dict(entry) for entry in as_list(run.get("missing"))):
        items.append(f"<li class=bad>missing: {esc(entry.get('step', ''))} ({esc(entry.get('cause', ''))})</li>")
    for entry in (as_dict(entry) for entry in as_list(run.get("health"))):
        if entry.get("message"):
            step = numbers(entry).get("step")
            when = "" if step is None else f"step {number(step)}: "
            items.append(f"<li class=bad>{when}{esc(entry['message'])}</li>")
    return f"<ul class=verdict>{''.join(items)}</ul>" if items else ""


def chance_loss(run: dict[str, Any]) -> float | None:
    """The loss of a model that knows nothing, as the method states it."""
    chance = as_dict(run.get("method")).get("chance_loss")
    return float(chance) if isinstance(chance, (int, float)) else None


def curves(stage: Stage) -> str:
    """Loss, evaluation metrics and the other logged quantities against the step."""
    run, parts = stage.run, []
    loss = history(run, "loss")
    lines = [Line("training loss", loss, SERIES[0], faint=len(loss) > 25)]
    if len(loss) > 25:
        lines.append(Line("training loss", charts.smooth(loss), SERIES[0]))
    evaluated = [key for key in history_keys(run) if re.fullmatch(r"eval_(\w+_)?loss", key)]
    for key, tint in zip(evaluated, ("var(--wrong)", "var(--right)")):
        lines.append(Line("held-out loss" if key == "eval_loss" else label(key[5:]), history(run, key), tint))
    for variant, other in stage.runs.items():
        name = label(variant)
        tint = {"blind": "var(--blind)", "untrained_encoder": "var(--untrained)"}.get(variant, "var(--other)")
        lines.append(Line(name, charts.smooth(history(other, "loss")), tint, dashed=True))
    known = chance_loss(run)
    rules = [(known, "knows nothing")] if known else []
    series = {key: history(run, key) for key in history_keys(run)}
    main = [
        charts.line_chart("Loss", lines, rules=rules, zero=True),
        charts.line_chart("Measured on the way", _metric_lines(run), as_percent=True),
        *(images_alone.collapse(series) if images_alone.from_images_alone(run) else []),
    ]
    parts += images_alone.parts(run, series)
    parts.append(_small("Scale and bias of the loss", run, ("logit_scale", "logit_bias")))
    parts.append(_small("Perplexity on held-out text", run, ("eval_perplexity", "perplexity"), log_y=True))
    rates = [key for key in history_keys(run) if key.startswith("learning_rate")]
    parts.append(_small("Learning rate", run, rates, zero=True))
    parts.append(_small("Gradient norm", run, ("grad_norm",), zero=True))
    if not any(main):  # nothing to begin with: what there is comes to the front
        main, parts = parts, []
    rest = "".join(parts)
    folded = details("Learning rate, scale and other curves", f"<div class=charts>{rest}</div>") if rest else ""
    return f"<div class=charts>{''.join(main)}</div>{folded}" if any(main) else ""


def _metric_lines(run: dict[str, Any]) -> list[Line]:
    """Evaluation fractions; where there are many, the primary ones."""
    keys = [
        key for key in history_keys(run) if key.startswith("eval_") and is_fraction(key) and "mean_class" not in key
    ]
    if len(keys) > len(SERIES):
        keys = [key for key in keys if re.search(r"(?<!5)(_accuracy|[^e]_r1|retrieval_r1)$", key)] or keys
    chosen = [key for key in keys if not re.search(r"(image_to_text|text_to_image)", key)] or keys
    chosen = [key for key in chosen if not re.search(r"_accuracy_\w+$", key)] or chosen
    return [Line(_metric_name(key[5:]), history(run, key), tint) for key, tint in zip(chosen, SERIES)]


def _metric_name(key: str) -> str:
    recall = re.search(r"^(.*?)_?r(\d+)$", key)
    return f"{recall[1].replace('_', ' ')} R@{recall[2]}".strip() if recall else label(key)


def _small(title: str, run: dict[str, Any], keys: Sequence[str], **options: Any) -> str:
    lines = [Line(label(key.removeprefix("eval_")), history(run, key), tint) for key, tint in zip(keys, SERIES)]
    return charts.line_chart(title, lines, **options)


def evaluation_tables(stage: Stage) -> str:
    """A table an evaluation: metrics down, the model and its baselines across."""
    parts = []
    for name, entry in stage.evaluations().items():
        entry = as_dict(entry)
        variant, task = task_of(name, entry)
        if task == "maps":
            continue
        columns = {"model": numbers(entry)} | baselines_of(entry)
        for ablation in ABLATIONS:
            other = numbers(stage.find(task, ablation)) if not variant else {}
            if other and ablation in stage.files:
                columns[ablation] = other
        rows = []
        for metric in columns["model"]:
            if metric in COUNTS | {"step"} or metric.startswith("accuracy_"):
                continue
            cells = [shown(metric, values[metric]) if metric in values else "" for values in columns.values()]
            cells[0] = f"<b>{cells[0]}</b>"
            rows.append([esc(label(metric)), *cells])
        title = TASKS.get(task, label(task))
        if variant:
            title += f", {label(variant)}"
        count = numbers(entry).get("count")
        size = f" <span class=muted>{number(count)}</span>" if count else ""
        body = table(["", *(esc(label(column)) for column in columns)], rows)
        if body:
            wide = " wide" if len(columns) > 3 else ""
            parts.append(f"<div class='evaluation{wide}'><h4>{esc(title)}{size}</h4>{body}</div>")
    return f"<div class=evaluations>{''.join(parts)}</div>" if parts else ""


def spectrum(stage: Stage) -> str:
    """Eigenvalues of the embeddings' covariance, trained and untrained, with the effective rank of each."""
    data = as_dict(stage.array("spectrum"))
    entry = as_dict(stage.find("geometry"))
    lines, marks = [], []
    for key, name, tint in (("values", "trained", "var(--model)"), ("untrained", "untrained", "var(--untrained)")):
        values = [float(v) for v in as_list(data.get(key)) if isinstance(v, (int, float))]
        if values:
            top = max(values[0], 1e-30)
            # Below a millionth of the first value there is rounding, not signal.
            lines.append(Line(name, [(i + 1.0, v / top) for i, v in enumerate(values) if v > 1e-6 * top], tint))
        source = numbers(entry) if key == "values" else baselines_of(entry).get("untrained", {})
        if values and source.get("effective_rank"):
            marks.append((source["effective_rank"], f"effective rank {source['effective_rank']:.1f}", tint))
    chart = charts.line_chart(
        "Spectrum of the embeddings", lines, x_label="direction, strongest first", log_y=True, last=False, marks=marks
    )
    return chart and (
        chart.removesuffix("</figure>")
        + "<p class=note>Share of each direction in the variance, relative to the first. "
        "A steep fall means that few directions carry the output; the effective rank counts them.</p></figure>"
    )


def classes(stage: Stage) -> str:
    """Zero-shot accuracy by class, where the classes are pairs of words such as colour and shape."""
    cells: dict[tuple[str, str], tuple[float, int, bool]] = {}
    for variant in ("", "unseen"):
        entry = as_dict(stage.find("zero_shot", variant))
        for row in as_list(as_dict(as_dict(entry.get("details")).get("tables")).get("class")):
            words = str(as_dict(row).get("name", "")).split()
            found = numbers(row)
            if len(words) != 2 or "accuracy" not in found:
                return ""
            cells[words[0], words[1]] = (found["accuracy"], int(found.get("count", 0)), variant == "unseen")
    return charts.pair_grid(cells)


def images(stage: Stage) -> str:
    """Similarity matrix, spectrum, confusion, maps, samples: whatever the evaluation left."""
    matrix = as_dict(stage.array("similarity"))
    similarity = charts.similarity_matrix(
        [as_list(row) for row in as_list(matrix.get("matrix"))],
        [str(text) for text in as_list(matrix.get("captions"))],
        as_list(matrix.get("images")),
    )
    confusion = as_dict(stage.array("confusion"))
    confused = charts.confusion_matrix(
        [str(name) for name in as_list(confusion.get("classes"))],
        [as_list(row) for row in as_list(confusion.get("counts"))],
    )
    side = "".join(part for part in (spectrum(stage), confused, classes(stage)) if part)
    parts = [images_alone.views(stage), similarity, f"<div class=charts>{side}</div>" if side else ""]
    maps = gallery.maps_gallery(stage.array("maps"))
    if maps:
        parts.append(f"<h3>What it looks at</h3>{maps}")
    samples = gallery.sample_cards(stage.samples())
    if samples:
        parts.append(f"<h3>Samples</h3>{samples}")
    return "".join(parts)


def by_type(stage: Stage) -> str:
    """Accuracy by question type, beside the ablations and the majority answer of the type."""
    entry = as_dict(stage.find("vqa"))
    rows = [as_dict(row) for row in as_list(as_dict(as_dict(entry.get("details")).get("tables")).get("question_type"))]
    if not rows:
        rows = [
            {"name": key.removeprefix("accuracy_"), "accuracy": value}
            for key, value in numbers(entry).items()
            if key.startswith("accuracy_")
        ]
    beside = {name: numbers(stage.find("vqa", name)) for name in ("blind", "untrained_encoder") if name in stage.files}
    unseen = numbers(stage.find("vqa", "unseen"))
    groups, used = [], {"model": None}
    for row in rows:
        name = str(row.get("name", ""))
        bars = [bar(float(row["accuracy"]), "model", "")]
        key_name = "accuracy_" + re.sub(r"\W+", "_", name.strip().lower()).strip("_")
        others = {"unseen": unseen.get(key_name)}
        others |= {key: values.get(key_name) for key, values in beside.items()}
        others |= {
            key: row.get(key) for key in ("no_image", "majority") if not (key == "no_image" and "blind" in beside)
        }
        for key, value in others.items():
            if isinstance(value, (int, float)):
                used[key] = None
                bars.append(bar(float(value), key, "", thin=True))
        count = f"<span class=muted>{number(row['count'])}</span>" if isinstance(row.get("count"), int) else ""
        answer = row.get("majority_answer")
        hint = f' title="majority answer: {esc(answer)}"' if answer else ""
        groups.append(f"<div class=type{hint}><h5>{esc(name.replace('_', ' '))} {count}</h5>{''.join(bars)}</div>")
    if not groups:
        return ""
    return f"<h3>By type of question</h3>{legend(used)}<div class=types>{''.join(groups)}</div>"


def modules(stage: Stage) -> str:
    """The freeze audit: what trained, at which rate, and whether it moved."""
    rows = []
    for module in (as_dict(module) for module in as_list(stage.run.get("modules"))):
        trainable, moved, follows = bool(module.get("trainable")), module.get("moved"), bool(module.get("follows"))
        before, after = short_hash(module.get("sha256_before")), short_hash(module.get("sha256_after"))
        state = "" if moved is None else ("moved" if moved else "did not move")
        css = "" if moved is None else ("right" if bool(moved) == (trainable or follows) else "wrong")
        rate = module.get("learning_rate")
        hashes = (
            f"<code>{before}</code>"
            if before == after or not after
            else f"<code>{before}</code> → <code>{after}</code>"
        )
        rows.append(
            [
                esc(module.get("group", "")),
                f"{int(module.get('parameters', 0)):,}",
                "trained" if trainable else f"<span class=muted>{'follows' if follows else 'frozen'}</span>",
                f"{rate:g}" if trainable and isinstance(rate, (int, float)) else "",
                f"<span class={css or 'muted'}>{state}</span>",
                hashes if before else "",
            ]
        )
    body = table(["module", "parameters", "", "learning rate", "proof", "weights, before and after"], rows)
    whose = stage.run.get("artifact_is")
    note = f"<p class=muted>Saved and measured: {esc(whose)}.</p>" if whose else ""
    return f"<h3>What was trained</h3>{body}{note}" if body else ""


def recipe(stage: Stage) -> str:
    """Flags, parents, data and the command, folded."""
    run, parts = stage.run, []
    if run.get("command"):
        parts.append(f"<pre>{esc(run['command'])}</pre>")
    flags = as_dict(run.get("recipe"))
    given = [(key, value) for key, value in sorted(flags.items()) if value not in (None, "", [], {})]
    if given:
        items = "".join(f"<div><dt>{esc(key)}</dt><dd>{esc(value)}</dd></div>" for key, value in given)
        parts.append(f"<dl class=flags>{items}</dl>")
    text = details("Recipe: command and every flag", "".join(parts))
    rows = []
    for role, data in as_dict(run.get("data")).items():
        data = as_dict(data)
        for sample in as_list(data.get("samples"))[:3]:
            words = " · ".join(f"{key}: {value}" for key, value in as_dict(sample).items())
            rows.append([esc(role), f"<span class=muted>{esc(words)}</span>"])
    text += details("Data: three samples of each set", table(["set", "sample"], rows, numeric_from=9))
    examples = as_list(as_dict(run.get("bad_samples")).get("examples"))
    text += details(
        "Samples that were skipped",
        "<ul>" + "".join(f"<li>{esc(e)}</li>" for e in examples) + "</ul>" if examples else "",
    )
    return f"<div class=folds>{text}</div>" if text else ""


__all__ = ["by_type", "curves", "evaluation_tables", "images", "intro", "modules", "percent", "recipe"]
