"""Folders: which of their files are tables and which images, of which split, and what classes the folders are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from mllm_vision.data.records.columns import ROLE_NAMES
from mllm_vision.data.records.readers.files import (
    WORDS,
    Found,
    LeftOut,
    common_folder,
    image_splits,
    kind_of,
    stem_of,
    table_splits,
)

_SURELY = 16 << 20  # bytes: a larger text is a table, and is not read twice to find out
_FORMATS = tuple(dict.fromkeys(("parquet", "json", "csv", "arrow", "tar")))  # of one table in several, the first


@dataclass(frozen=True)
class Contents:
    """What there is to read.

    Attributes:
        root: the folder all paths start from.
        images: whether the files are images; otherwise tables.
        splits: split -> files; one split "" where no name says a split.
        classes: the names of the class folders of all splits, in order; empty where there are none.
        base: the folder, below `root`, that holds the class folders, by split.
        loose: images beside the tables; some may not be named by any row.
    """

    root: Path
    images: bool
    splits: dict[str, list[str]]
    classes: tuple[str, ...] = ()
    base: dict[str, str] | None = None
    loose: tuple[str, ...] = ()


def contents(found: Found, asked: str, left_out: LeftOut) -> Contents:
    """What the files of a name are: tables where one of them is a table of our columns, otherwise images.

    Args:
        found: the files.
        asked: a split that may have another name than the usual ones.
        left_out: collects all other files, and those of no split.

    Raises:
        ValueError: nothing that can be read; says what there is.
    """
    kinds = {file: kind_of(file) for file in found.files}
    images = [file for file in found.files if kinds[file] == "image"]
    tables = [file for file in found.files if kinds[file] not in ("", "image")]
    for file in found.files:
        if not kinds[file] and (images or tables):
            left_out.add(f"files of another type ({PurePosixPath(file).suffix or 'without a suffix'})", file)
    empty = {file for file in tables if (found.root / file).stat().st_size == 0}
    if empty and len(empty) == len(tables) and not images:
        raise ValueError(f"{found.root / min(empty)} is empty (0 bytes)")
    for file in sorted(empty):
        left_out.add("empty files (0 bytes)", file)
    tables = [file for file in tables if file not in empty]
    if not found.named and (images or len(tables) > 1):
        tables = _meant(found, tables, images, left_out)
    if tables:
        return _of_tables(found, tables, images, asked, left_out)
    if images:
        return _of_images(found, images, left_out)
    suffixes = Counter(PurePosixPath(file).suffix or "none" for file in found.files)
    what = ", ".join(f"{suffix} ({count})" for suffix, count in suffixes.most_common(5)) or "nothing"
    raise ValueError(
        f"{found.root}: cannot read files of type {what}; give .parquet, .jsonl, .json, .csv, .tsv (also packed: .gz), "
        ".arrow, an uncompressed .tar, or a folder of images"
    )


def _meant(found: Found, tables: list[str], images: list[str], left_out: LeftOut) -> list[str]:
    """The tables of a folder that are meant to be read; the others are counted.

    Those are descriptions of single images (1.json beside 1.jpg), and tables without a known column where there are
    others, or images (dataset_infos.json, classes.csv).
    """
    stems = {file.rpartition(".")[0] for file in images}
    alone = [file for file in tables if file.rpartition(".")[0] not in stems]
    for file in tables:
        if file not in alone:
            left_out.add(f"{PurePosixPath(file).suffix} files that are called like the image beside them", file)
    not_ours = {file: _not_ours(found.root / file) for file in alone}
    if all(not_ours.values()) and not images:
        return alone
    for file, why in not_ours.items():
        if why:
            left_out.add("tables without a known column", f"{file}: {why}")
    return [file for file in alone if not not_ours[file]]


def _not_ours(path: Path) -> str:
    """Why a table is not meant to be read; "" where it has a column of ours, or one of image paths."""
    from mllm_vision.data.records.readers.paths import ImagePaths
    from mllm_vision.data.records.readers.tables import read_table

    if kind_of(path.name) in ("parquet", "arrow", "tar") or path.stat().st_size > _SURELY:
        return ""
    quiet = LeftOut()
    paths = ImagePaths(path.parent, quiet)
    try:
        first = next(iter(read_table(path, paths, quiet)), None)
    except FileNotFoundError:
        return ""  # of its images: said again where it is read
    except ValueError as error:
        return str(error)
    names = [] if first is None else first.column_names
    ours = any(name.lower() in ROLE_NAMES or paths.holds(name) for name in names)
    return "" if ours else f"its columns are {', '.join(names)}"


def _of_tables(found: Found, tables: list[str], images: list[str], asked: str, left_out: LeftOut) -> Contents:
    if found.named:
        return Contents(found.root, False, {"": tables}, loose=tuple(images))
    splits, others = table_splits(tables, asked)
    odd = [file for file in tables if re.search(rf"(^|[^a-z])({'|'.join(WORDS)})([^a-z]|$)", file.lower())]
    if odd and not splits:
        left_out.note(
            f"a word of a split in names like {odd[0]!r} is not a split: all {len(tables)} tables are one split"
        )
    for file in others if splits else []:
        left_out.add("tables whose names do not name a split", file)
    splits = {split: _one_format(files, left_out) for split, files in (splits or {"": tables}).items()}
    return Contents(found.root, False, splits, loose=tuple(images))


def _one_format(files: list[str], left_out: LeftOut) -> list[str]:
    """Of files that differ in their suffix only (train.parquet, train.csv) the first: they hold the same."""
    best: dict[str, str] = {}
    for file in files:
        stem = str(PurePosixPath(file).parent / stem_of(PurePosixPath(file).name))
        other = best.get(stem)
        if other is None or _FORMATS.index(kind_of(file)) < _FORMATS.index(kind_of(other)):
            best[stem] = file
    kept = set(best.values())
    for file in files:
        if file not in kept:
            left_out.add("tables with a copy in another format", file)
    return [file for file in files if file in kept]


def _of_images(found: Found, images: list[str], left_out: LeftOut) -> Contents:
    splits, others, prefix = ({}, images, common_folder(images)) if found.named else image_splits(images)
    for file in others if splits else []:
        left_out.add("images in folders of no split", file)
    splits = splits or {"": images}
    base = {}
    for split, files in splits.items():
        base[split] = common_folder(files) if split == "" else _split_base(files, prefix)
    tops: dict[str, None] = {}
    deep = False
    for split, files in splits.items():
        for file in files:
            top, _, rest = file[len(base[split]) :].partition("/")
            if rest:
                tops[top] = None
                deep |= "/" in rest
    classes = tuple(sorted(tops)) if len(tops) > 1 or (tops and len(splits) > 1) else ()
    if classes and deep:
        left_out.note(f"the classes are the {len(classes)} folders of the first level; folders inside them are ignored")
    return Contents(found.root, True, splits, classes, base)


def _split_base(files: Sequence[str], prefix: str) -> str:
    """The folder of a split; also the one folder in it that holds all its classes (train/images/cat/...)."""
    base = prefix + files[0][len(prefix) :].partition("/")[0] + "/"
    tops = {file[len(base) :].partition("/")[0] for file in files}
    if len(tops) == 1 and all(file[len(base) :].count("/") > 1 for file in files):
        return base + tops.pop() + "/"
    return base if all(file.startswith(base) for file in files) else prefix


def image_table(found: Contents, split: str, left_out: LeftOut) -> tuple[pa.Table, Any]:
    """(paths of the images and their class folders, the features) of one split; no image is opened."""
    from datasets import ClassLabel, Features, Image

    files = found.splits[split]
    paths = pa.array([str(found.root / file) for file in files], pa.string())
    images = pa.StructArray.from_arrays([pa.nulls(len(files), pa.binary()), paths], ["bytes", "path"])
    columns: dict[str, Any] = {"image": images}
    features: dict[str, Any] = {"image": Image(decode=False)}
    if found.classes:
        numbers = {name: number for number, name in enumerate(found.classes)}
        base = len((found.base or {}).get(split, ""))
        tops = [file[base:].partition("/") for file in files]
        labels = [numbers[top] if rest else None for top, _, rest in tops]
        without = labels.count(None)
        if without:
            left_out.note(f"{without} images are not in a class folder and have no label")
        columns["label"] = pa.array(labels, pa.int64())
        features["label"] = ClassLabel(names=list(found.classes))
    return pa.table(columns), Features(features)
