"""Shards of a streamed data set: Parquet files and WebDataset tars, read a group of rows at a time.

A shard knows how many rows each of its groups holds before any of them is read (a
Parquet footer, a pass over a tar's headers), which is what makes the order of a stream a matter of numbers alone.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_vision.data.records.readers.arrow import plain_types, readable, undecoded
from mllm_vision.data.records.readers.files import LeftOut, find, kind_of, reading_as, table_splits, usual_name
from mllm_vision.data.records.readers.hub_files import not_on_hub
from mllm_vision.data.records.readers.tables import arrow_of
from mllm_vision.data.records.readers.tars import TarFile
from mllm_vision.data.records.sampling import BadRow

SUFFIXES = (".parquet", ".tar")


class Shard:
    """One file of a stream. `Shard(...)` is cheap: the file is opened (or fetched from the Hub) at the first use.

    Args:
        path: a local path, or the path inside a Hub data set.
        repo_id, revision: of the Hub data set, if it is one; the file is fetched into the usual cache when needed.

    Raises:
        ValueError: the file is neither Parquet nor an uncompressed tar, or it cannot be read as such.
    """

    def __init__(self, path: str | Path, *, repo_id: str | None = None, revision: str | None = None) -> None:
        self.path, self.repo_id, self.revision = str(path), repo_id, revision
        self.kind = kind_of(self.path)
        if self.kind not in ("parquet", "tar"):
            raise ValueError(
                f"{self.path}: only Parquet files and uncompressed WebDataset tars can be streamed "
                f"({', '.join(SUFFIXES)}); train on it without --streaming, or write it as Parquet"
            )
        self.left_out = LeftOut()
        self._opened: Any = None

    @property
    def name(self) -> str:
        """The shard's name in a saved state: its path, without the machine's folders."""
        return f"{self.repo_id}/{self.path}" if self.repo_id else "/".join(Path(self.path).parts[-2:])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # worker processes open the file themselves

    @property
    def local(self) -> bool:
        """Whether the file is on this machine."""
        return self.repo_id is None

    def file(self) -> Path:
        """The file on this machine, fetched from the Hub if it is there."""
        if self.repo_id is None:
            return Path(self.path)
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.repo_id, self.path, repo_type="dataset", revision=self.revision))

    @property
    def opened(self) -> ParquetFile | TarFile:
        """The reader of the file's groups."""
        if self._opened is None:
            self._opened = ParquetFile(self.file()) if self.kind == "parquet" else TarFile(self.file(), self.left_out)
            self.left_out.report(self.name)
        return self._opened

    @property
    def groups(self) -> list[int]:
        """How many rows each group holds."""
        return self.opened.groups

    @property
    def rows(self) -> int:
        """How many rows the shard holds."""
        return sum(self.groups)

    def read(self, group: int, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The rows of one group as dicts, images undecoded; only `columns` where they are named.

        A column that the shard does not have is None in its rows; a value that cannot be read is a `BadRow`.
        """
        opened = self.opened
        if self.kind == "parquet" and columns is not None:
            for name in columns:
                if name not in opened.columns:
                    self.left_out.note(f"its {self.rows} rows have no column {name!r}")
            self.left_out.report(self.name)
        rows = opened.read(group, columns)
        return rows if columns is None else [{name: row.get(name) for name in columns} for row in rows]

    def head(self, count: int) -> Any:
        """The first rows as an Arrow table; a value that cannot be read is null."""
        import pyarrow as pa

        opened = self.opened
        if isinstance(opened, ParquetFile):
            return opened.head(count)
        return arrow_of(opened.read(0)[:count], LeftOut()) if self.groups else pa.table({})


class ParquetFile:
    """The row groups of a Parquet file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handles = threading.local()
        with reading_as(path, "Parquet"):
            metadata = self._file.metadata
        self.groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self.columns = list(self._file.schema_arrow.names)
        self._features = _features(self._file.schema_arrow)

    @property
    def _file(self) -> Any:
        """A handle for each thread, which Arrow wants; without threads of its own, which would not survive a fork."""
        import pyarrow.parquet as pq

        if not hasattr(self._handles, "file"):
            self._handles.file = pq.ParquetFile(self.path, memory_map=True, pre_buffer=False)
        return self._handles.file

    def read(self, group: int, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The rows of a row group."""
        wanted = None if columns is None else [name for name in columns if name in self.columns]
        try:
            table = self._file.read_row_group(group, columns=wanted, use_threads=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path}: row group {group} cannot be read: {error}") from error
        if not table.num_columns:
            return [{} for _ in range(self.groups[group])]
        table, odd = readable(plain_types(table), lambda name, error: BadRow(f"{name} is not UTF-8", str(error)))
        rows = table.to_pylist()
        for name, values in odd.items():
            for row, value in zip(rows, values, strict=True):
                row[name] = value
        for name in table.column_names if self._features is not None else ():
            given = type(self._features)({name: self._features[name]})
            for row in rows:
                row[name] = self._decoded(given, name, row[name])
        return rows

    def _decoded(self, given: Any, name: str, value: Any) -> Any:
        """A value of a column of JSON, or what is wrong with it."""
        try:
            return given.decode_example({name: value})[name]
        except (ValueError, TypeError) as error:
            return BadRow(f"{name} cannot be parsed", f"{self.path.name}: {error}")

    def head(self, count: int) -> Any:
        """The first rows as an Arrow table; no rows where the file has none."""
        import pyarrow as pa

        batch = next((each for each in self._file.iter_batches(batch_size=count) if each.num_rows), None)
        table = self._file.schema_arrow.empty_table() if batch is None else pa.Table.from_batches([batch])
        return plain_types(table)


def _features(schema: Any) -> Any:
    """The features that need decoding (JSON inside strings), or None where the Arrow values need no decoding."""
    if "arrow.json" not in str(schema) and b'"Json"' not in (schema.metadata or {}).get(b"huggingface", b""):
        return None
    from datasets import Features

    return Features({name: undecoded(feature) for name, feature in Features.from_arrow_schema(schema).items()})


def find_shards(name: str | Path, split: str = "train", *, revision: str | None = None) -> list[Shard]:
    """The shards of a local file, pattern or folder, or of a Hub data set, in order of their names.

    Args:
        name: a `.parquet` or `.tar` file; a pattern (`*`, `?`, `[..]`, `{000..127}`); a folder, of which the
            files that name the split are taken, or all where none does; or a Hub data set's id.
        split: "train", "validation" or "test", or any word that file names may hold.

    Raises:
        FileNotFoundError: nothing is there. ValueError: a file that cannot be streamed, an empty name.
    """
    if "[" in split:
        raise ValueError(f"split={split!r}: a stream takes whole splits; use --max_steps to read less of one")
    left_out = LeftOut()
    found = find(name, left_out)
    if found is None:
        return _on_hub(str(name).strip(), split, revision)
    if found.named and len(found.files) == 1:
        return [Shard(found.root / found.files[0])]
    files = [file for file in found.files if kind_of(file) in ("parquet", "tar")]
    for file in found.files:
        if kind_of(file) not in ("parquet", "tar"):
            left_out.add("files that cannot be streamed", file)
    if not files:
        raise FileNotFoundError(f"{name} contains no {' or '.join(SUFFIXES)} file to stream")
    if not found.named:
        files = _of_split(files, split, str(found.root), left_out)
    left_out.report(name)
    shards = [Shard(found.root / file) for file in files if (found.root / file).stat().st_size]
    if len(shards) < len(files):
        raise ValueError(f"{len(files) - len(shards)} of the {len(files)} shards of {name} are empty (0 bytes)")
    return shards


def _on_hub(repo_id: str, split: str, revision: str | None) -> list[Shard]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        listed = HfApi().list_repo_files(repo_id, repo_type="dataset", revision=revision)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise FileNotFoundError(not_on_hub(repo_id, error)) from error
    files = sorted(file for file in listed if kind_of(file) in ("parquet", "tar"))
    if not files:
        raise FileNotFoundError(f"the Hub data set {repo_id!r} contains no {' or '.join(SUFFIXES)} file to stream")
    left_out = LeftOut()
    files = _of_split(files, split, repo_id, left_out)
    left_out.report(repo_id)
    return [Shard(file, repo_id=repo_id, revision=revision) for file in files]


def _of_split(files: list[str], split: str, where: str, left_out: LeftOut) -> list[str]:
    """The files of the split by their names; all of them, as its only split "train", where no name contains one."""
    splits, others = table_splits(files, split)
    split = usual_name(split)
    if not splits and split == "train":
        return files
    if split not in splits:
        raise ValueError(
            f"{where} has no file of the split {split!r}; its files name {', '.join(splits) or 'no split'}"
        )
    for file in others:
        left_out.add("shards whose names do not name a split", file)
    return splits[split]
