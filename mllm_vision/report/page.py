"""The whole page: headlines, lineage, one section a stage, versions. A part that fails is left out with a warning."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from mllm_vision.report import format as forms
from mllm_vision.report import images, sections
from mllm_vision.report.chain import Chain, Stage, as_dict
from mllm_vision.report.charts import axis_number
from mllm_vision.report.lineage import lineage
from mllm_vision.report.results import baselines_of, numbers
from mllm_vision.utils import write_whole

logger = logging.getLogger(__name__)

# (stage, task, metric, title)
HEADLINES = (
    ("stage_zero", "zero_shot", "accuracy", "Zero-shot classification, accuracy"),
    ("stage_zero", "retrieval", "r1", "Image-text retrieval, R@1"),
    ("stage_zero", "knn", "accuracy", "Nearest neighbours, accuracy"),
    ("stage_zero", "probe", "accuracy", "Linear probe, accuracy"),
    ("stage_two", "vqa", "accuracy", "Questions about images, accuracy"),
    ("stage_two", "yes_no", "f1", "Yes/no questions, F1"),
)
WHAT = {
    "stage_zero": "vision encoder",
    "language_model": "from text alone",
    "stage_one": "connector, aligned on captions",
    "stage_two": "instructed to answer",
}


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,  # nothing that a run says may become markup
        undefined=jinja2.ChainableUndefined,  # run.method.about is empty where a run has no method
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ("label", "tint", "percent", "number", "duration", "short_hash", "clipped")
    environment.filters |= {name: getattr(forms, name) for name in names}
    environment.filters["axis_number"] = axis_number
    environment.globals["what"] = WHAT
    return environment


def draw(macro: str, build: Callable[..., Any], *arguments: Any) -> Markup:
    """A macro ("parts.intro" is `intro` of templates/parts.html) on what `build` returns; empty where that is nothing.

    One broken figure must not cost the page: an error is logged and the part left out.
    """
    try:
        data = build(*arguments)
        template, name = macro.split(".")
        return Markup(getattr(_environment().get_template(f"{template}.html").module, name)(data)) if data else Markup()
    except Exception as error:
        logger.warning("%s is left out of the report: %s: %s", macro, type(error).__name__, error)
        return Markup()


def headlines(chain: Chain) -> list[dict[str, Any]]:
    """The main figures, each as bars beside its baselines and ablations."""
    cards = []
    for name, task, metric, title in HEADLINES:
        stage = chain.stage(name)
        entry = as_dict(stage.find(task)) if stage else {}
        value = numbers(entry).get(metric)
        if stage is None or value is None:
            continue
        others = {}
        for variant in dict.fromkeys(("unseen", *filter(None, stage.files))):
            found = numbers(stage.find(task, variant)).get(metric)
            if found is not None:
                others[variant] = found
        for baseline, values in baselines_of(entry).items():
            hidden = baseline == "most_frequent_class" or (baseline == "no_image" and "blind" in others)
            if metric in values and not hidden:
                others[baseline] = values[metric]
        order = list(forms.TINTS)
        bars = sorted(others.items(), key=lambda item: order.index(item[0]) if item[0] in order else 1)
        cards.append({"title": title, "split": stage.split, "value": value, "bars": {"model": value} | dict(bars)})
    return cards


def side_by_side(stage: Stage) -> list[Markup]:
    """Figures that share a row where there is room."""
    figures: tuple[tuple[str, Callable[[Stage], Any]], ...] = (
        ("charts.chart", sections.spectrum),
        ("charts.heat_map", sections.confusion),
        ("charts.heat_map", sections.classes),
    )
    return [drawn for macro, build in figures if (drawn := draw(macro, build, stage))]


# (macro, what makes its data), in the order of the page
PARTS: tuple[tuple[str, Callable[[Stage], Any]], ...] = (
    ("parts.intro", sections.intro),
    ("parts.curves", sections.curves),
    ("parts.evaluations", sections.evaluations),
    ("parts.by_type", sections.by_type),
    ("parts.views", images.views),
    ("charts.heat_map", sections.similarity),
    ("parts.side_by_side", side_by_side),
    ("parts.maps", images.maps),
    ("parts.samples", lambda stage: images.sample_cards(stage.samples())),
    ("parts.modules", sections.modules),
    ("parts.recipe", sections.recipe),
)


def foot(chain: Chain) -> dict[str, Any]:
    """Time by stage, package versions and machines, each once."""
    versions: dict[str, str] = {}
    machines: dict[str, None] = {}
    for stage in chain.stages:
        versions |= {key: str(value) for key, value in as_dict(stage.run.get("versions")).items()}
        machine = stage.run.get("machine")
        facts = [f"{forms.label(key)} {value}" for key, value in as_dict(machine).items() if value]
        machines[", ".join(facts) or str(machine or "")] = None
    times = [(stage.title, seconds) for stage in chain.stages if (seconds := numbers(stage.run).get("seconds"))]
    return {"times": times, "versions": sorted(versions.items()), "machines": [each for each in machines if each]}


def title_of(chain: Chain) -> str:
    """What the page is about: a chain of stages, or a single training."""
    if len(chain.stages) != 1:
        return "From images to answers"
    (stage,) = chain.stages
    return " · ".join(part for part in (stage.title, str(stage.run.get("name") or "")) if part)


def render(chain: Chain, title: str | None = None) -> str:
    """The page as one string of HTML that loads nothing; `title` None says what the chain is."""
    seconds = sum(numbers(stage.run).get("seconds", 0.0) for stage in chain.stages)
    started = min((str(stage.run["started"]) for stage in chain.stages if stage.run.get("started")), default="")
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=title_of(chain) if title is None else title,
            facts=[started[:10], f"trained in {forms.duration(seconds)}" if seconds else ""],
            headlines=draw("parts.headlines", headlines, chain),
            lineage=draw("charts.lineage", lineage, chain),
            stages=[(stage, [draw(macro, build, stage) for macro, build in PARTS]) for stage in chain.stages],
            foot=draw("parts.foot", foot, chain),
        )
    )


def write_report(chain: Chain, path: str | Path, title: str | None = None) -> bool:
    """Write the page; a failure is logged and returned as False, never raised: a report ends no run."""
    try:
        write_whole(path, render(chain, title))
    except Exception as error:
        logger.warning("the report %s could not be written: %s: %s", path, type(error).__name__, error)
        return False
    return True
