"""Numbers, names and images as the page shows them; the filters of the templates."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from mllm_vision import utils

TINTS = {
    "model": "model",
    "unseen": "other",
    "untrained": "untrained",
    "untrained_encoder": "untrained",
    "blind": "blind",
    "no_image": "blind",
    "majority": "majority",
    "majority_by_type": "majority",
    "most_frequent_class": "majority",
    "always_yes": "majority",
    "shuffled": "chance",
    "chance": "chance",
}
NAMES = {
    "model": "this model",
    "blind": "trained blind",
    "no_image": "image removed",
    "majority": "majority answer",
    "unseen": "unseen pairs",
    "std": "spread (1 = even)",
    "alpha_req": "alpha-ReQ",
    "rankme": "RankMe",
    "knn": "kNN",
    "vqa": "questions",
    "yes_no": "yes/no questions",
    "shuffled": "images shuffled",
    "cider": "CIDEr-D",
    "bleu4": "BLEU-4",
    "f1": "F1",
    "neither": "neither yes nor no",
    "top5_accuracy": "top-5 accuracy",
    "image_to_text": "image to text",
    "text_to_image": "text to image",
}
_RECALL = re.compile(r"^(?:(.*?)_)?r(\d+)$")
_FRACTIONS = r"accuracy|r\d+|consensus|bleu4|f1|precision|recall|yes_ratio|neither|dead_dimensions|fraction"
_FRACTION = re.compile(rf"(^|_)({_FRACTIONS})($|_)")
_IMAGE = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/=]+")


def label(name: str) -> str:
    """The name of a metric, baseline or ablation in words."""
    if recall := _RECALL.match(name):
        return f"R@{recall[2]}, {label(recall[1])}" if recall[1] else f"R@{recall[2]}"
    return NAMES.get(name, name.replace("_", " "))


def tint(name: str) -> str:
    """The colour class of a series; ablations and baselines keep theirs through the page."""
    return TINTS.get(name, "other")


def is_fraction(name: str) -> bool:
    """Whether a metric of this name is shown in per cent."""
    return bool(_FRACTION.search(name))


def percent(value: float) -> str:
    """0.9563 as 95.6 %."""
    return f"{100 * value:.1f}\u202f%"


def number(value: float) -> str:
    """Three or four significant digits, thousands separated."""
    if not math.isfinite(value):
        return "\u2013"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 0.01:
        return f"{value:.3g}" if size >= 1 else f"{value:.3f}"
    return f"{value:.2e}"


def shown(name: str, value: float) -> str:
    """The value of the metric `name`, in per cent where it is a fraction."""
    return percent(value) if is_fraction(name) and -1 <= value <= 1 else number(value)


def compact(value: float) -> str:
    """1,630,000 as 1.63 M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}\u202f{unit}"
    return f"{value:g}"


def duration(seconds: float) -> str:
    """12 min 5 s, with narrow spaces."""
    return utils.duration(seconds, "\u202f")


def short_hash(value: Any) -> str:
    """The first eight digits of a weight hash."""
    return str(value).removeprefix("sha256:")[:8] if value else ""


def clipped(text: Any, most: int = 150) -> str:
    """Text cut at a word, so that one long sample does not stretch the page."""
    text = str(text)
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " …"


def embedded(source: Any) -> str:
    """An embedded image's data URI; anything else gives "", so that the page loads nothing from elsewhere."""
    return str(source) if _IMAGE.fullmatch(str(source)) else ""


def veil(grid: Sequence[Sequence[float]]) -> str:
    """The data URI of a white veil that is clear where the map `grid` [rows, columns] is strong.

    Negative values count as zero; the strongest square is fully clear.
    """
    values = [[max(float(value), 0.0) for value in row] for row in grid]
    top = max((value for row in values for value in row), default=0.0) or 1.0
    image = Image.new("LA", (len(values[0]), len(values)), 255)
    image.putdata([(255, round(228 * max(0.0, 1 - 1.5 * value / top))) for row in values for value in row])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
