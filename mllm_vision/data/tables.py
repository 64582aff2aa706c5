"""Tables: CSV, JSON, Parquet and Arrow files and tars as Arrow tables; no row, column or word is lost on the way.

Texts stay texts: of a CSV only an empty cell is missing, and a column is of numbers only where every cell is one. What
cannot be parsed (a line, a member of a tar) is a row or cell without a value and is told; the judge of rows counts it.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from .arrow import array_of, plain_types, table_of, values_of
from .columns import IMAGE_NAMES, TEXT_NAMES
from .files import PACKED, LeftOut, kind_of
from .paths import ImagePaths
from .sampling import BadRow
from .tars import TarFile

_CHUNK = 8192  # rows that become Arrow at once
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_INTEGER = r"^-?(0|[1-9][0-9]{0,17})$"
_NUMBER = r"^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?$"


def read_table(path: Path, paths: ImagePaths, left_out: LeftOut) -> Iterator[pa.Table]:
    """The rows of a file, piece by piece, with absolute image paths.

    Raises:
        ValueError: the file is not what its name says; names it and what is wrong.
    """
    kind = kind_of(path.name)
    if kind in ("csv", "json"):
        tables = [_csv_table(path, paths, left_out)] if kind == "csv" else _json_tables(path, paths, left_out)
        for table in tables:
            names = table.column_names
            if path.name.startswith("metadata.") and "file_name" in names and "image" not in names:
                table = table.rename_columns(["image" if name == "file_name" else name for name in names])
            yield table
    else:
        pieces = {"parquet": _parquet_tables, "arrow": _arrow_tables, "tar": _tar_tables}[kind](path, left_out)
        for piece in pieces:
            yield with_paths(plain_types(piece), paths)


# ---- texts -------------------------------------------------------------------------------------------------------


def _open(path: Path) -> Any:
    return _OPENERS.get(path.suffix.lower(), io.open)(path, "rb")


def _lines(path: Path, left_out: LeftOut) -> Iterator[str]:
    """The lines of a text file with their ends: UTF-8, UTF-16 with its mark, or Latin-1 line by line."""
    foreign = 0
    try:
        with _open(path) as stream:
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
    except (EOFError, OSError, lzma.LZMAError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} cannot be read: {error}") from error
    if foreign:
        left_out.note(f"{foreign} lines of {path.name} are no UTF-8 and are read as Latin-1 (Windows-1252)")


# ---- CSV ---------------------------------------------------------------------------------------------------------


def _csv_table(path: Path, paths: ImagePaths, left_out: LeftOut) -> pa.Table:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines = _lines(path, left_out)
    first = next((line for line in lines if line.strip()), "")
    comma = _separator(first, path, left_out)
    spaced = comma in first and first.count(comma) == first.count(f"{comma} ")  # `image, caption`: as the rows are then
    dialect: dict[str, Any] = {"delimiter": comma, "skipinitialspace": spaced}
    rows_of_cells = _cells(_chain(first, lines), dialect, path, left_out)
    names = _unique(next(rows_of_cells, (0, []))[1], path, left_out)
    pieces: dict[str, list[pa.Array]] = {name: [] for name in names}
    every = _csv_rows(rows_of_cells, len(names), path, left_out)
    while rows := list(islice(every, _CHUNK)):
        for place, name in enumerate(names):
            values = paths.column(name, [row[place] or None for row in rows])
            pieces[name].append(pa.array(values, pa.string()))
    return pa.table({name: _numbers(name, pa.chunked_array(found, pa.string())) for name, found in pieces.items()})


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _cells(
    lines: Iterable[str], dialect: dict[str, Any], path: Path, left_out: LeftOut
) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line, cells) of every row. A quote that nothing closes would swallow all rows up to the next
    one: where the quotes of a row of several lines are odd in number, its lines are read one by one.
    """
    taken: list[str] = []

    def noted() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line

    reader = csv.reader(noted(), **dialect)
    for row in reader:
        if len(taken) > 1 and sum(line.count('"') for line in taken) % 2:
            left_out.note(f"a quote in line {reader.line_num - len(taken) + 1} of {path.name} is never closed")
            for place, line in enumerate(taken, reader.line_num - len(taken) + 1):
                yield from ((place, [cell.rstrip("\r\n") for cell in each]) for each in csv.reader([line], **dialect))
        else:
            yield reader.line_num, row
        taken.clear()


