"""Tables: CSV, JSON, Parquet and Arrow files and tars as Arrow tables; no row, column or word is lost on the way.

What cannot be parsed (a line, a member of a tar) is a row or cell without a value and is reported; it
counts as a bad row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mllm_vision.data.records.columns import TEXT_NAMES
from mllm_vision.data.records.readers.arrow import array_of, plain_types, readable, table_of, values_of
from mllm_vision.data.records.readers.csv_tables import csv_table, lines_of
from mllm_vision.data.records.readers.files import CHUNK, PACKED, LeftOut, kind_of, reading_as
from mllm_vision.data.records.readers.paths import ImagePaths
from mllm_vision.data.records.readers.tars import TarFile
from mllm_vision.data.records.sampling import BadRow


def read_table(path: Path, paths: ImagePaths, left_out: LeftOut) -> Iterator[pa.Table]:
    """The rows of a file, piece by piece, with absolute image paths.

    Raises:
        ValueError: the file is not what its name says; names it and what is wrong.
    """
    kind = kind_of(path.name)
    if kind in ("csv", "json"):
        tables = [csv_table(path, paths, left_out)] if kind == "csv" else _json_tables(path, paths, left_out)
        for table in tables:
            names = table.column_names
            if path.name.startswith("metadata.") and "file_name" in names and "image" not in names:
                table = table.rename_columns(["image" if name == "file_name" else name for name in names])
            yield table
    else:
        pieces = {"parquet": _parquet_tables, "arrow": _arrow_tables, "tar": _tar_tables}[kind](path, left_out)
        for piece in pieces:
            yield with_paths(plain_types(piece), paths)


# ---- JSON --------------------------------------------------------------------------------------------------------


def _json_tables(path: Path, paths: ImagePaths, left_out: LeftOut) -> Iterator[pa.Table]:
    rows = iter(_json_rows(path, left_out))
    while chunk := list(islice(rows, CHUNK)):
        yield _table(chunk, paths)


def _table(rows: list[dict[str, Any]], paths: ImagePaths) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: paths.column(name, [row.get(name) for row in rows]) for name in names}
    return table_of(columns, len(rows))


def _json_rows(path: Path, left_out: LeftOut) -> Iterable[dict[str, Any]]:
    lines = lines_of(path, left_out)
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
    return _line_rows(chain([first], lines), path, left_out)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its values are nested too deep") from error


def _line_rows(lines: Iterable[str], path: Path, left_out: LeftOut) -> Iterator[dict[str, Any]]:
    """A row for every line; a line that is not a JSON object has no values and is reported."""
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
        left_out.add(f"lines of {path.name} that are not JSON objects", f"line {number}: {fault}")
        yield {}
    if bad and bad >= good:
        raise ValueError(f"{path} cannot be read as JSON lines: {bad} of {good + bad} are not; {why}")


def _rows_of(value: Any, path: Path, left_out: LeftOut) -> Iterable[dict[str, Any]]:
    """The rows of a whole JSON file: a list of objects, an object of one such list, of columns, or COCO's captions."""
    if isinstance(value, dict):
        value = _list_in(value, path, left_out)
    if not isinstance(value, list):
        raise ValueError(f"{path} contains a {type(value).__name__}, not a list of rows (JSON objects)")
    wrong = [place for place, row in enumerate(value) if not isinstance(row, dict)]
    if wrong and len(wrong) == len(value):
        raise ValueError(f"{path} is a list of {type(value[0]).__name__}, not of rows (JSON objects)")
    if wrong:
        left_out.add(f"entries of {path.name} that are not JSON objects", f"entry {wrong[0]}", len(wrong))
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

    def bad(name: str, error: Exception) -> None:
        left_out.add(f"texts of {path.name} that are not UTF-8", f"{name}: {error}")

    with reading_as(path, "Parquet"):
        file = pq.ParquetFile(path, memory_map=True)
        yield file.schema_arrow.empty_table()
        for batch in file.iter_batches(batch_size=1024):
            yield readable(pa.Table.from_batches([batch]), bad)[0]


def _arrow_tables(path: Path, left_out: LeftOut) -> Iterator[pa.Table]:
    source = pa.memory_map(str(path))
    with reading_as(path, "Arrow"):
        try:
            opened = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            opened = pa.ipc.open_file(source)
        if isinstance(opened, pa.RecordBatchStreamReader) and not ends_whole(path):
            raise ValueError("it is cut off: its end has no mark")
        yield opened.read_all()


def ends_whole(path: Path) -> bool:
    """Whether a file of an Arrow stream has its end: without it pyarrow gives the rows before a cut, and no error."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 8))
        return stream.read() == b"\xff\xff\xff\xff\0\0\0\0"


def _tar_tables(path: Path, left_out: LeftOut) -> Iterator[pa.Table]:
    archive = TarFile(path, left_out)
    for group in range(len(archive.groups)):
        yield arrow_of(archive.read(group), left_out)


def arrow_of(rows: list[dict[str, Any]], left_out: LeftOut) -> pa.Table:
    """The samples of a tar as an Arrow table; what cannot be read has no value, and is reported."""
    for row in rows:
        for name, value in row.items():
            if isinstance(value, BadRow):
                left_out.add("members that cannot be read", value)
                row[name] = None
    names = list(dict.fromkeys(name for row in rows for name in row))
    return table_of({name: [row.get(name) for row in rows] for name in names}, len(rows))


def with_paths(table: pa.Table, paths: ImagePaths) -> pa.Table:
    """The table with absolute image paths, in columns of texts, lists and structs."""
    for place, field in enumerate(table.schema):
        if not may_hold_paths(field.type, field.name):
            continue
        column = table.column(place)
        if filled(column):
            continue  # the images are in the table
        values = values_of(column)
        changed = paths.column(field.name, values)
        if changed is not values:
            table = table.set_column(place, field, array_of(changed, field.type))
    return table


def filled(column: Any) -> bool:
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
