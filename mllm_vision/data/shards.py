"""Shards of a streamed data set: Parquet files and WebDataset tars, read a group of rows at a time.

Nothing here imports torch. A shard knows how many rows each of its groups holds before any of them is read (a
Parquet footer, a pass over a tar's headers), which is what makes the order of a stream a matter of numbers alone.
"""

from __future__ import annotations

import glob
import json
import re
import tarfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SUFFIXES = {".parquet": "parquet", ".tar": "webdataset"}
TAR_GROUP = 256  # samples of a tar that are read at once
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_TEXTS = ("txt", "text", "caption", "transcript")


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
        self.kind = SUFFIXES.get(Path(self.path).suffix.lower(), "")
        if not self.kind:
            raise ValueError(
                f"{self.path}: only Parquet files and uncompressed WebDataset tars can be streamed "
                f"({', '.join(SUFFIXES)}); train on it without --streaming, or write it as Parquet"
            )
        self._opened: Any = None

    @property
    def name(self) -> str:
        """What tells this shard from others in a saved state: its path, without the machine's folders."""
        return f"{self.repo_id}/{self.path}" if self.repo_id else "/".join(Path(self.path).parts[-2:])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # worker processes open the file themselves

    @property
    def local(self) -> bool:
        """Whether the file lies on this machine already."""
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
            self._opened = (ParquetFile if self.kind == "parquet" else TarFile)(self.file())
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
        """The rows of one group as dicts, pictures undecoded; only `columns` where they are named."""
        return self.opened.read(group, columns)