def _csv_rows(rows: Iterable[tuple[int, list[str]]], width: int, path: Path, left_out: LeftOut) -> Iterator[list[str]]:
    """Rows of `width` cells; one with fewer or more of them has no values, and is told."""
    for number, row in rows:
        if not row:
            continue
        if len(row) > width and not any(row[width:]):
            row = row[:width]  # commas at the end
        if len(row) != width:
            left_out.add(
                f"rows of {path.name} with another number of cells than the {width} of its first line",
                f"line {number} has {len(row)}",
            )
            row = [""] * width
        yield row


def _separator(header: str, path: Path, left_out: LeftOut) -> str:
    """What separates the cells: a tab in a .tsv, a comma, or what stands in the header where no comma does."""
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


# ---- JSON --------------------------------------------------------------------------------------------------------


def _json_tables(path: Path, paths: ImagePaths, left_out: LeftOut) -> Iterator[pa.Table]:
    rows = iter(_json_rows(path, left_out))
    while chunk := list(islice(rows, _CHUNK)):
        yield _table(chunk, paths)


def _table(rows: list[dict[str, Any]], paths: ImagePaths) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: paths.column(name, [row.get(name) for row in rows]) for name in names}
    return table_of(columns, len(rows))


def _json_rows(path: Path, left_out: LeftOut) -> Iterable[dict[str, Any]]:
    lines = _lines(path, left_out)
    first = next((line for line in lines if line.strip()), "")
    start = first.lstrip()[:1]
    suffix = path.with_suffix("").suffix if path.suffix.lower() in PACKED else path.suffix
    if start == "[" or suffix.lower() == ".json":
        text = first + "".join(lines)
        try:
            value = _loads(text)
        except ValueError as error:
            if "Extra data" not in str(error):
                raise ValueError(f"{path} cannot be read as JSON: {error}") from error
        else:
            return _rows_of(value, path, left_out)
        first, lines = "", iter(text.splitlines(keepends=True))  # an object a line, under the name of .json
    return _line_rows(_chain(first, lines), path, left_out)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its values are nested too deep") from error


def _line_rows(lines: Iterable[str], path: Path, left_out: LeftOut) -> Iterator[dict[str, Any]]:
    """A row for every line; one that is no JSON object has no values, and is told."""
    good = bad = 0
    why = ""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = None
        try:
            row = _loads(line)
            fault = f"it is a {type(row).__name__}, not an object"
        except ValueError as error:
            fault = str(error)
        if isinstance(row, dict):
            good += 1
            yield row
            continue
        bad, why = bad + 1, why or f"line {number}: {fault}"
        left_out.add(f"lines of {path.name} that are no JSON object", f"line {number}: {fault}")
        yield {}
    if bad and bad >= good:
        raise ValueError(f"{path} cannot be read as JSON lines: {bad} of {good + bad} are none; {why}")


def _rows_of(value: Any, path: Path, left_out: LeftOut) -> Iterable[dict[str, Any]]:
    """The rows of a whole JSON file: a list of objects, an object of one such list, of columns, or COCO's captions."""
    if isinstance(value, dict):
        value = _list_in(value, path, left_out)
    if not isinstance(value, list):
        raise ValueError(f"{path} holds a {type(value).__name__}, and not a list of rows (JSON objects)")
    wrong = [place for place, row in enumerate(value) if not isinstance(row, dict)]
    if wrong and len(wrong) == len(value):
        raise ValueError(f"{path} is a list of {type(value[0]).__name__}, and not of rows (JSON objects)")
    if wrong:
        left_out.add(f"entries of {path.name} that are no JSON object", f"entry {wrong[0]}", len(wrong))
    return [row if isinstance(row, dict) else {} for row in value]


