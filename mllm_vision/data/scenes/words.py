"""The words of a scene: captions in several wordings, questions with their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mllm_vision.data.scenes.objects import COLOURS, SHAPES, SceneObject, unseen_pairs

NUMBERS: tuple[str, ...] = ("zero", "one", "two", "three", "four")
QUESTION_TYPES: tuple[str, ...] = ("colour", "shape", "size", "count", "place", "relation", "yes/no")


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

    The last one says nothing of colour and place, which are easy to see: it distinguishes shapes only.
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
        # An unseen pair is not asked for in images of seen pairs: training would teach that the answer is "no".
        barred = present if present & unseen else present | unseen
        # Mostly both halves are in the image, on different objects; otherwise one half is the target's.
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
            target = about or objects[int(rng.integers(len(objects)))]
            question = _ASK[kind](objects, target, rng)
            if question is not None and question[0] not in asked and len(asked) < count:
                asked[question[0]] = (question[1], kind)
        if len(asked) == before:
            break  # a small scene has only so much to ask about
    return list(asked), [answer for answer, _ in asked.values()], [kind for _, kind in asked.values()]
