"""Text files: lines of any encoding, packed or not; and CSV, in which only an empty cell is missing."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mllm_vision.data.records.columns import IMAGE_NAMES, TEXT_NAMES
from mllm_vision.data.records.readers.files import CHUNK, IMAGES, PACKED, LeftOut, reading_as
from mllm_vision.data.records.readers.paths import ImagePaths
from mllm_vision.errors import short

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_INTEGER = r"^-?(0|[1-9][0-9]{0,17})$"
_NUMBER = r"^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?$"


# ---- texts -------------------------------------------------------------------------------------------------------


def _open(path: Path) -> Any:
    return _OPENERS.get(path.suffix.lower(), io.open)(path, "rb")


def lines_of(path: Path, left_out: LeftOut) -> Iterator[str]:
    """The lines of a text file with their ends: UTF-8, UTF-16 with its mark, or Latin-1 line by line."""
    foreign = 0
    with reading_as(path, "text"), _open(path) as stream:
        head = stream.read(3) if path.suffix.lower() in PACKED else stream.peek(3)[:3]
        if path.suffix.lower() in PACKED:
            stream.seek(0)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            yield from io.TextIOWrapper(stream, "utf-16", newline="\n")
            return
        if head == b"\xef\xbb\xbf":
            stream.read(3)
        for line in stream:
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError:
                foreign += 1
                yield line.decode("cp1252", "replace") if b"\x81" not in line else line.decode("latin-1")
    if foreign:
        left_out.note(f"{foreign} lines of {path.name} are not UTF-8 and are read as Latin-1 (Windows-1252)")


# ---- CSV ---------------------------------------------------------------------------------------------------------


def csv_table(path: Path, paths: ImagePaths, left_out: LeftOut) -> pa.Table:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines = lines_of(path, left_out)
    first = next((line for line in lines if line.strip()), "")
    if "\r" in first.rstrip("\r\n"):  # lines that end as on old Macs
        lines = (each for line in chain([first], lines) for each in line.splitlines(keepends=True))
        first = next(lines)
    comma = _separator(first, path, left_out)
    spaced = comma in first and first.count(comma) == first.count(f"{comma} ")  # `image, caption`: as the rows are then
    dialect: dict[str, Any] = {"delimiter": comma, "skipinitialspace": spaced}
    rows_of_cells = _cells(chain([first], lines), dialect, path, left_out)
    head = next(rows_of_cells, (0, []))
    if any(PurePosixPath(cell.strip().lower()).suffix in IMAGES for cell in head[1]):  # images, and no names of columns
        left_out.note(f"{path.name} has no header: its first line is {short(head[1])}")
        rows_of_cells = chain([head], rows_of_cells)
        head = (0, ["image" if PurePosixPath(cell.strip().lower()).suffix in IMAGES else "" for cell in head[1]])
    names = _unique(head[1], path, left_out)
    pieces: dict[str, list[pa.Array]] = {name: [] for name in names}
    every = _csv_rows(rows_of_cells, len(names), path, left_out)
    while rows := list(islice(every, CHUNK)):
        for place, name in enumerate(names):
            values = paths.column(name, [row[place] or None for row in rows])
            pieces[name].append(pa.array(values, pa.string()))
    return pa.table({name: _numbers(name, pa.chunked_array(found, pa.string())) for name, found in pieces.items()})


def _cells(
    lines: Iterable[str], dialect: dict[str, Any], path: Path, left_out: LeftOut
) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line, cells) of every row. A quote that nothing closes would swallow all rows up to the next
    one: where the quotes of a row of several lines are odd in number, its lines are read one by one.
    """
    comma, spaced = dialect["delimiter"], dialect["skipinitialspace"]
    lines = iter(lines)
    number = 0
    for line in lines:
        number += 1
        if '"' not in line:  # nearly all lines of nearly all files, many times as quick
            cells = line.rstrip("\r\n").split(comma)
            yield number, [cell.lstrip(" ") for cell in cells] if spaced else cells
            continue
        taken = [line]
        row = next(csv.reader(_noted(line, lines, taken), **dialect), [])
        number += len(taken) - 1
        if len(taken) > 1 and sum(each.count('"') for each in taken) % 2:
            start = number - len(taken) + 1
            left_out.note(f"a quote in line {start} of {path.name} is never closed")
            for place, each in enumerate(taken, start):
                yield place, [cell.rstrip("\r\n") for cell in next(csv.reader([each], **dialect), [])]
        else:
            yield number, row


def _noted(line: str, rest: Iterator[str], taken: list[str]) -> Iterator[str]:
    """The line and, for a cell that continues, those behind it; each of these is noted in `taken`."""
    yield line
    for each in rest:
        taken.append(each)
        yield each


def _csv_rows(rows: Iterable[tuple[int, list[str]]], width: int, path: Path, left_out: LeftOut) -> Iterator[list[str]]:
    """Rows of `width` cells: of fewer the last ones are missing, of more all are; both are reported."""
    for number, row in rows:
        if len(row) < 2 and not any(row):
            continue  # an empty line
        if len(row) > width and not any(row[width:]):
            row = row[:width]  # commas at the end
        if len(row) != width:
            left_out.add(
                f"rows of {path.name} with another number of cells than the {width} of its first line",
                f"line {number} has {len(row)}",
            )
            row = row + [""] * (width - len(row)) if len(row) < width else [""] * width
        yield row


def _separator(header: str, path: Path, left_out: LeftOut) -> str:
    """The separator of cells: a tab in a .tsv, a comma, or the one in the header if it has no comma."""
    usual = "\t" if ".tsv" in path.suffixes else ","
    bare = re.sub(r'"[^"]*"', "", header)
    if usual in bare:
        return usual
    other = max(",;\t|", key=bare.count)
    if bare.count(other) == 0:
        return usual
    left_out.note(f"the cells of {path.name} are separated by {other!r}, not {usual!r}")
    return other


def _unique(names: list[str], path: Path, left_out: LeftOut) -> list[str]:
    """The header's names without blanks around them, each once."""
    found: list[str] = []
    for place, name in enumerate(names):
        name = name.strip() or f"column_{place}"
        number = 1
        while name in found:
            name, number = f"{names[place].strip()}.{number}", number + 1
            left_out.note(f"{path.name} has two columns {names[place].strip()!r}; the second is read as {name!r}")
        found.append(name)
    return found


def _numbers(name: str, texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of a CSV as numbers, where each of its cells is one and its name is not that of texts or paths."""
    words = TEXT_NAMES - {"label", "labels", "class", "fine_label", "category", "target", "cls"}
    if name.lower() in words or name.lower() in IMAGE_NAMES or texts.null_count == len(texts):
        return texts
    if pc.all(pc.match_substring_regex(texts, _INTEGER), skip_nulls=True).as_py():
        return texts.cast(pa.int64())
    if pc.all(pc.match_substring_regex(texts, _NUMBER), skip_nulls=True).as_py():
        return texts.cast(pa.float64())
    return texts