def _list_in(value: dict[str, Any], path: Path, left_out: LeftOut) -> Any:
    if isinstance(value.get("images"), list) and isinstance(value.get("annotations"), list):
        return _coco_captions(value, path, left_out)
    lists = {name: each for name, each in value.items() if isinstance(each, list)}
    rows = {name: each for name, each in lists.items() if each and isinstance(each[0], dict)}
    if len(rows) == 1:
        [name] = rows
        others = ", ".join(map(repr, (other for other in value if other != name)))
        if others:
            left_out.note(f"of {path.name} the list {name!r} is read, and not {others}")
        return rows[name]
    if lists and len(lists) == len(value) and not rows and len({len(each) for each in lists.values()}) == 1:
        return [dict(zip(lists, each, strict=True)) for each in zip(*lists.values(), strict=True)]
    tables = [each for each in value.values() if isinstance(each, dict)]
    if tables and len(tables) == len(value) and all(each.keys() == tables[0].keys() for each in tables):
        return [{name: each[key] for name, each in value.items()} for key in tables[0]]  # as pandas writes
    if not lists:
        return [value]  # one row
    raise ValueError(
        f"{path} is a JSON object with {len(rows)} lists of rows ({', '.join(map(repr, list(rows)[:8])) or 'none'}); "
        "write the rows that are meant as a list, or one a line (.jsonl)"
    )


def _coco_captions(value: dict[str, Any], path: Path, left_out: LeftOut) -> list[dict[str, Any]]:
    """COCO's caption annotations: a row for every image, with all its captions."""
    if not any(isinstance(each, dict) and "caption" in each for each in value["annotations"]):
        raise ValueError(
            f"{path} holds COCO annotations without captions (boxes or masks), which no recipe reads; write a table "
            "with a row for every image and its caption or label"
        )
    captions: dict[Any, list[str]] = {}
    for each in value["annotations"]:
        captions.setdefault(each.get("image_id"), []).append(each.get("caption"))
    rows = [
        {"image": each.get("file_name"), "captions": captions.pop(each.get("id"), [])}
        for each in value["images"]
        if isinstance(each, dict)
    ]
    left_out.note(f"{path.name} is read as COCO captions: {len(rows)} images with their captions")
    if captions:
        left_out.add(f"captions of {path.name} whose image is not listed", next(iter(captions)), len(captions))
    return rows


# ---- Parquet, Arrow, tar -----------------------------------------------------------------------------------------


def _parquet_tables(path: Path, left_out: LeftOut) -> Iterator[pa.Table]:
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, memory_map=True)
        yield file.schema_arrow.empty_table()
        for batch in file.iter_batches(batch_size=1024):
            yield pa.Table.from_batches([batch])
    except (OSError, ValueError, NotImplementedError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def _arrow_tables(path: Path, left_out: LeftOut) -> Iterator[pa.Table]:
    source = pa.memory_map(str(path))
    try:
        try:
            opened = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            opened = pa.ipc.open_file(source)
        yield opened.read_all()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as Arrow: {error}") from error


def _tar_tables(path: Path, left_out: LeftOut) -> Iterator[pa.Table]:
    archive = TarFile(path, left_out)
    for group in range(len(archive.groups)):
        yield arrow_of(archive.read(group), left_out)


def arrow_of(rows: list[dict[str, Any]], left_out: LeftOut) -> pa.Table:
    """The samples of a tar as an Arrow table; what cannot be read has no value, and is told."""
    for row in rows:
        for name, value in row.items():
            if isinstance(value, BadRow):
                left_out.add("members that cannot be read", value)
                row[name] = None
    names = list(dict.fromkeys(name for row in rows for name in row))
    return table_of({name: [row.get(name) for row in rows] for name in names}, len(rows))


def with_paths(table: pa.Table, paths: ImagePaths) -> pa.Table:
    """The table with absolute image paths, in columns of texts, lists and structs alike."""
    for place, field in enumerate(table.schema):
        if not may_hold_paths(field.type, field.name):
            continue
        column = table.column(place)
        if _filled(column):
            continue  # the images are in the table
        values = values_of(column)
        changed = paths.column(field.name, values)
        if changed is not values:
            table = table.set_column(place, field, array_of(changed, field.type))
    return table


def _filled(column: Any) -> bool:
    """Whether a column of images has all their bytes."""
    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pc.list_flatten(column)
    if not pa.types.is_struct(column.type) or "bytes" not in column.type.names:
        return False
    return pc.struct_field(column, "bytes").null_count == column.null_count


def may_hold_paths(kind: pa.DataType, name: str) -> bool:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return name.lower() not in TEXT_NAMES
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return may_hold_paths(kind.value_type, name)
    if pa.types.is_struct(kind):
        return any(may_hold_paths(kind.field(place).type, kind.field(place).name) for place in range(kind.num_fields))
    return isinstance(kind, pa.JsonType)
