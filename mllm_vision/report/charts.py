"""Line charts and heat maps as numbers: where each line, tick and cell lies; templates/charts.html draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mllm_vision.report.format import clipped, embedded

WIDTH, HEIGHT = 460, 262
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 24, 34
MAX_POINTS = 360

Points = Sequence[tuple[float, float]]


@dataclass
class Line:
    """One series of a chart; `tint` is a colour class of the style sheet."""

    name: str
    points: Points
    tint: str
    faint: bool = False
    dashed: bool = False


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Round numbers between two bounds, or powers of ten."""
    if not high > low:
        return [low]
    from matplotlib.ticker import LogLocator, MaxNLocator  # at use: --help imports no numpy

    locator = LogLocator(numticks=6) if log else MaxNLocator(4, steps=[1, 2, 2.5, 5, 10])
    return [float(value) for value in locator.tick_values(low, high) if low * 0.9999 <= value <= high * 1.0001]


@dataclass
class Axis:
    """Values from low to high on pixels from start to end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + (self.end - self.start) * share, 1)

    def ticks(self) -> list[float]:
        return ticks(self.low, self.high, self.log)


def thin(points: Points, most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points, the last one kept."""
    step = max(1, -(-len(points) // most))
    kept = list(points[::step])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def smooth(points: Points) -> list[tuple[float, float]]:
    """Mean over a window centred on each point (smaller at the ends): no lag behind a falling loss."""
    reach = max(1, len(points) // 40)
    result = []
    for place, (x, _) in enumerate(points):
        here = min(reach, place, len(points) - 1 - place)
        window = [y for _, y in points[place - here : place + here + 1]]
        result.append((x, sum(window) / len(window)))
    return result


def axis_number(value: float) -> str:
    """A tick's value, short."""
    if value and (abs(value) < 0.001 or abs(value) >= 1e6):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    if abs(value) >= 10000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


def _bounds(values: Sequence[float], log_y: bool, as_percent: bool, zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if as_percent:
        return 0.0, 1.0
    if log_y:
        return low / 1.2, high * 1.2
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return (0.0 if zero and low >= 0 else low - margin), high + margin


@dataclass
class Chart:
    """A line chart as `line_chart` describes it; the template maps values to pixels by its axes `x` and `y`."""

    title: str
    lines: list[Line]
    x: Axis
    y: Axis
    unit: str
    x_label: str
    as_percent: bool
    last: bool
    rules: Sequence[tuple[float, str]]
    marks: Sequence[tuple[float, str, str]]
    note: str
    width: int = WIDTH
    height: int = HEIGHT


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str = "",
    x_label: str = "step",
    log_y: bool = False,
    as_percent: bool = False,
    zero: bool = False,
    last: bool = True,
    rules: Sequence[tuple[float, str]] = (),
    marks: Sequence[tuple[float, str, str]] = (),
    note: str = "",
) -> Chart | None:
    """A chart of what can be drawn of some lines, or None where that is nothing.

    Args:
        title: over the chart.
        lines: the series; values that are not finite (or not positive on a log scale) are dropped.
        unit: of y, at the top of its axis.
        x_label: under the axis.
        log_y: logarithmic y axis.
        as_percent: y runs from 0 to 1 and is labelled in per cent.
        zero: y starts at zero.
        last: the legend shows each line's last value.
        rules: (y, text) horizontal reference lines.
        marks: (x, text, tint) vertical reference lines.
        note: a sentence under the chart.
    """

    def drawable(y: float) -> bool:
        return math.isfinite(y) and (y > 0 or not log_y)

    kept = [replace(line, points=thin([(x, y) for x, y in line.points if drawable(y)])) for line in lines]
    kept = [line for line in kept if line.points]
    if all(len(line.points) < 2 for line in kept):
        return None
    rules = [(y, text) for y, text in rules if drawable(y)]
    xs = [x for line in kept for x, _ in line.points]
    ys = [y for line in kept for _, y in line.points] + [y for y, _ in rules]
    x_axis = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_axis = Axis(*_bounds(ys, log_y, as_percent, zero), HEIGHT - BOTTOM, TOP, log_y)
    marks = [mark for mark in marks if x_axis.low <= mark[0] <= x_axis.high]
    return Chart(title, kept, x_axis, y_axis, unit, x_label, as_percent, last, rules, marks, note)


@dataclass
class Cell:
    """A square of a heat map: strength of its colour from 0 to 1, words shown on hovering, text inside, frame class."""

    strength: float
    title: str = ""
    text: str = ""
    tint: str = ""
    frame: str = ""


@dataclass
class HeatMap:
    """Cells in rows and columns, their values as the strength of a colour.

    Attributes:
        title, note: over and under it.
        rows, columns: the names of each, left and above; a column's may be an image's data URI.
        cells: [row][column]; None leaves the place empty.
        across, down: the size of a cell; left, top: the room of the names; slanted: column names lean over.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[Cell | None]]
    across: int
    down: int
    left: int
    top: int
    note: str = ""
    slanted: bool = False
    wide: bool = False
    counted: tuple[int, int] | None = None  # right ones, of how many

    @property
    def width(self) -> int:
        return self.left + self.across * len(self.columns) + (44 if self.slanted else 4)

    @property
    def height(self) -> int:
        return self.top + self.down * len(self.rows) + 4


def similarity_matrix(
    matrix: Sequence[Sequence[float]], captions: Sequence[str], images: Sequence[Any]
) -> HeatMap | None:
    """Texts down, images across; the right pairs lie on the diagonal, the best of each row is framed."""
    count = min(len(matrix), len(captions))
    if count < 2:
        return None
    columns = list(zip(*[row[:count] for row in matrix[:count]]))  # [text][image]
    values = [value for row in columns for value in row if math.isfinite(value)]
    low, high = min(values), max(values)
    best = [max(range(count), key=scores.__getitem__) for scores in columns]

    def cell(row: int, place: int) -> Cell:
        score = columns[row][place]
        strength = (score - low) / (high - low) if high > low else 0.0
        frame = ("right" if place == row else "wrong") if place == best[row] else ""
        return Cell(strength**1.5, f"{score:.3f}: {captions[row]}", frame=frame)

    return HeatMap(
        "Similarity of images and texts",
        [clipped(caption, 52) for caption in captions[:count]],
        [embedded(image) for image in images[:count]] + [""] * (count - len(images)),
        [[cell(row, place) for place in range(count)] for row in range(count)],
        across=34, down=34, left=330, top=42, wide=True,
        counted=(sum(place == row for row, place in enumerate(best)), count),
        note=f"Dark is near (cosine {low:.2f} to {high:.2f}). The nearest image of each text is framed.",
    )  # fmt: skip


def confusion_matrix(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> HeatMap | None:
    """Truth down, answer across; row shares as darkness."""
    count = min(len(classes), len(counts))
    rows = [row for row in range(count) if sum(counts[row])]
    if len(rows) < 2:
        return None
    size = max(12, min(26, 420 // count))

    def cell(row: int, place: int) -> Cell:
        hits, total = counts[row][place], sum(counts[row])
        if not hits:
            return Cell(0.0)
        words = f"{classes[row]} taken for {classes[place]}: {hits} of {total}"
        return Cell(0.12 + 0.88 * hits / total, words, tint="" if place == row else "wrong")

    return HeatMap(
        "Predicted class by true class",
        [classes[row][:18] for row in rows],
        [name[:16] for name in classes[:count]],
        [[cell(row, place) for place in range(count)] for row in rows],
        across=size, down=size, left=122, top=96, slanted=True,
        note="True class down, predicted class across; red cells are mistakes.",
    )  # fmt: skip


def pair_grid(cells: Mapping[tuple[str, str], tuple[float, int, bool]]) -> HeatMap | None:
    """Accuracy of classes named by two words: first words down, second across; unseen pairs are framed.

    Args:
        cells: (first word, second word) to (accuracy, images, whether the pair was absent from training).
    """
    firsts, seconds = (list(dict.fromkeys(pair[place] for pair in cells)) for place in (0, 1))
    if len(firsts) < 2 or len(seconds) < 2 or len(cells) * 2 < len(firsts) * len(seconds):
        return None

    def cell(pair: tuple[str, str]) -> Cell | None:
        if pair not in cells:
            return None
        value, count, unseen = cells[pair]
        words = f"{' '.join(pair)}: {value:.1%} of {count}"
        return Cell(0.6 * value**2, words, f"{value:.0%}", frame="unseen" * unseen)

    return HeatMap(
        "Zero-shot accuracy by class",
        [word[:10] for word in firsts],
        [word[:9] for word in seconds],
        [[cell((first, second)) for second in seconds] for first in firsts],
        across=56, down=30, left=74, top=26,
        note="Framed pairs never occur in training." if any(value[2] for value in cells.values()) else "",
    )  # fmt: skip
