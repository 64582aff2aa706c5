"""Line charts and matrices as inline SVG; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_vision.report.markup import esc, number, percent

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 34
MAX_POINTS = 360


@dataclass
class Line:
    """One series of a chart."""

    name: str
    points: list[tuple[float, float]]
    colour: str
    faint: bool = False
    dashed: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two bounds."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two bounds, at most six."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    step = max(1, math.ceil((last - first) / 5))
    return [10.0**power for power in range(first, last + 1, step)]


def thin(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points, the last one kept."""
    step = max(1, -(-len(points) // most))
    kept = list(points[::step])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean over a window centred on each point (smaller at the ends): no lag behind a falling loss."""
    reach = max(1, len(points) // 40)
    result = []
    for place, (x, _) in enumerate(points):
        here = min(reach, place, len(points) - 1 - place)
        window = [y for _, y in points[place - here : place + here + 1]]
        result.append((x, sum(window) / len(window)))
    return result


def _axis_number(value: float) -> str:
    if value and (abs(value) < 0.001 or abs(value) >= 1e6):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    if abs(value) >= 10000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str = "step",
    log_y: bool = False,
    as_percent: bool = False,
    zero: bool = False,
    last: bool = True,
    rules: Sequence[tuple[float, str]] = (),
    marks: Sequence[tuple[float, str, str]] = (),
) -> str:
    """A chart with a title and a legend, or nothing when there is nothing to draw.

    Args:
        title: over the chart.
        lines: the series; values that are not finite (or not positive on a log scale) are dropped.
        x_label: under the axis.
        log_y: logarithmic y axis.
        as_percent: y runs from 0 to 1 and is labelled in per cent.
        zero: y starts at zero.
        last: the legend shows each line's last value.
        rules: (y, text) horizontal reference lines.
        marks: (x, text, colour) vertical reference lines.
    """
    kept = []
    for line in lines:
        points = [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)]
        if points:
            kept.append(Line(line.name, thin(points), line.colour, line.faint, line.dashed))
    if not kept or all(len(line.points) < 2 for line in kept):
        return ""
    xs = [x for line in kept for x, _ in line.points]
    ys = [y for line in kept for _, y in line.points] + [y for y, _ in rules if y > 0 or not log_y]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(ys), max(ys)
    if as_percent:
        y_low, y_high = 0.0, 1.0
    elif log_y:
        y_low, y_high = y_low / 1.2, y_high * 1.2
    else:
        margin = 0.06 * (y_high - y_low) or abs(y_high) * 0.1 or 1.0
        y_low, y_high = (0.0 if zero and y_low >= 0 else y_low - margin), y_high + margin

    def px(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((x - x_low) / (x_high - x_low) if x_high > x_low else 0.5)

    def py(y: float) -> float:
        share = math.log(y / y_low) / math.log(y_high / y_low) if log_y else (y - y_low) / (y_high - y_low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = [_grid(px, py, x_low, x_high, y_low, y_high, log_y, as_percent, x_label)]
    for y, text in rules:
        if y_low <= y <= y_high:
            parts.append(
                f'<line class=rule x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>'
                f'<text class=rule-text x="{WIDTH - RIGHT - 4}" y="{py(y) - 5:.1f}" '
                f'text-anchor="end">{esc(text)}</text>'
            )
    for place, (x, text, tint) in enumerate(marks):
        if x_low <= x <= x_high:
            late = px(x) > WIDTH * 0.65
            parts.append(
                f'<line x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="{tint}" '
                f'stroke-dasharray="3 3"/>'
                f'<text class=mark x="{px(x) + (-5 if late else 5):.1f}" y="{TOP + 12 + 15 * place}" '
                f'text-anchor="{"end" if late else "start"}" style="fill:{tint}">{esc(text)}</text>'
            )
    for line in kept:
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in line.points)
        style = f'stroke="{line.colour}"' + (' stroke-dasharray="5 4"' if line.dashed else "")
        parts.append(
            f'<polyline class="curve{" faint" if line.faint else ""}" points="{path}" {style}>'
            f"<title>{esc(line.name)}</title></polyline>"
        )
        if not line.faint and len(line.points) <= 40:
            dots = "".join(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.4"/>' for x, y in line.points)
            parts.append(f'<g fill="{line.colour}">{dots}</g>')
    named = [line for line in kept if not line.faint]
    keys = "".join(
        f'<span><i style="background:{line.colour}"></i>{esc(line.name)}'
        f"{_last(line, as_percent) if last else ''}</span>"
        for line in named
    )
    return (
        f"<figure class=chart><figcaption>{esc(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(title)}">{"".join(parts)}</svg>'
        f"<div class=legend>{keys}</div></figure>"
    )


def _last(line: Line, as_percent: bool) -> str:
    value = line.points[-1][1]
    return f" <b>{percent(value) if as_percent else number(value)}</b>"


def _grid(
    px: Callable[[float], float],
    py: Callable[[float], float],
    x_low: float,
    x_high: float,
    y_low: float,
    y_high: float,
    log_y: bool,
    as_percent: bool,
    x_label: str,
) -> str:
    parts = []
    for value in log_ticks(y_low, y_high) if log_y else ticks(y_low, y_high, 4):
        text = f"{value:.0%}" if as_percent else _axis_number(value)
        y = py(value)
        parts.append(
            f'<line class=grid x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    for value in ticks(x_low, x_high, 4):
        parts.append(
            f'<text x="{px(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_axis_number(value)}</text>'
        )
    parts.append(f'<line class=axis x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text class=axis-name x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{esc(x_label)}</text>')
    return "".join(parts)


def similarity_matrix(matrix: Sequence[Sequence[float]], captions: Sequence[str], images: Sequence[Any]) -> str:
    """Texts down, images across; the right pairs lie on the diagonal, the best of each row is framed."""
    count = min(len(matrix), len(captions))
    if count < 2:
        return ""
    columns = list(zip(*[row[:count] for row in matrix[:count]]))  # [text][image]
    values = [value for row in columns for value in row if math.isfinite(value)]
    low, high = min(values), max(values)
    cell, text_width, head = 34, 330, 34
    width, height = text_width + cell * count + 4, head + 8 + cell * count + 4
    parts = []
    for place, image in enumerate(images[:count]):
        if str(image).startswith("data:image/"):
            parts.append(
                f'<image href="{esc(image)}" x="{text_width + cell * place + 2}" y="2" width="{cell - 4}" '
                f'height="{cell - 4}" preserveAspectRatio="xMidYMid slice"/>'
            )
    hits = 0
    for row, (caption, scores) in enumerate(zip(captions, columns)):
        y = head + 8 + cell * row
        best = max(range(count), key=lambda place: scores[place])
        hits += best == row
        short = caption if len(caption) <= 52 else caption[:51].rstrip() + "…"
        parts.append(
            f'<text x="{text_width - 8}" y="{y + cell / 2 + 4}" text-anchor="end">{esc(short)}'
            f"<title>{esc(caption)}</title></text>"
        )
        for place, score in enumerate(scores):
            strength = (score - low) / (high - low) if high > low else 0.0
            frame = ""
            if place == best:
                frame = f' stroke="{"var(--right)" if best == row else "var(--wrong)"}" stroke-width="2"'
            parts.append(
                f'<rect class=cell x="{text_width + cell * place + 1}" y="{y + 1}" width="{cell - 2}" '
                f'height="{cell - 2}" '
                f'rx="3" fill-opacity="{0.04 + 0.96 * strength**1.5:.3f}"{frame}>'
                f"<title>{score:.3f}: {esc(caption)}</title></rect>"
            )
    return (
        "<figure class=matrix><figcaption>Similarity of images and texts</figcaption>"
        f'<div class=scroll><svg viewBox="0 0 {width} {height}" '
        f'style="min-width:{min(width, 620)}px;max-width:{width}px" '
        f'role="img" aria-label="similarity matrix">{"".join(parts)}</svg></div>'
        f"<p class=note>Dark is near ({low:.2f} to {high:.2f}). The nearest image of each text is framed: "
        f"<b class=right>{hits}</b> of {count} are the right one.</p></figure>"
    )


def confusion_matrix(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Truth down, answer across; row shares as darkness."""
    count = min(len(classes), len(counts))
    rows = [row for row in range(count) if sum(counts[row])]
    if len(rows) < 2:
        return ""
    cell, text_width = max(12, min(26, 420 // count)), 118
    head = 96
    width, height = text_width + cell * count + 44, head + cell * len(rows) + 4
    parts = []
    for place, name in enumerate(classes[:count]):
        x = text_width + cell * (place + 0.5) + 4
        parts.append(f'<text transform="translate({x},{head - 6}) rotate(-60)" class=small>{esc(name[:16])}</text>')
    for line, row in enumerate(rows):
        total, y = sum(counts[row]), head + cell * line
        parts.append(
            f'<text class=small x="{text_width - 5}" y="{y + cell / 2 + 4}" '
            f'text-anchor="end">{esc(classes[row][:18])}</text>'
        )
        for place in range(count):
            share = counts[row][place] / total
            if share:
                tint = "var(--model)" if place == row else "var(--wrong)"
                parts.append(
                    f'<rect x="{text_width + cell * place + 1}" y="{y + 1}" width="{cell - 2}" height="{cell - 2}" '
                    f'rx="2" '
                    f'fill="{tint}" fill-opacity="{0.15 + 0.85 * share:.2f}"><title>{esc(classes[row])} taken for '
                    f"{esc(classes[place])}: {counts[row][place]} of {total}</title></rect>"
                )
            else:
                parts.append(
                    f'<rect class=cell x="{text_width + cell * place + 1}" y="{y + 1}" width="{cell - 2}" '
                    f'height="{cell - 2}" rx="2" fill-opacity="0.04"/>'
                )
    return (
        "<figure class=matrix><figcaption>What was taken for what</figcaption>"
        f'<div class=scroll><svg viewBox="0 0 {width} {height}" '
        f'style="max-width:{width}px;min-width:{min(width, 480)}px" '
        f'role="img" aria-label="confusion matrix">{"".join(parts)}</svg></div>'
        "<p class=note>True class down, answered class across; red cells are mistakes.</p></figure>"
    )


def pair_grid(cells: Mapping[tuple[str, str], tuple[float, int, bool]]) -> str:
    """Accuracy of classes named by two words: first words down, second across; unseen pairs are framed.

    Args:
        cells: (first word, second word) to (accuracy, images, whether the pair was absent from training).
    """
    firsts, seconds = (list(dict.fromkeys(pair[place] for pair in cells)) for place in (0, 1))
    if len(firsts) < 2 or len(seconds) < 2 or len(cells) * 2 < len(firsts) * len(seconds):
        return ""
    across, down, left, top = 56, 30, 74, 26
    width, height = left + across * len(seconds) + 4, top + down * len(firsts) + 4
    parts = []
    for column, word in enumerate(seconds):
        x = left + across * (column + 0.5)
        parts.append(f'<text x="{x}" y="{top - 9}" text-anchor="middle">{esc(word[:9])}</text>')
    for row, word in enumerate(firsts):
        y = top + down * row
        parts.append(f'<text x="{left - 8}" y="{y + down / 2 + 4}" text-anchor="end">{esc(word[:10])}</text>')
        for column, other in enumerate(seconds):
            found = cells.get((word, other))
            if found is None:
                continue
            value, count, unseen = found
            x = left + across * column
            frame = ' stroke="var(--other)" stroke-width="2" stroke-dasharray="4 2"' if unseen else ""
            parts.append(
                f'<rect class=cell x="{x + 2}" y="{y + 2}" width="{across - 4}" height="{down - 4}" rx="4" '
                f'fill-opacity="{0.06 + 0.6 * value**2:.3f}"{frame}><title>{esc(word)} {esc(other)}: '
                f"{value:.1%} of {count}</title></rect>"
                f'<text class=figure x="{x + across / 2}" y="{y + down / 2 + 4}" '
                f'text-anchor="middle">{value:.0%}</text>'
            )
    unseen = any(cell[2] for cell in cells.values())
    note = "<p class=note>Framed pairs never occur in training.</p>" if unseen else ""
    return (
        f"<figure class=chart><figcaption>Zero-shot accuracy by class</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width * 1.25:.0f}px" role="img" '
        f'aria-label="accuracy by class">{"".join(parts)}</svg>{note}</figure>'
    )
