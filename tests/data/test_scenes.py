"""Scenes: reproducible, split as told, and every word about an image true.

What is true is derived here a second time, from the `scene` column and the pixels, with tables of its own.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from mllm_vision.data.scenes import scenes

PLACES = ["top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right"]
NUMBERS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4}
PURE = {
    "red": (214, 40, 40), "green": (46, 160, 67), "blue": (40, 84, 214), "yellow": (245, 213, 40),
    "purple": (140, 60, 180), "orange": (245, 130, 32), "cyan": (60, 205, 215), "white": (245, 245, 245),
}  # fmt: skip
COLOUR, SHAPE, SIZE = "|".join(PURE), "circle|square|triangle|diamond|cross|ring", "small|large"
PLACE = "|".join(sorted(PLACES, key=len, reverse=True))
THING = f"(?:{COLOUR}) (?:{SHAPE})|(?:{COLOUR}) object|{SHAPE}"
TYPES = {"colour", "shape", "size", "count", "place", "relation", "yes/no"}


def rows_of(split: str, count: int, **settings) -> list[dict]:
    return [scenes.make_row(index, seed=11, split=split, image_size=24, **settings) for index in range(count)]


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    return {split: rows_of(split, 2000 if split == "train" else 400) for split in scenes.SPLITS[:-1]}


def objects_of(row: dict) -> list[dict]:
    return json.loads(row["scene"])


def pairs_of(row: dict) -> set[tuple[str, str]]:
    return {(item["colour"], item["shape"]) for item in objects_of(row)}


def grid(item: dict) -> tuple[int, int]:
    return item["cell"] % 3, item["cell"] // 3  # x to the right, y downwards


def only(items: list[dict], **wanted) -> dict:
    """The one object that a question speaks of: with two of them it would have no answer."""
    found = [item for item in items if all(item[key] == value for key, value in wanted.items())]
    assert len(found) == 1, f"{wanted} names {len(found)} of {items}"
    return found[0]


def meant(thing: str) -> dict[str, str]:
    """ "red circle", "red object" or "circle": what the words say of colour and shape."""
    said = {}
    for word in thing.split():
        if word in PURE:
            said["colour"] = word
        elif word != "object":
            said["shape"] = word
    return said


def side(first: dict, second: dict) -> str | None:
    """Where `first` stands, seen from `second`: the longer of the two ways tells."""
    x, y = (a - b for a, b in zip(grid(first), grid(second)))
    if abs(x) == abs(y):
        return None
    return ("left" if x < 0 else "right") if abs(x) > abs(y) else ("above" if y < 0 else "below")


def true_answer(question: str, items: list[dict]) -> tuple[str, str]:
    """(type, answer) of a question about `items`."""

    def ask(pattern: str) -> tuple[str, ...] | None:
        found = re.fullmatch(pattern, question)
        return found.groups() if found else None

    if found := ask(rf"what (colour|shape) is the object (?:at|in) the ({PLACE})\?"):
        return found[0], only(items, cell=PLACES.index(found[1]))[found[0]]
    if found := ask(rf"what colour is the ({SHAPE})\?"):
        return "colour", only(items, shape=found[0])["colour"]
    if found := ask(rf"what shape is the ({COLOUR}) object\?"):
        return "shape", only(items, colour=found[0])["shape"]
    if found := ask(rf"is the ({THING}) small or large\?"):
        return "size", only(items, **meant(found[0]))["size"]
    if found := ask(rf"where is the ({THING})\?"):
        return "place", PLACES[only(items, **meant(found[0]))["cell"]]
    if found := ask(rf"which side of the ({THING}) is the ({THING})\?"):
        second, first = (only(items, **meant(thing)) for thing in found)
        return "relation", str(side(first, second))
    if found := ask(rf"is there an? ({THING})\?"):
        return "yes/no", "yes" if any(meant(found[0]).items() <= item.items() for item in items) else "no"
    assert question == "how many objects are there?", f"a question of no known form: {question!r}"
    return "count", next(word for word, number in NUMBERS.items() if number == len(items))


# ---- the seed decides, and nothing else ----------------------------------------------------------------------


def test_a_row_depends_on_seed_split_and_index_alone(splits):
    assert scenes.make_row(7, seed=11, split="train", image_size=24) == splits["train"][7]
    for other in ({"seed": 12}, {"split": "validation"}):
        assert scenes.make_row(7, **{"seed": 11, "split": "train", "image_size": 24, **other}) != splits["train"][7]
    seen = Counter(row["image"]["bytes"] for rows in splits.values() for row in rows)
    assert max(seen.values()) == 1, "two rows hold the very same image"


def test_files_do_not_depend_on_the_number_of_workers(tmp_path):
    from datasets import load_dataset

    settings = {"seed": 5, "split": "single_test", "image_size": 8}
    for workers in (1, 2):  # below 1000 rows no process is started
        scenes.write_text(tmp_path / f"{workers}.txt", 1100, seed=5, workers=workers)
        scenes.write_split(tmp_path / f"{workers}.parquet", 1100, workers=workers, **settings)
    assert (tmp_path / "1.txt").read_bytes() == (tmp_path / "2.txt").read_bytes()
    one, two = (
        load_dataset("parquet", data_files=str(tmp_path / f"{n}.parquet"), cache_dir=str(tmp_path), split="train")
        for n in (1, 2)
    )
    assert one.with_format("arrow")[:].equals(two.with_format("arrow")[:])


# ---- splits --------------------------------------------------------------------------------------------------


def test_unseen_pairs_are_in_no_image_of_training(splits):
    unseen = set(scenes.unseen_pairs())
    assert len(unseen) == 6 and len({c for c, _ in unseen}) == 6 and len({s for _, s in unseen}) == 6
    for split in ("train", "validation", "test", "single_validation", "single_test"):
        assert not any(pairs_of(row) & unseen for row in splits[split]), split
    named = [f"{colour} {shape}" for colour, shape in unseen]
    for split in ("train", "validation", "test"):  # nor in a caption or a question: its "no" would be learnt
        said = "\n".join(text for row in splits[split] for text in row["captions"] + row["questions"])
        assert not any(name in said for name in named), split
    # every half of an unseen pair is well known, in other company
    halves = Counter(half for row in splits["train"] for pair in pairs_of(row) for half in pair)
    assert all(halves[half] > 200 for pair in unseen for half in pair)
    seen = set().union(*(pairs_of(row) for row in splits["train"]))
    assert seen == {(c, s) for c in PURE for s in SHAPE.split("|")} - unseen


def test_unseen_splits_hold_one_unseen_pair_each_and_ask_about_it(splits):
    unseen = set(scenes.unseen_pairs())
    for split in ("unseen_test", "single_unseen"):
        assert all(len(pairs_of(row) & unseen) == 1 for row in splits[split]), split
        assert {pair for row in splits[split] for pair in pairs_of(row) & unseen} == unseen
    for row in splits["unseen_test"]:
        (pair,) = pairs_of(row) & unseen
        item = only(objects_of(row), colour=pair[0], shape=pair[1])
        for question, kind in zip(row["questions"], row["question_types"]):
            if kind in ("size", "place", "relation"):
                assert " ".join(pair) in question
            elif kind in ("colour", "shape"):
                assert any(f" {word}" in question for word in (*pair, PLACES[item["cell"]]))


def test_documents_hold_no_unseen_pair():
    told = [scenes.make_document(index, seed=3) for index in range(400)]
    assert not any(" ".join(pair) in text for pair in scenes.unseen_pairs() for text in told)


def test_single_objects_and_their_labels(splits):
    names = scenes.class_names()
    assert names == [f"{colour} {shape}" for colour in PURE for shape in SHAPE.split("|")]
    for split in ("single_validation", "single_test", "single_unseen"):
        for row in splits[split]:
            (item,) = objects_of(row)
            assert row["label_name"] == f"{item['colour']} {item['shape']}" == names[row["label"]]
            assert "questions" not in row
    assert len({row["label"] for row in splits["single_test"]}) == 42


def test_scenes_hold_one_to_four_objects_apart(splits):
    counts = Counter(len(objects_of(row)) for row in splits["train"])
    assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 200
    for row in splits["train"]:
        items = objects_of(row)
        assert len({item["cell"] for item in items}) == len(pairs_of(row)) == len(items)


# ---- words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation", "test", "unseen_test"])
def test_every_answer_is_right(splits, split):
    kinds = Counter()
    for row in splits[split]:
        assert len(row["questions"]) == len(row["answers"]) == len(row["question_types"]) >= 5
        assert len(set(row["questions"])) == len(row["questions"])
        for question, answer, kind in zip(row["questions"], row["answers"], row["question_types"]):
            assert (kind, answer) == true_answer(question, objects_of(row)), (question, row["scene"])
        kinds.update(row["question_types"])
    assert set(kinds) == TYPES
    assert min(kinds.values()) > 0.4 * max(kinds.values())  # relations need two objects


def test_the_check_of_answers_can_fail():
    items = [
        {"colour": "red", "shape": "ring", "size": "small", "cell": 0},
        {"colour": "blue", "shape": "cross", "size": "large", "cell": 5},
    ]
    assert true_answer("which side of the red ring is the blue cross?", items) == ("relation", "right")
    assert true_answer("is there a red cross?", items) == ("yes/no", "no")
    assert true_answer("where is the blue cross?", items) == ("place", "right")
    assert true_answer("where is the red object?", items) == ("place", "top left")
    assert true_answer("is there a cross?", items) == ("yes/no", "yes")
    assert true_answer("is there a green object?", items) == ("yes/no", "no")
    with pytest.raises(AssertionError, match="names 0 of"):
        true_answer("what colour is the circle?", items)


def test_no_answer_can_be_guessed_from_the_question(splits):
    """The best guess from the very words of a question, learnt on one half and tried on the other."""
    asked = [entry for row in splits["train"] for entry in zip(row["questions"], row["answers"], row["question_types"])]
    half = len(asked) // 2
    by_type, by_words = defaultdict(Counter), defaultdict(Counter)
    for question, answer, kind in asked[:half]:
        by_type[kind][answer] += 1
        by_words[question][answer] += 1
    right, total = Counter(), Counter()
    for question, answer, kind in asked[half:]:
        guess = (by_words.get(question) or by_type[kind]).most_common(1)[0][0]
        right[kind] += guess == answer
        total[kind] += 1
    limits = {"colour": 0.22, "shape": 0.27, "size": 0.58, "count": 0.4, "place": 0.2, "relation": 0.36, "yes/no": 0.64}
    for kind, limit in limits.items():
        assert by_type[kind].most_common(1)[0][1] / by_type[kind].total() <= limit, kind
        assert right[kind] / total[kind] <= limit, kind
    assert right.total() / total.total() < 0.38
    assert 0.46 < by_type["yes/no"]["yes"] / by_type["yes/no"].total() < 0.54


def test_a_no_is_asked_of_things_that_are_in_the_image(splits):
    """Half of the thing is there, and where two objects allow it mostly both halves: seeing "red" is not enough."""
    both = total = 0
    for row in splits["train"]:
        items = objects_of(row)
        for question, answer in zip(row["questions"], row["answers"]):
            found = re.fullmatch(rf"is there an? ({COLOUR}) ({SHAPE})\?", question)
            if found and answer == "no":
                halves = [any(i["colour"] == found[1] for i in items), any(i["shape"] == found[2] for i in items)]
                assert any(halves), (question, items)
                if len(pairs_of(row)) > 1:
                    total, both = total + 1, both + all(halves)
    assert both / total > 0.5


def parse(text: str, pattern: str, keys: str) -> list[dict]:
    """The objects of a listing; nothing but commas and `and` may be left over."""
    found = [dict(zip(keys.split(), match)) for match in re.findall(pattern, text)]
    assert re.sub(pattern, "", text).replace(" and ", "").replace(", ", "") == "", text
    return [{"cell": PLACES.index(item.pop("place")), **item} for item in found]


FULL = rf"an? ({SIZE}) ({COLOUR}) ({SHAPE}) (?:at|in) the ({PLACE})"
REWORDED = rf"({PLACE}) an? ({COLOUR}) ({SIZE}) ({SHAPE})"
NAME = rf"an? ({COLOUR}) ({SHAPE})"


@pytest.mark.parametrize("split", ["train", "unseen_test", "single_test"])
def test_captions_are_true(splits, split):
    def cells(items: list[dict]) -> list[dict]:
        return sorted(items, key=lambda item: item["cell"])

    for row in splits[split]:
        items = objects_of(row)
        full, reworded, names, tally = row["captions"]
        assert parse(full, FULL, "size colour shape place") == cells(items)
        assert cells(parse(reworded, REWORDED, "place colour size shape")) == cells(items)
        related = re.findall(rf"{NAME} (left|right|above|below)(?: of)? {NAME}", names)
        for colour, shape, where, other_colour, other_shape in related:
            first, second = only(items, colour=colour, shape=shape), only(items, colour=other_colour, shape=other_shape)
            assert side(first, second) == where, (names, items)
        named = set(re.findall(NAME, names))
        assert named <= pairs_of(row) and (related or named == pairs_of(row))
        counted = re.findall(rf"({'|'.join(NUMBERS)}) ({SHAPE})(s|es)?\b", tally)
        assert {shape: NUMBERS[word] for word, shape, _ in counted} == Counter(item["shape"] for item in items), tally
        assert all(bool(plural) == (word != "one") for word, _, plural in counted), tally
        if len(items) > 1:
            assert NUMBERS[tally.split(" ")[0]] == len(items) and " objects: " in tally
    articles = " ".join(caption for row in splits[split] for caption in row["captions"])
    assert not re.search(r"\ba [aeiou]", articles) and not re.search(r"\ban [^aeiou]", articles)


def test_documents_answer_from_their_own_story():
    talks = 0
    for index in range(300):
        text = scenes.make_document(index, seed=3)
        assert "\n" not in text
        story, *talk = text.split(" question: ")
        if not talk:
            continue  # captions only
        talks += 1
        forms = ((FULL, "size colour shape place"), (REWORDED, "place colour size shape"))
        pattern, keys = forms[story.split(" ")[0] not in ("a", "an")]
        items = parse(story, pattern, keys)
        for turn in talk:
            question, answer = turn.split(" answer: ")
            assert true_answer(question, items)[1] == answer, (story, turn)
    assert 200 < talks < 280


# ---- images ------------------------------------------------------------------------------------------------


def test_the_image_shows_the_scene():
    """In every cell that holds an object its colour, in every other one nothing; large is larger than small."""
    areas = defaultdict(list)
    names, pure = list(PURE), np.array(list(PURE.values()), dtype=float)
    for index in range(150):
        row = scenes.make_row(index, seed=4, split="train", image_size=96)
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            assert image.format == "PNG" and image.mode == "RGB" and image.size == (96, 96)
            pixels = np.asarray(image, dtype=float)
        there = {item["cell"]: item for item in objects_of(row)}
        for cell in range(9):
            y, x = divmod(cell, 3)
            patch = pixels[y * 32 + 3 : y * 32 + 29, x * 32 + 3 : x * 32 + 29].reshape(-1, 3)
            bright = patch[patch.max(axis=1) > 110]  # the ground is darker than 75
            if cell not in there:
                assert len(bright) == 0, (row["scene"], cell)
                continue
            item = there[cell]
            distance = np.abs(pure - np.median(bright, axis=0)).sum(axis=1)
            assert names[int(distance.argmin())] == item["colour"], (row["scene"], cell)
            areas[item["shape"], item["size"]].append(len(bright))
    for shape in SHAPE.split("|"):
        assert max(areas[shape, "small"]) < min(areas[shape, "large"]), shape


def test_shapes_differ_on_the_image():
    masks = {}
    for shape in SHAPE.split("|"):
        item = scenes.SceneObject("white", shape, "large", 4)
        drawn = np.asarray(scenes.draw_scene([item], np.random.default_rng(0), image_size=48))[16:32, 16:32]
        masks[shape] = drawn.max(axis=2) > 150
    assert not masks["ring"][7:9, 7:9].any() and masks["circle"][7:9, 7:9].all()  # a ring has a hole
    for one in masks:
        for other in masks:
            assert one == other or (masks[one] ^ masks[other]).mean() > 0.05, (one, other)


def test_what_a_scene_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="one to four objects, not count=5"):
        scenes.sample_scene(np.random.default_rng(0), count=5)
    with pytest.raises(ValueError, match="unknown shape 'star'; the shapes are circle"):
        scenes.draw_scene([scenes.SceneObject("red", "star", "small", 0)], np.random.default_rng(0))


# ---- from the command line -----------------------------------------------------------------------------------


def test_help_and_a_small_set_from_the_command_line(tmp_path):
    from datasets import ClassLabel, load_dataset

    command = [sys.executable, "-m", "mllm_vision.data.scenes"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--questions_each" in done.stdout and "(default: 48)" in done.stdout

    small = {"train": 12, "validation": 5, "test": 6, "documents": 9, "image_size": 20, "seed": 3, "workers": 1}
    words = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    scenes.main(["--output_dir", str(tmp_path / "new" / "set"), *words])
    folder = tmp_path / "new" / "set"
    assert {path.name for path in folder.iterdir()} == {f"{name}.parquet" for name in scenes.SPLITS[:-1]} | {"text.txt"}
    assert len((folder / "text.txt").read_text().splitlines()) == 9
    rows = {"train": 12, "validation": 5, "test": 6, "unseen_test": 6}
    rows |= {"single_validation": 5, "single_test": 6, "single_unseen": 6}
    assert set(rows) | {"text"} == set(scenes.SPLITS)
    for split, count in rows.items():
        data = load_dataset(
            "parquet", data_files=str(folder / f"{split}.parquet"), cache_dir=str(tmp_path / "cache"), split="train"
        )
        assert len(data) == count and data[0]["image"].size == (20, 20)
        kept = {"image", "captions", "scene"}
        if split.startswith("single"):
            assert set(data.column_names) == kept | {"label", "label_name"}
            assert isinstance(data.features["label"], ClassLabel)
            assert data.features["label"].int2str(data[0]["label"]) == data[0]["label_name"]
        else:
            assert set(data.column_names) == kept | {"questions", "answers", "question_types"}
            row = scenes.make_row(1, seed=3, split=split, image_size=20)
            assert data[1]["scene"] == row["scene"] and data[1]["answers"] == row["answers"]


def test_the_set_is_read_like_any_other(tmp_path):
    from mllm_vision.data import bind_columns, load_image, load_records

    scenes.write_split(tmp_path / "train.parquet", 4, seed=0, split="train")
    records = load_records(str(tmp_path / "train.parquet"))
    roles = ("image", "caption", "question", "answer")
    columns = bind_columns(records, roles)
    assert columns == {"image": "image", "caption": "captions", "question": "questions", "answer": "answers"}
    assert load_image(records[0]["image"]).size == (48, 48)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train", "0"], "--train must be at least 1, not 0"),
        (["--image_size", "-3"], "--image_size must be at least 1, not -3"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--seed", "-1"], "--seed must not be negative, it is -1"),
        (["--train", "many"], "argument --train: invalid int value: 'many'"),
        (["--colours", "9"], "unrecognized arguments: --colours 9"),
        (["--output_dir", __file__], "is a file; name a folder"),
    ],
)
def test_bad_flags_are_said(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        scenes.main(["--output_dir", str(tmp_path / "out"), *flags])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
