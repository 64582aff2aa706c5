"""The whole page: headline, lineage, one section a stage, versions. A part that fails is left out, and said
so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mllm_vision.report import sections
from mllm_vision.report.chain import Chain, Stage, as_dict
from mllm_vision.report.lineage import WHAT, lineage
from mllm_vision.report.markup import COLOURS, bar, duration, esc, label, percent, table
from mllm_vision.report.results import baselines_of, numbers, write_text
from mllm_vision.report.style import CSS

logger = logging.getLogger(__name__)

# (stage, task, metric, title)
HEADLINES = (
    ("stage_zero", "zero_shot", "accuracy", "Names what it sees, never taught to"),
    ("stage_zero", "retrieval", "r1", "Matches images and texts, R@1"),
    ("stage_two", "vqa", "accuracy", "Answers questions about images"),
)


def guarded(part: Callable[..., str], *arguments: Any) -> str:
    """``part(*arguments)``, or nothing and a warning: one broken figure must not cost the page."""
    try:
        return part(*arguments)
    except Exception as error:
        logger.warning("%s is left out of the report: %s: %s", part.__name__, type(error).__name__, error)
        return ""


def headlines(chain: Chain) -> str:
    """The numbers that matter, each as bars beside its baselines and ablations."""
    cards = []
    for name, task, metric, title in HEADLINES:
        stage = chain.stage(name)
        entry = as_dict(stage.find(task)) if stage else {}
        value = numbers(entry).get(metric)
        if stage is None or value is None:
            continue
        others = ablations(stage, task, metric)
        for baseline, values in baselines_of(entry).items():
            hidden = baseline == "most_frequent_class" or (baseline == "no_image" and "blind" in others)
            if metric in values and not hidden:
                others[baseline] = values[metric]
        order = {key: place for place, key in enumerate(COLOURS)}
        others = dict(sorted(others.items(), key=lambda item: order.get(item[0], 0)))
        bars = bar(value, "model") + "".join(bar(other, key) for key, other in others.items())
        cards.append(f"<div class=headline><h5>{esc(title)}</h5><div class=big>{percent(value)}</div>{bars}</div>")
    return f"<div class=headlines>{''.join(cards)}</div>" if cards else ""


def ablations(stage: Stage, task: str, metric: str) -> dict[str, float]:
    """The same metric on unseen pairs and in the stage's ablation files."""
    found = {}
    for variant in dict.fromkeys(("unseen", *stage.files)):
        if variant:
            value = numbers(stage.find(task, variant)).get(metric)
            if value is not None:
                found[variant] = value
    return found


def stage_section(stage: Stage) -> str:
    """All that is known of one stage."""
    evaluated = guarded(sections.evaluation_tables, stage)
    parts = [
        guarded(sections.intro, stage) if stage.run else "",
        guarded(sections.curves, stage),
        f"<h3>Measured</h3>{evaluated}" if evaluated else "",
        guarded(sections.by_type, stage),
        guarded(sections.images, stage),
        guarded(sections.modules, stage),
        guarded(sections.recipe, stage),
    ]
    body = "".join(parts)
    what = f" <small>{esc(WHAT[stage.name])}</small>" if stage.name in WHAT else ""
    return f'<section id="{esc(stage.name)}"><h2>{esc(stage.title)}{what}</h2>{body}</section>' if body else ""


def versions(chain: Chain) -> str:
    """Package versions and the machine, once."""
    found: dict[str, str] = {}
    machines: list[str] = []
    for stage in chain.stages:
        found |= {key: str(value) for key, value in as_dict(stage.run.get("versions")).items()}
        machine = stage.run.get("machine")
        text = ", ".join(f"{label(key)} {value}" for key, value in as_dict(machine).items() if value) or str(
            machine or ""
        )
        if text and text not in machines:
            machines.append(text)
    rows = [[esc(key), esc(value)] for key, value in sorted(found.items())]
    packages = " · ".join(f"{key} {value}" for key, value in rows)
    return "".join(f"<p>{part}</p>" for part in (packages, "; ".join(esc(machine) for machine in machines)) if part)


def times(chain: Chain) -> str:
    """Time by stage."""
    rows = [[esc(s.title), duration(numbers(s.run)["seconds"])] for s in chain.stages if numbers(s.run).get("seconds")]
    if len(rows) < 2:
        return ""
    total = sum(numbers(stage.run).get("seconds", 0.0) for stage in chain.stages)
    rows.append(["<b>all</b>", f"<b>{duration(total)}</b>"])
    return f"<div class=times>{table(['stage', 'time'], rows)}</div>"


def title_of(chain: Chain) -> str:
    """What the page is about: a chain of stages, or a single training."""
    if len(chain.stages) != 1:
        return "From images to answers"
    (stage,) = chain.stages
    return " · ".join(part for part in (stage.title, str(stage.run.get("name") or "")) if part)


def render(chain: Chain, title: str | None = None) -> str:
    """The page as one string of HTML, with nothing loaded from anywhere; `title` tells what the chain is by itself."""
    title = title_of(chain) if title is None else title
    total = sum(numbers(stage.run).get("seconds", 0.0) for stage in chain.stages)
    started = min((str(stage.run["started"]) for stage in chain.stages if stage.run.get("started")), default="")
    facts = [started[:10], f"trained in {duration(total)}" if total else ""]
    lead = " <i>·</i> ".join(part for part in facts if part)
    story = guarded(lineage, chain)
    chapters = "".join(guarded(stage_section, stage) for stage in chain.stages)
    if not chapters:
        chapters = "<section><p>Nothing was found to report on.</p></section>"
    foot = guarded(times, chain) + guarded(versions, chain)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{esc(title)}</title><style>{CSS}</style></head><body><main><h1>{esc(title)}</h1>"
        f'<p class="lead facts">{lead}</p>{guarded(headlines, chain)}'
        + (
            f"<section><h2>The chain</h2>"
            f"<p class=note>Each arrow is a set of weights that one stage handed to the next, "
            f"named by the first digits of its hash.</p>{story}</section>"
            if story
            else ""
        )
        + f"{chapters}<footer>{foot}</footer></main></body></html>\n"
    )


def write_report(chain: Chain, path: str | Path, title: str | None = None) -> bool:
    """Write the page; a failure is logged and returned as False, never raised: a report ends no run."""
    try:
        write_text(path, render(chain, title))
    except Exception as error:
        logger.warning("the report %s could not be written: %s: %s", path, type(error).__name__, error)
        return False
    return True
