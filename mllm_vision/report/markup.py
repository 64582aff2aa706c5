"""Small pieces of HTML: escaping, numbers as people read them, tables, bars."""

from __future__ import annotations

import base64
import html
import math
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

COLOURS = {
    "model": "var(--model)",
    "unseen": "var(--other)",
    "untrained": "var(--untrained)",
    "untrained_encoder": "var(--untrained)",
    "blind": "var(--blind)",
    "no_image": "var(--blind)",
    "majority": "var(--majority)",
    "majority_by_type": "var(--majority)",
    "most_frequent_class": "var(--majority)",
    "chance": "var(--chance)",
}
NAMES = {
    "model": "this model",
    "untrained": "untrained",
    "untrained_encoder": "untrained encoder",
    "blind": "trained blind",
    "no_image": "image removed",
    "majority": "majority answer",
    "majority_by_type": "majority by type",
    "most_frequent_class": "most frequent class",
    "chance": "chance",
    "unseen": "unseen pairs",
    "r1": "R@1",
    "r5": "R@5",
    "r10": "R@10",
    "std": "spread (1 = even)",
    "alpha_req": "alpha-ReQ",
    "rankme": "RankMe",
    "vqa": "questions",
    "top5_accuracy": "top-5 accuracy",
}
_RECALL = re.compile(r"^(image_to_text|text_to_image)_r(\d+)$")
_FRACTION = re.compile(r"(^|_)(accuracy|r\d+|consensus|f1|precision|recall|dead_dimensions|fraction)($|_)")


def esc(value: Any) -> str:
    """Text made safe for HTML and attributes."""
    return html.escape(str(value), quote=True)


def label(name: str) -> str:
    """A metric's or baseline's name in words."""
    recall = _RECALL.match(name)
    if recall:
        way = "image to text" if recall[1] == "image_to_text" else "text to image"
        return f"R@{recall[2]}, {way}"
    return NAMES.get(name, name.replace("_", " "))


def colour(name: str) -> str:
    """The colour of a series; ablations and baselines keep theirs through the page."""
    return COLOURS.get(name, "var(--other)")


def is_fraction(name: str) -> bool:
    """Whether a metric of this name is shown in per cent."""
    return bool(_FRACTION.search(name))


def percent(value: float) -> str:
    """0.9563 as 95.6 %."""
    return f"{100 * value:.1f}&#8239;%"


def number(value: float) -> str:
    """Three or four meaningful digits, thousands separated."""
    if not math.isfinite(value):
        return "&ndash;"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 0.01:
        return f"{value:.3g}" if size >= 1 else f"{value:.3f}"
    return f"{value:.2e}"


def shown(name: str, value: float) -> str:
    """A metric's value as it is read."""
    return percent(value) if is_fraction(name) and -1 <= value <= 1 else number(value)


def compact(value: float) -> str:
    """1,630,000 as 1.63 M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}&#8239;{unit}"
    return f"{value:g}"


def duration(seconds: float) -> str:
    """12 min 5 s."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}&#8239;s"
    minutes, rest = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes}&#8239;min {rest}&#8239;s" if rest else f"{minutes}&#8239;min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}&#8239;h {minutes}&#8239;min"


def short_hash(value: Any) -> str:
    """The first eight digits of a weight hash."""
    return esc(str(value).removeprefix("sha256:")[:8]) if value else ""


def details(summary: str, body: str, opened: bool = False) -> str:
    """A folded part."""
    return f"<details{' open' if opened else ''}><summary>{esc(summary)}</summary>{body}</details>" if body else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric_from: int = 1) -> str:
    """A table of ready-made HTML cells; columns from ``numeric_from`` are set flush right."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=num' if place >= numeric_from else ''}>{value}</{tag}>"
            for place, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    if not body:
        return ""
    return f"<div class=scroll><table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table></div>"


def bar(value: float, name: str, text: str | None = None, thin: bool = False) -> str:
    """One labelled horizontal bar of a fraction."""
    width = 100 * min(max(value, 0.0), 1.0)
    return (
        f'<div class="bar{" thin" if thin else ""}"><span class=bar-name>{esc(text or label(name))}</span>'
        f"<span class=bar-track><span class=bar-fill "
        f'style="width:{width:.2f}%;background:{colour(name)}"></span></span>'
        f"<span class=bar-value>{percent(value)}</span></div>"
    )


def legend(names: Iterable[str]) -> str:
    """Swatches with the names of series."""
    items = "".join(f'<span><i style="background:{colour(name)}"></i>{esc(label(name))}</span>' for name in names)
    return f"<div class=legend>{items}</div>" if items else ""


def png(rows: Sequence[Sequence[tuple[int, int, int, int]]]) -> str:
    """A tiny RGBA image as a data URI."""
    height, width = len(rows), len(rows[0])
    raw = b"".join(b"\0" + bytes(channel for pixel in row for channel in pixel) for row in rows)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def image(source: Any, css: str = "") -> str:
    """An embedded image; anything but a data URI is refused, so that the page never reaches out."""
    source = str(source)
    if not source.startswith("data:image/"):
        return ""
    return f'<img class="{css}" src="{esc(source)}" alt="">'
