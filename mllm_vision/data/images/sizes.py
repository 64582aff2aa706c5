"""The sizes of all images of a column, read once from their headers for all processes of a machine."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mllm_vision.data.images.decoding import image_size
from mllm_vision.data.images.files import images_of, is_path
from mllm_vision.data.records.cache import cached
from mllm_vision.data.records.sampling import BadRow, judge, only_columns

logger = logging.getLogger(__name__)

_IN_MEMORY = 2000  # rows; the headers of fewer are read in every process
_ROWS = 64  # that a worker reads at once
_WORKERS = 16  # processes, at most
_FILES = ("sizes.py", "decoding.py", "files.py")  # of this folder: what sizes depend on
UNREADABLE = (-1, -1)


def column_sizes(records: Any, column: str, progress: bool = True) -> Any:
    """The sizes of the images of every row, as a `pyarrow.Table` of as many rows.

    Columns: "sizes", (height, width) of one image after the other, see `image_size`; "reason" and "example", of the
    first image of the row that cannot be read, whose size is (-1, -1). A `datasets.Dataset` of more than 2,000 rows is
    read by several processes into the folder `mllm_vision` of the cache of `datasets`, under a hash of the images'
    paths, the times and sizes of their files and the lengths of images inside the table.

    Raises:
        OSError: the cache cannot be written.
    """
    import pyarrow as pa

    chosen = only_columns(records, [column])
    if not hasattr(records, "features") or len(records) <= _IN_MEMORY:
        return pa.concat_tables(_tables(_Headers(chosen, column), 0, False))

    def use(stem: Path) -> Any:
        file = stem.with_name(f"{stem.name}.arrow")
        if not file.is_file():
            part = file.with_suffix(".part")
            with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, _schema()) as stream:
                for table in _tables(_Headers(chosen, column), _workers(len(records)), progress):
                    stream.write_table(table)
            os.replace(part, file)
        return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()

    return cached(f"sizes-{_key(chosen, column)}", use, "the sizes of the images")


def of_row(found: dict[str, Any]) -> tuple[np.ndarray, BadRow | None]:
    """(sizes `[images, 2]`, why one of them is unknown) of a row of `column_sizes`."""
    bad = None
    if found["reason"] is not None:
        bad = BadRow(found["example"])
        bad.reason = found["reason"]
    return np.asarray(found["sizes"], dtype=np.int64).reshape(-1, 2), bad


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema([("sizes", pa.list_(pa.int32())), ("reason", pa.string()), ("example", pa.string())])


class _Headers(torch.utils.data.Dataset):
    """Runs of rows as tables of their images' sizes."""

    def __init__(self, records: Any, column: str) -> None:
        self.records, self.column = records, column

    def __len__(self) -> int:
        return -(-len(self.records) // _ROWS)

    def __getitem__(self, run: int) -> Any:
        import pyarrow as pa

        rows = range(run * _ROWS, min((run + 1) * _ROWS, len(self.records)))
        return pa.Table.from_pylist([self._row(self.records[row][self.column]) for row in rows], schema=_schema())

    def _row(self, cell: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"sizes": [], "reason": None, "example": None}
        for value in images_of(cell):
            size = judge("an image", image_size, value)
            if isinstance(size, BadRow):
                if found["reason"] is None:
                    found |= {"reason": size.reason, "example": str(size).removeprefix("an image: ")}
                size = UNREADABLE
            found["sizes"] += size
        return found


def _workers(rows: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    workers = min(_WORKERS, cores, rows // 5000)
    return workers if workers > 1 else 0


def _tables(headers: _Headers, workers: int, progress: bool) -> Iterator[Any]:
    """The tables of all runs of rows in their order; `datasets` draws the bar, and can be kept from it."""
    import datasets

    # Worker processes inherit the mapped table, of which pickling would copy every image. The loader's seed is of a
    # generator of its own, so that a run that reads sizes and one that finds them have the same random numbers.
    runs: Any = torch.utils.data.DataLoader(
        headers, batch_size=None, shuffle=False, num_workers=workers, generator=torch.Generator()
    )
    shown = datasets.utils.tqdm(total=len(headers.records), desc="reading sizes of images", disable=not progress)
    with shown as bar:
        for table in runs:
            yield table
            bar.update(len(table))


def _key(chosen: Any, column: str) -> str:
    """A hash of what tells the column's images apart, without reading them."""
    mark = hashlib.blake2b(digest_size=16)
    for name in _FILES:
        mark.update((Path(__file__).parent / name).read_bytes())
    mark.update(repr(chosen.features).encode())
    # The whole table with the numbers of the chosen rows (`datasets` 5.2.0): choosing them would copy their images.
    for chunk in chosen.data.table.column(column).chunks:
        for values in _marks(chunk):
            _update(mark, values)
    if chosen._indices is not None:
        mark.update(np.asarray(chosen._indices.column(0)).tobytes())
    return mark.hexdigest()


def _marks(values: Any) -> Iterator[Any]:
    """Arrow arrays of lists' lengths, images' lengths in bytes, and texts."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = values.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield pc.list_value_length(values)
        yield from _marks(pc.list_flatten(values))
    elif pa.types.is_struct(kind):
        for field in kind:
            yield from _marks(pc.struct_field(values, field.name))
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        yield pc.binary_length(values)
    else:
        yield values


def _update(mark: Any, values: Any) -> None:
    """Hashes an array; of texts that are paths the files' sizes and times too."""
    import pyarrow as pa

    mark.update(pa.record_batch([values], ["values"]).serialize())
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        for text in values.to_pylist():
            if text and is_path(text):
                try:
                    state = os.stat(text)
                except OSError:
                    mark.update(b"-")
                else:
                    mark.update(f"{state.st_size} {state.st_mtime_ns} ".encode())
