"""The objects of a scene: attributes, places, drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (40, 84, 214),
    "yellow": (245, 213, 40),
    "purple": (140, 60, 180),
    "orange": (245, 130, 32),
    "cyan": (60, 205, 215),
    "white": (245, 245, 245),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES: dict[str, float] = {"small": 0.58, "large": 1.0}  # share of a cell that the object fills
PLACES: tuple[str, ...] = (
    "top left", "top", "top right",
    "left", "centre", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
OBJECT_COUNT_PROBABILITIES: tuple[float, ...] = (0.3, 0.35, 0.2, 0.15)  # of one, two, three and four objects

Pair = tuple[str, str]  # colour, shape


@dataclass(frozen=True)
class SceneObject:
    """One object: its colour, shape and size, and the cell (0..8, row by row) that holds it."""

    colour: str
    shape: str
    size: str
    cell: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        return PLACES[self.cell]

    @property
    def row_column(self) -> tuple[int, int]:
        return divmod(self.cell, 3)


def all_pairs() -> list[Pair]:
    """All colour-shape pairs, colours first: the classes of the zero-shot task, in the order of their labels."""
    return [(colour, shape) for colour in COLOURS for shape in SHAPES]


def unseen_pairs() -> list[Pair]:
    """The six pairs kept out of training: every shape once, six different colours, so that each half is well known."""
    colours = list(COLOURS)
    return [(colours[(3 * i + 1) % len(colours)], shape) for i, shape in enumerate(SHAPES)]


def seen_pairs() -> list[Pair]:
    unseen = set(unseen_pairs())
    return [pair for pair in all_pairs() if pair not in unseen]


def class_names() -> list[str]:
    return [f"{colour} {shape}" for colour, shape in all_pairs()]


def sample_scene(rng: np.random.Generator, *, unseen: bool = False, count: int | None = None) -> list[SceneObject]:
    """Draw one to four objects of different colour-shape pairs in different cells.

    Args:
        rng: where the chances come from.
        unseen: draw the first object from :func:`unseen_pairs`; the others are always of seen pairs.
        count: the number of objects; drawn from :data:`OBJECT_COUNT_PROBABILITIES` if not given.
    """
    if count is None:
        count = int(rng.choice(len(OBJECT_COUNT_PROBABILITIES), p=OBJECT_COUNT_PROBABILITIES)) + 1
    if not 1 <= count <= 4:
        raise ValueError(f"a scene holds one to four objects, not count={count}")
    known = seen_pairs()
    pairs = [known[i] for i in rng.choice(len(known), size=count, replace=False)]
    if unseen:
        pairs[0] = unseen_pairs()[rng.integers(len(SHAPES))]
    cells = rng.choice(len(PLACES), size=count, replace=False)
    sizes = rng.choice(list(SIZES), size=count)
    drawn = zip(pairs, sizes, cells, strict=True)
    return [SceneObject(colour, shape, str(size), int(cell)) for (colour, shape), size, cell in drawn]


def draw_scene(objects: Sequence[SceneObject], rng: np.random.Generator, *, image_size: int = 48) -> Image.Image:
    """Draw a scene on a dark ground, every object shifted and tinted a little; ``image_size`` in pixels."""
    scale = 4  # drawn large and shrunk: smooth edges
    side = image_size * scale
    ground = tuple(int(v) for v in rng.integers(15, 75, size=3))
    image = Image.new("RGB", (side, side), ground)
    canvas = ImageDraw.Draw(image)
    cell = side / 3
    for item in objects:
        row, column = item.row_column
        radius = cell / 2 * 0.94 * SIZES[item.size]
        room = cell / 2 - radius + cell * 0.04
        x = (column + 0.5) * cell + rng.uniform(-room, room)
        y = (row + 0.5) * cell + rng.uniform(-room, room)
        colour = tuple(int(np.clip(v + rng.integers(-18, 19), 0, 255)) for v in COLOURS[item.colour])
        _draw_shape(canvas, item.shape, x, y, radius, colour, ground)
    return image.resize((image_size, image_size), Image.Resampling.BOX)


def _draw_shape(
    canvas: ImageDraw.ImageDraw,
    shape: str,
    x: float,
    y: float,
    r: float,
    colour: tuple[int, ...],
    ground: tuple[int, ...],
) -> None:
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "ring":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        canvas.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=ground)
    elif shape == "square":
        s = r * 0.86
        canvas.rectangle((x - s, y - s, x + s, y + s), fill=colour)
    elif shape == "triangle":
        canvas.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=colour)
    elif shape == "diamond":
        canvas.polygon([(x, y - r), (x + 0.72 * r, y), (x, y + r), (x - 0.72 * r, y)], fill=colour)
    elif shape == "cross":
        w = r * 0.34
        canvas.rectangle((x - w, y - r, x + w, y + r), fill=colour)
        canvas.rectangle((x - r, y - w, x + r, y + w), fill=colour)
    else:
        raise ValueError(f"unknown shape {shape!r}; the shapes are {', '.join(SHAPES)}")
