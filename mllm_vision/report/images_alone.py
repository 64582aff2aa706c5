"""What a page shows of a training on images alone: its views, whether it collapses, the parts of its loss."""

from __future__ import annotations

import re
from typing import Any

from mllm_vision.report import charts
from mllm_vision.report.chain import Stage, as_dict, as_list
from mllm_vision.report.charts import Line
from mllm_vision.report.markup import image, label

TINTS = ("var(--model)", "var(--blind)", "var(--right)", "var(--other)", "var(--wrong)", "var(--untrained)")
ENTROPIES = ("teacher_entropy", "prototype_entropy", "divergence")
ABOUT = "A vision encoder learns from images alone: from what stays when one is cropped, coloured or covered."


def from_images_alone(run: dict[str, Any]) -> bool:
    """Whether the training set of a stage zero had images and no captions."""
    columns = as_dict(as_dict(as_dict(run.get("data")).get("train")).get("columns"))
    return run.get("kind") == "stage_zero" and "image" in columns and "caption" not in columns


def collapse(series: dict[str, list[tuple[float, float]]]) -> list[str]:
    """Charts of spread and directions, which fall when all images become alike; `series` by logged name."""
    drawn = []
    for ending, title in (
        ("_spread", "Spread: 1 evenly on the sphere, 0 all alike"),
        ("_rank", "Directions that carry the vectors"),
    ):
        keys = [key for key in series if re.fullmatch(rf"\w+{ending}", key) and not key.startswith("eval_")]
        lines = [Line(key.removesuffix(ending), series[key], tint) for key, tint in zip(keys, TINTS)]
        drawn.append(charts.line_chart(title, lines, zero=True))
    return [each for each in drawn if each]


def parts(run: dict[str, Any], series: dict[str, list[tuple[float, float]]]) -> list[str]:
    """Charts of the loss's parts, which the method names, and of DINO's entropies, as far as they were logged."""
    drawn = []
    own = [str(name) for name in as_list(as_dict(run.get("method")).get("loss_parts"))]
    for title, names in (("Parts of the loss", own), ("Entropy of the teacher's answers, nats", ENTROPIES)):
        lines = [Line(label(key), series[key], tint) for key, tint in zip([n for n in names if n in series], TINTS)]
        drawn.append(charts.line_chart(title, lines))
    return [each for each in drawn if each]


def views(stage: Stage) -> str:
    """Images, each beside the random views that the method compared."""
    rows = []
    for entry in (as_dict(each) for each in as_list(stage.array("views"))):
        whole = image(entry.get("image", ""), "pixels")
        made = [image(each, "pixels") for each in as_list(entry.get("views"))]
        if whole and any(made):
            cells = [f"<figure>{whole}<figcaption class=muted>image</figcaption></figure>"]
            cells += [
                f"<figure>{each}<figcaption>view {n}</figcaption></figure>" for n, each in enumerate(made, 1) if each
            ]
            rows.append(f"<div class=map-row>{''.join(cells)}</div>")
    return f"<h3>What it was shown</h3><div class=maps>{''.join(rows)}</div>" if rows else ""