class ParquetFile:
    """The row groups of a Parquet file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handles = threading.local()
        try:
            metadata = self._file.metadata
        except (OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
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
        try:
            table = self._file.read_row_group(
                group, columns=None if columns is None else list(columns), use_threads=False
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path}: row group {group} cannot be read: {error}") from error
        rows = table.to_pylist()
        if self._features is not None:
            given = type(self._features)({name: self._features[name] for name in table.column_names})
            rows = [given.decode_example(row) for row in rows]
        return rows

    def head(self, count: int) -> Any:
        """The first rows as a `datasets.Dataset` with undecoded pictures, for binding columns."""
        from datasets import Dataset, Features, Image
        from datasets import List as ListFeature

        batch = next(self._file.iter_batches(batch_size=count))
        features = Features.from_arrow_schema(batch.schema)
        for name, feature in features.items():
            if isinstance(feature, Image):
                features[name] = Image(decode=False)
            elif isinstance(feature, ListFeature) and isinstance(feature.feature, Image):
                features[name] = ListFeature(Image(decode=False))
        import pyarrow as pa

        return Dataset(pa.Table.from_batches([batch]).replace_schema_metadata(None)).cast(features)


def _features(schema: Any) -> Any:
    """The features that need decoding (JSON inside strings), or None where the Arrow values are what is meant."""
    if b'"Json"' not in (schema.metadata or {}).get(b"huggingface", b""):
        return None
    from datasets import Features, Image, Sequence

    def undecoded(feature: Any) -> Any:
        if isinstance(feature, Image):
            return Image(decode=False)
        if hasattr(feature, "feature") and isinstance(feature.feature, Image):
            return Sequence(Image(decode=False))
        return feature

    return Features({name: undecoded(feature) for name, feature in Features.from_arrow_schema(schema).items()})


class TarFile:
    """The samples of a WebDataset tar: files that share a name up to the first dot, one after the other.

    A sample is a row whose columns are the extensions: pictures as bytes, `.txt` as text, `.cls` as a number, and
    the fields of `.json` as columns of their own unless the name is taken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    folder, _, file = member.name.rpartition("/")
                    stem, dot, extension = file.partition(".")
                    if not dot or not stem:
                        continue
                    key = f"{folder}/{stem}" if folder else stem
                    if not self._samples or self._samples[-1][0] != key:
                        self._samples.append((key, {}))
                    self._samples[-1][1][extension.lower()] = (member.offset_data, member.size)
        except tarfile.TarError as error:
            raise ValueError(
                f"{path} cannot be read as a tar: {error}; a stream needs it whole and uncompressed"
            ) from error
        if not self._samples:
            raise ValueError(f"{path} holds no sample (files named <key>.<extension>)")
        last = max(-(-(offset + length) // 512) * 512 for offset, length in self._samples[-1][1].values())
        with path.open("rb") as stream:
            stream.seek(last)
            if stream.read(512).strip(b"\0") or path.stat().st_size < last + 512:
                raise ValueError(
                    f"{path} is cut off: its {path.stat().st_size} bytes end without the mark of a tar's end"
                )
        count = len(self._samples)
        self.groups = [min(TAR_GROUP, count - start) for start in range(0, count, TAR_GROUP)]

    def read(self, group: int, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The samples of a group; `columns` spares reading the others' bytes."""
        wanted = None if columns is None else set(columns)
        rows = []
        with self.path.open("rb") as stream:
            for key, members in self._samples[group * TAR_GROUP : (group + 1) * TAR_GROUP]:
                row: dict[str, Any] = {"__key__": key}
                for extension, (offset, size) in members.items():
                    if wanted is not None and extension not in wanted and extension != "json":
                        continue
                    stream.seek(offset)
                    row[extension] = self._value(stream.read(size), key, extension)
                fields = row.pop("json", None)
                row = {**fields, **row} if isinstance(fields, dict) else row | ({"json": fields} if fields else {})
                rows.append(row if wanted is None else {name: row.get(name) for name in wanted})
        return rows

    def _value(self, data: bytes, key: str, extension: str) -> Any:
        kind = extension.rpartition(".")[2]
        try:
            if kind in _TEXTS:
                return data.decode("utf-8")
            if kind == "json":
                return json.loads(data)
            if kind in ("cls", "index"):
                return int(data)
        except ValueError as error:
            raise ValueError(f"{self.path}: {key}.{extension} cannot be read: {error}") from error
        return data

    def head(self, count: int) -> list[dict[str, Any]]:
        """The first rows, for binding columns."""
        rows = self.read(0)[:count]
        names = list(dict.fromkeys(name for row in rows for name in row))
        return [{name: row.get(name) for name in names} for row in rows]


def find_shards(name: str | Path, split: str = "train", *, revision: str | None = None) -> list[Shard]:
    """The shards of a local file, pattern or folder, or of a Hub data set, in order of their names.

    Args:
        name: a `.parquet` or `.tar` file; a pattern (`*`, `?`, `[..]`, `{000..127}`); a folder, of which the
            files that name the split are taken, or all where none does; or a Hub data set's id.
        split: "train", "validation" or "test", or any word that file names may hold.

    Raises:
        FileNotFoundError: nothing is there. ValueError: a file that cannot be streamed, an empty name.
    """
    text = str(name).strip()
    if not text:
        raise ValueError("no data set was named: pass a file, a pattern, a folder or a Hub id (--dataset_name)")
    if "[" in split:
        raise ValueError(f"split={split!r}: a stream takes whole splits; use --max_steps to read less of one")
    path = Path(text).expanduser()
    if "{" in text or glob.has_magic(text):
        found = [file for pattern in _braces(str(path)) for file in glob.glob(pattern, recursive=True)]
        files = sorted({file for file in found if Path(file).is_file()})
        if not files:
            raise FileNotFoundError(f"no file matches {text!r} (working folder: {Path.cwd()})")
        return [Shard(file) for file in files]
    if path.is_file():
        return [Shard(path)]
    if path.is_dir():
        files = sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise FileNotFoundError(f"the folder {path} holds no {' or '.join(SUFFIXES)} file to stream")
        return [Shard(file) for file in _of_split(files, split, str(path))]
    if text.startswith((".", "/", "~")) or path.suffix or text.count("/") > 1:
        raise FileNotFoundError(f"{text!r} does not exist (working folder: {Path.cwd()})")
    return _on_hub(text, split, revision)


def _on_hub(repo_id: str, split: str, revision: str | None) -> list[Shard]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        listed = HfApi().list_repo_files(repo_id, repo_type="dataset", revision=revision)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise FileNotFoundError(
            f"{repo_id!r} is no file or folder here (working folder: {Path.cwd()}), and as a Hub data set it could not "
            f"be listed: {error}"
        ) from error
    files = sorted(file for file in listed if Path(file).suffix.lower() in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"the Hub data set {repo_id!r} holds no {' or '.join(SUFFIXES)} file to stream")
    return [Shard(file, repo_id=repo_id, revision=revision) for file in _of_split(files, split, repo_id)]


def _of_split(files: list[str], split: str, where: str) -> list[str]:
    """The files whose path (below `where`) names the split; all of them where no file names any split."""

    def named(word: str) -> list[str]:
        pattern = re.compile(rf"(^|[^a-z]){re.escape(word)}([^a-z]|$)")
        return [file for file in files if pattern.search(file.removeprefix(where).lower())]

    for word in _SPLITS.get(split, (split,)):
        if named(word):
            return named(word)
    known = [word for words in _SPLITS.values() for word in words if named(word)]
    if known or split not in _SPLITS:
        raise ValueError(f"{where} has no file of the split {split!r}; its files name {', '.join(known) or 'no split'}")
    return files


def _braces(pattern: str) -> list[str]:
    """`{000..127}` and `{a,b}` as WebDataset's users write them, spelled out."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span:
        words = [str(number).zfill(len(span[1])) for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        words = found[1].split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [spelled for word in words for spelled in _braces(f"{before}{word}{after}")]
