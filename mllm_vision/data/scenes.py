"""Scenes: pictures of one to four coloured shapes, with captions, questions and answers, drawn from a seed.

The embedded data set of the toolkit: it needs no download, a picture costs under a millisecond, and everything that
is true of a picture is known, so every caption and answer is right. It is written as the same Parquet files that
users bring (Hugging Face features included):

===========================  =================================================================================
``train / validation /       ``image, captions, questions, answers, question_types, scene``; colour-shape pairs of
test.parquet``               :func:`unseen_pairs` never occur in them
``unseen_test.parquet``      the same columns; every picture holds an object of an unseen colour-shape pair, and its
                             questions ask about that object wherever the type allows
``single_validation /
single_test.parquet``        ``image, captions, label, label_name``: one object, labels are colour x shape
``single_unseen.parquet``    the same for the unseen pairs only
``text.txt``                 one document a line: what a language model reads before it ever sees a picture
===========================  =================================================================================

Answers are balanced within a question's wording (a yes/no question is "yes" half of the time, and where it asks for a
colour and a shape, "no" mostly means that both are in the picture, only not on one object), so a model that reads the
question and not the picture stays near what chance allows.

``python -m mllm_vision.data.scenes --output_dir scenes --train 20000``
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
NUMBERS: tuple[str, ...] = ("zero", "one", "two", "three", "four")
OBJECT_COUNT_PROBABILITIES: tuple[float, ...] = (0.3, 0.35, 0.2, 0.15)  # of one, two, three and four objects
QUESTION_TYPES: tuple[str, ...] = ("colour", "shape", "size", "count", "place", "relation", "yes/no")
SPLITS: tuple[str, ...] = (
    "train", "validation", "test", "unseen_test", "single_validation", "single_test", "single_unseen", "text",
)  # fmt: skip

Pair = tuple[str, str]  # colour, shape


@dataclass(frozen=True)
class SceneObject:
    """One object: its colour, shape and size, and the cell (0..8, row by row) that it stands in."""

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


# --- a scene -----------------------------------------------------------------------------------------------------


def row_generator(seed: int, split: str, index: int) -> np.random.Generator:
    """The random numbers of one row: from (seed, split, row) alone, whoever draws it and in whatever order."""
    return np.random.default_rng([seed, SPLITS.index(split), index])


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
    return [SceneObject(*pair, size=str(size), cell=int(cell)) for pair, size, cell in drawn]


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


# --- words -------------------------------------------------------------------------------------------------------


def _at(place: str) -> str:
    return f"in the {place}" if place == "centre" else f"at the {place}"


def _a(words: str) -> str:
    return f"an {words}" if words[0] in "aeio" else f"a {words}"


def _listing(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else {"cross": "crosses"}.get(noun, noun + "s")


def describe(objects: Sequence[SceneObject]) -> str:
    """The full description in reading order; two scenes have the same one only if they hold the same objects."""
    ordered = sorted(objects, key=lambda item: item.cell)
    return _listing([f"{_a(f'{item.size} {item.name}')} {_at(item.place)}" for item in ordered])


def relation(first: SceneObject, second: SceneObject) -> str | None:
    """Where ``first`` stands seen from ``second``: left, right, above, below; None where neither axis is longer."""
    (row1, column1), (row2, column2) = first.row_column, second.row_column
    down, across = row1 - row2, column1 - column2
    if abs(across) > abs(down):
        return "left" if across < 0 else "right"
    if abs(down) > abs(across):
        return "above" if down < 0 else "below"
    return None


def _relation_phrase(where: str) -> str:
    return f"{where} of" if where in ("left", "right") else where


def captions(objects: Sequence[SceneObject], rng: np.random.Generator) -> list[str]:
    """Four captions: the full description, the same in other words and order, names with relations, shape counts.

    The last one says nothing of colour and place, which are easy to see: what it tells apart is shapes alone.
    """
    shuffled = [objects[i] for i in rng.permutation(len(objects))]
    reworded = _listing([f"{item.place} {_a(f'{item.colour} {item.size} {item.shape}')}" for item in shuffled])
    related = [(a, b, where) for a in shuffled for b in shuffled if a is not b and (where := relation(a, b))]
    if related:
        names = _listing([f"{_a(a.name)} {_relation_phrase(where)} {_a(b.name)}" for a, b, where in related[:2]])
    else:
        names = _listing([_a(item.name) for item in shuffled])
    shapes = [item.shape for item in shuffled]
    tally = _listing([f"{NUMBERS[shapes.count(s)]} {_plural(s, shapes.count(s))}" for s in dict.fromkeys(shapes)])
    if len(objects) > 1:
        tally = f"{NUMBERS[len(objects)]} objects: {tally}"
    return [describe(objects), reworded, names, tally]


Question = tuple[str, str]  # question, answer


def _refer(objects: Sequence[SceneObject], target: SceneObject, rng: np.random.Generator) -> str:
    """A name of the target that fits no other object: "red circle", or "circle" or "red object" where that is enough.

    An unseen pair always gets its full name: it is what its test is about.
    """
    names = [target.name]
    if (target.colour, target.shape) not in unseen_pairs():
        if sum(item.shape == target.shape for item in objects) == 1:
            names.append(target.shape)
        if sum(item.colour == target.colour for item in objects) == 1:
            names.append(f"{target.colour} object")
    return names[rng.integers(len(names))]


def _ask_colour(objects: Sequence[SceneObject], target: SceneObject, rng: np.random.Generator) -> Question | None:
    if sum(item.shape == target.shape for item in objects) == 1 and rng.random() < 0.6:
        return f"what colour is the {target.shape}?", target.colour
    return f"what colour is the object {_at(target.place)}?", target.colour


def _ask_shape(objects: Sequence[SceneObject], target: SceneObject, rng: np.random.Generator) -> Question | None:
    if sum(item.colour == target.colour for item in objects) == 1 and rng.random() < 0.6:
        return f"what shape is the {target.colour} object?", target.shape
    return f"what shape is the object {_at(target.place)}?", target.shape


def _ask_size(objects: Sequence[SceneObject], target: SceneObject, rng: np.random.Generator) -> Question | None:
    return f"is the {_refer(objects, target, rng)} small or large?", target.size


def _ask_count(objects: Sequence[SceneObject], target: SceneObject, rng: np.random.Generator) -> Question | None:
    return "how many objects are there?", NUMBERS[len(objects)]


def _ask_place(objects: Sequence[SceneObject], target: SceneObject, rng: np.random.Generator) -> Question | None:
    return f"where is the {_refer(objects, target, rng)}?", target.place


def _ask_relation(objects: Sequence[SceneObject], target: SceneObject, rng: np.random.Generator) -> Question | None:
    others = [item for item in objects if item is not target and relation(target, item)]
    if not others:
        return None
    other = others[rng.integers(len(others))]
    names = _refer(objects, other, rng), _refer(objects, target, rng)
    return f"which side of the {names[0]} is the {names[1]}?", str(relation(target, other))


def _ask_yes_no(objects: Sequence[SceneObject], target: SceneObject, rng: np.random.Generator) -> Question | None:
    present = {(item.colour, item.shape) for item in objects}
    unseen, true = set(unseen_pairs()), rng.random() < 0.5
    if not present & unseen and rng.random() < 0.4:  # one half alone; an unseen pair is always asked for as a pair
        if rng.random() < 0.5:
            absent = [colour for colour in COLOURS if all(item.colour != colour for item in objects)]
            thing = f"{target.colour if true else absent[rng.integers(len(absent))]} object"
        else:
            absent = [shape for shape in SHAPES if all(item.shape != shape for item in objects)]
            thing = target.shape if true else absent[rng.integers(len(absent))]
    elif true:
        thing = target.name
    else:
        # An unseen pair is not asked for in pictures of seen pairs: training would teach that the answer is "no".
        barred = present if present & unseen else present | unseen
        # Mostly both halves are in the picture, on different objects; otherwise one half is the target's.
        mixed = [(a.colour, b.shape) for a in objects for b in objects]
        half = [(colour, target.shape) for colour in COLOURS] + [(target.colour, shape) for shape in SHAPES]
        wrong = [pair for pair in mixed if pair not in barred] if rng.random() < 0.7 else []
        wrong = wrong or [pair for pair in half if pair not in barred]
        thing = " ".join(wrong[rng.integers(len(wrong))])
    return f"is there {_a(thing)}?", "yes" if true else "no"


_ASK: dict[str, Callable[[Sequence[SceneObject], SceneObject, np.random.Generator], Question | None]] = {
    "colour": _ask_colour,
    "shape": _ask_shape,
    "size": _ask_size,
    "count": _ask_count,
    "place": _ask_place,
    "relation": _ask_relation,
    "yes/no": _ask_yes_no,
}


def questions(
    objects: Sequence[SceneObject], rng: np.random.Generator, *, count: int = 6, about: SceneObject | None = None
) -> tuple[list[str], list[str], list[str]]:
    """Ask ``count`` different questions, the types in random order and as evenly as the scene allows.

    Returns:
        questions, answers and question types (of :data:`QUESTION_TYPES`), three lists in step.
    """
    asked: dict[str, tuple[str, str]] = {}
    while len(asked) < count:
        before = len(asked)
        for index in rng.permutation(len(QUESTION_TYPES)):
            kind = QUESTION_TYPES[index]
            target = about or objects[rng.integers(len(objects))]
            question = _ASK[kind](objects, target, rng)
            if question is not None and question[0] not in asked and len(asked) < count:
                asked[question[0]] = (question[1], kind)
        if len(asked) == before:
            break  # a small scene has only so much to ask about
    return list(asked), [answer for answer, _ in asked.values()], [kind for _, kind in asked.values()]


# --- rows and files ----------------------------------------------------------------------------------------------


def make_row(index: int, *, seed: int, split: str, image_size: int = 48, questions_each: int = 6) -> dict[str, Any]:
    """One row of a split, from (seed, split, index) alone."""
    rng = row_generator(seed, split, index)
    single = split.startswith("single")
    unseen = split in ("unseen_test", "single_unseen")
    objects = sample_scene(rng, unseen=unseen, count=1 if single else None)
    picture = io.BytesIO()
    draw_scene(objects, rng, image_size=image_size).save(picture, format="PNG", compress_level=1)
    row: dict[str, Any] = {
        "image": {"bytes": picture.getvalue(), "path": None},
        "captions": captions(objects, rng),
    }
    if single:
        row["label"] = class_names().index(objects[0].name)
        row["label_name"] = objects[0].name
    else:
        asked = questions(objects, rng, count=questions_each, about=objects[0] if unseen else None)
        row["questions"], row["answers"], row["question_types"] = asked
    row["scene"] = json.dumps([asdict(item) for item in objects])
    return row


def make_document(index: int, *, seed: int, questions_each: int = 6) -> str:
    """One line of text: a scene told in words, then questions about it with their answers, as a conversation reads."""
    rng = row_generator(seed, "text", index)
    objects = sample_scene(rng)
    told = captions(objects, rng)
    asked, answers, _ = questions(objects, rng, count=questions_each)
    story = told[int(rng.integers(2))]  # a complete description, so that the questions can be answered from it
    talk = " ".join(f"question: {q} answer: {a}" for q, a in zip(asked, answers, strict=True))
    return f"{story} {talk}" if rng.random() < 0.8 else ". ".join(told)


def _features(single: bool) -> Any:
    from datasets import ClassLabel, Features, List, Value
    from datasets import Image as ImageFeature

    columns: dict[str, Any] = {"image": ImageFeature(), "captions": List(Value("string"))}
    if single:
        columns |= {"label": ClassLabel(names=class_names()), "label_name": Value("string")}
    else:
        columns |= {name: List(Value("string")) for name in ("questions", "answers", "question_types")}
    return Features(columns | {"scene": Value("string")})


def _parallel(make: Callable[[int], Any], rows: int, workers: int, label: str) -> Iterator[Any]:
    from tqdm.auto import tqdm

    if workers <= 1 or rows < 1000:
        yield from tqdm(map(make, range(rows)), total=rows, desc=label, unit="row", mininterval=1.0)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from tqdm(pool.map(make, range(rows), chunksize=250), total=rows, desc=label, unit="row", mininterval=1.0)


def write_split(
    path: Path, rows: int, *, seed: int, split: str, image_size: int = 48, questions_each: int = 6, workers: int = 1
) -> None:
    """Write ``rows`` rows of a split as a Parquet file with Hugging Face feature metadata."""
    from datasets import Dataset

    make = partial(make_row, seed=seed, split=split, image_size=image_size, questions_each=questions_each)
    table = list(_parallel(make, rows, workers, split))
    Dataset.from_list(table, features=_features(split.startswith("single"))).to_parquet(str(path))


def write_text(path: Path, documents: int, *, seed: int, workers: int = 1) -> None:
    """Write ``documents`` lines of text, one document a line."""
    make = partial(make_document, seed=seed)
    path.write_text("\n".join(_parallel(make, documents, workers, "text")) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mllm_vision.data.scenes",
        description="Write the Scenes data set: Parquet files of pictures with captions and questions, and a text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="where the files go")
    parser.add_argument("--train", type=int, default=20000, help="training pictures")
    parser.add_argument("--validation", type=int, default=500, help="validation pictures")
    parser.add_argument("--test", type=int, default=1000, help="test pictures, of each of the test files")
    parser.add_argument("--documents", type=int, default=30000, help="lines of text for the language model")
    parser.add_argument("--image_size", type=int, default=48, help="width and height in pixels")
    parser.add_argument("--questions_each", type=int, default=6, help="questions asked about a picture")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw; the result does not depend on it")
    options = parser.parse_args(argv)
    for name in ("train", "validation", "test", "documents", "image_size", "questions_each", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")
    if options.seed < 0:
        parser.error(f"--seed must not be negative, it is {options.seed}")
    if options.output_dir.exists() and not options.output_dir.is_dir():
        parser.error(f"--output_dir {options.output_dir} is a file; name a folder")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    sizes = {"train": options.train, "validation": options.validation, "single_validation": options.validation}
    for split in SPLITS[:-1]:
        write_split(
            options.output_dir / f"{split}.parquet", sizes.get(split, options.test), seed=options.seed, split=split,
            image_size=options.image_size, questions_each=options.questions_each, workers=options.workers,
        )  # fmt: skip
    write_text(options.output_dir / "text.txt", options.documents, seed=options.seed, workers=options.workers)


if __name__ == "__main__":
    main()
