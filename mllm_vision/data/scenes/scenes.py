"""Scenes: images of one to four coloured shapes, with captions, questions and answers, drawn from a seed.

The embedded data set of the toolkit: it needs no download, an image costs under a millisecond, and everything that
is true of an image is known, so every caption and answer is right. It is written as the same Parquet files that
users bring (Hugging Face features included):

===========================  =================================================================================
``train / validation /       ``image, captions, questions, answers, question_types, scene``; colour-shape pairs of
test.parquet``               :func:`unseen_pairs` never occur in them
``unseen_test.parquet``      the same columns; every image holds an object of an unseen colour-shape pair, and its
                             questions ask about that object wherever the type allows
``single_validation /
single_test.parquet``        ``image, captions, label, label_name``: one object, labels are colour x shape
``single_unseen.parquet``    the same for the unseen pairs only
``text.txt``                 one document a line: what a language model reads before it ever sees an image
===========================  =================================================================================

Answers are balanced within a question's wording (a yes/no question is "yes" half of the time, and where it asks for a
colour and a shape, "no" mostly means that both are in the image, only not on one object), so a model that reads the
question and not the image stays near what chance allows.

``python -m mllm_vision.data.scenes --output_dir scenes --train 20000``
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mllm_vision.data.scenes.objects import (
    SceneObject,
    all_pairs,
    class_names,
    draw_scene,
    sample_scene,
    seen_pairs,
    unseen_pairs,
)
from mllm_vision.data.scenes.words import QUESTION_TYPES, captions, questions

__all__ = [
    "QUESTION_TYPES",
    "SPLITS",
    "SceneObject",
    "all_pairs",
    "class_names",
    "draw_scene",
    "make_document",
    "make_row",
    "sample_scene",
    "seen_pairs",
    "unseen_pairs",
    "write_split",
    "write_text",
]

SPLITS: tuple[str, ...] = (
    "train", "validation", "test", "unseen_test", "single_validation", "single_test", "single_unseen", "text",
)  # fmt: skip


def row_generator(seed: int, split: str, index: int) -> np.random.Generator:
    """The random numbers of one row: from (seed, split, row) alone, whoever draws it and in whatever order."""
    return np.random.default_rng([seed, SPLITS.index(split), index])


def make_row(index: int, *, seed: int, split: str, image_size: int = 48, questions_each: int = 6) -> dict[str, Any]:
    """One row of a split, from (seed, split, index) alone."""
    rng = row_generator(seed, split, index)
    single = split.startswith("single")
    unseen = split in ("unseen_test", "single_unseen")
    objects = sample_scene(rng, unseen=unseen, count=1 if single else None)
    image = io.BytesIO()
    draw_scene(objects, rng, image_size=image_size).save(image, format="PNG", compress_level=1)
    row: dict[str, Any] = {
        "image": {"bytes": image.getvalue(), "path": None},
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
    """One line of text: a description of a scene, then questions about it with their answers."""
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
        description="Write the Scenes data set: Parquet files of images with captions and questions, and a text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="where the files go")
    parser.add_argument("--train", type=int, default=20000, help="training images")
    parser.add_argument("--validation", type=int, default=500, help="validation images")
    parser.add_argument("--test", type=int, default=1000, help="test images, of each of the test files")
    parser.add_argument("--documents", type=int, default=30000, help="lines of text for the language model")
    parser.add_argument("--image_size", type=int, default=48, help="width and height in pixels")
    parser.add_argument("--questions_each", type=int, default=6, help="questions asked about an image")
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
