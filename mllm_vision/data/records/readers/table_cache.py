"""Many files as one table: in memory where they are small, otherwise written once as Arrow and mapped from the disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from mllm_vision.data.records.cache import cached
from mllm_vision.data.records.readers.arrow import united
from mllm_vision.data.records.readers.files import LeftOut, kind_of
from mllm_vision.data.records.readers.paths import ImagePaths
from mllm_vision.data.records.readers.tables import read_table

IN_MEMORY = 64 << 20  # bytes of rows; files beyond them become Arrow files in the cache of `datasets`
_FORMAT = 2  # of what is cached; raise it where a change here or in the readers gives other rows
_SAMPLED = 64 << 10  # bytes at both ends of a file that its fingerprint is of, and all of a smaller one


def read_tables(root: Path, files: Sequence[str], image_root: Path | None, left_out: LeftOut) -> Any:
    """The rows of all files as a `datasets.Dataset`.

    Args:
        root, files: the folder and the paths below it.
        image_root: where relative image paths start; None: each file's own folder.
        left_out: collects all that is not read.

    Raises:
        ValueError: a file that cannot be read as what its name says; none has rows.
    """
    from datasets import Dataset, DatasetInfo

    size = 0
    tables: list[tuple[str, pa.Table]] = []
    for file in files:
        own = LeftOut()
        path = root / file
        rest = read_table(path, ImagePaths(image_root or path.parent, own), own)
        pieces: list[pa.Table] = []
        for piece in rest:
            pieces.append(piece)
            size += piece.nbytes
            if size > IN_MEMORY and kind_of(file) != "arrow":
                pieces, own = _mapped(path, image_root, chain(pieces, rest), own)
                break
        left_out.merge(own)
        if not any(piece.num_rows for piece in pieces):
            left_out.add("files without rows", file)
        tables += [(file, piece) for piece in pieces]
    if not any(table.num_rows for _, table in tables):
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise ValueError(f"{root / files[0]}{more} is empty: it has no rows")
    mark = fingerprint(ends_of(root / file, file) for file in files)
    table, features = united(tables, left_out)
    return Dataset(table, info=DatasetInfo(features=features), fingerprint=mark)


def fingerprint(contents: Iterable[bytes]) -> str:
    """A hash of a data set's content, 16 hexadecimal digits, independent of its location."""
    mark = hashlib.blake2b(digest_size=8)
    for data in contents:
        mark.update(len(data).to_bytes(8, "little") + data)
    return mark.hexdigest()


def ends_of(path: Path, name: str) -> bytes:
    """A file's name, size and both ends: enough to notice one that was changed, quick for terabytes of them."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        head = stream.read(_SAMPLED)
        stream.seek(max(len(head), size - _SAMPLED))
        return f"{name} {size}".encode() + head + stream.read()


def _mapped(
    path: Path, image_root: Path | None, pieces: Iterable[pa.Table], left_out: LeftOut
) -> tuple[list[pa.Table], LeftOut]:
    """(the pieces from the Arrow files that were written of them, now or earlier, what was left out then); pieces of
    one schema share a file."""
    state = path.stat()
    key = fingerprint(
        str(each).encode() for each in (_FORMAT, path.resolve(), state.st_size, state.st_mtime_ns, image_root)
    )

    def use(stem: Path) -> tuple[list[pa.Table], LeftOut]:
        note = Path(f"{stem}.json")
        if not note.is_file():
            count = _write(stem, pieces)
            partial = note.with_suffix(".partial")
            partial.write_text(json.dumps({"files": count, "left_out": left_out.state()}), encoding="utf-8")
            os.replace(partial, note)
        found = json.loads(note.read_text(encoding="utf-8"))
        files = [Path(f"{stem}-{number}.arrow") for number in range(found["files"])]
        return [_map(file) for file in files], LeftOut.of(found["left_out"])

    return cached(key, use, f"the rows of {path}")


def _write(stem: Path, pieces: Iterable[pa.Table]) -> int:
    """Writes Arrow files stem-0.arrow, stem-1.arrow ..., a new one where the schema changes; how many there are."""
    number, schema = 0, None
    writer: Any = None
    for piece in pieces:
        if not piece.num_rows and writer is not None:
            continue
        if schema is None or piece.schema != schema:
            if writer is not None:
                writer.close()
            schema = piece.schema
            writer = pa.ipc.new_stream(f"{stem}-{number}.arrow", schema)
            number += 1
        writer.write_table(piece)
    if writer is not None:
        writer.close()
    return number


def _map(path: Path) -> pa.Table:
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
