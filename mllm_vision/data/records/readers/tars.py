"""WebDataset tars: one pass over the headers finds every sample; nothing is ever unpacked to the disk."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mllm_vision.data.records.readers.files import IMAGES, LeftOut, hidden
from mllm_vision.data.records.sampling import BadRow

TAR_GROUP = 256  # samples of a tar that are read at once
_TEXTS = ("txt", "text", "caption", "transcript")
_FIRST = ("jpg", "jpeg", "png", "webp")  # which of several images of a sample is *the* image
_BLOCK = 512

Member = tuple[str, int, int]  # name, place of its bytes, how many


class TarFile:
    """The samples of a WebDataset tar: files that share a name up to the first dot, wherever they are in the tar.

    A sample is a row whose columns are the extensions: `.txt` as text, `.cls` as a number (or a word), the fields of
    `.json` as columns of their own unless the name is taken, other files as bytes. The image is in the column `image`,
    whatever its type (jpg, png, webp ...); further images of a sample keep their extension. Where keys hold dots
    (`v1.0_07.jpg`) the last dot ends the key, which is reported.

    A value that cannot be read (text that is not UTF-8, broken JSON) is a `BadRow` in its place.

    Args:
        path: of an uncompressed tar.
        left_out: collects links, names that lead outside, hidden files and files that belong to no sample.

    Attributes:
        groups: how many samples each group holds.
        columns: those given by the file names, without the fields of `.json`.

    Raises:
        ValueError: the file is not a tar, is truncated, has a damaged header, or contains no sample.
    """

    def __init__(self, path: Path, left_out: LeftOut | None = None) -> None:
        self.path = path
        left_out = LeftOut() if left_out is None else left_out
        members = _members(path, left_out)
        self._samples = _samples(members, path, left_out)
        if not self._samples:
            raise ValueError(f"{path} contains no sample (files named <key>.<extension>)")
        count = len(self._samples)
        self.groups = [min(TAR_GROUP, count - start) for start in range(0, count, TAR_GROUP)]
        self.columns = ["__key__", *dict.fromkeys(name for _, parts in self._samples for name in parts)]

    def read(self, group: int, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The samples of a group; `columns` spares reading the others' bytes."""
        wanted = None if columns is None else set(columns)
        rows = []
        with self.path.open("rb") as stream:
            for key, parts in self._samples[group * TAR_GROUP : (group + 1) * TAR_GROUP]:
                row: dict[str, Any] = {"__key__": key}
                fields = wanted is None or not wanted <= {"__key__", *parts}
                for name, (extension, offset, size) in parts.items():
                    if (wanted is None or name in wanted) and name != "json":
                        stream.seek(offset)
                        row[name] = self._value(stream.read(size), key, extension)
                if "json" in parts and fields:
                    _, offset, size = parts["json"]
                    stream.seek(offset)
                    found = self._value(stream.read(size), key, "json")
                    if isinstance(found, BadRow) and wanted is not None:
                        row = {**dict.fromkeys(wanted - {"__key__", *parts}, found), **row}
                    row = {**found, **row} if isinstance(found, dict) else {"json": found, **row}
                rows.append(row if wanted is None else {name: row.get(name) for name in wanted})
        return rows

    def _value(self, data: bytes, key: str, extension: str) -> Any:
        kind = extension.rpartition(".")[2]
        try:
            if kind in _TEXTS:
                return data.decode("utf-8-sig")
            if kind == "json":
                return json.loads(data)
            if kind in ("cls", "index"):
                word = data.decode("utf-8-sig").strip()
                return int(word) if re.fullmatch(r"[-+]?\d{1,18}", word) else word or None
        except UnicodeDecodeError as error:
            return BadRow(f".{kind} is not UTF-8", f"{self.path.name}: {key}.{extension}: {error}")
        except (ValueError, RecursionError) as error:
            return BadRow(f".{kind} cannot be parsed", f"{self.path.name}: {key}.{extension}: {error}")
        return data


def _members(path: Path, left_out: LeftOut) -> list[Member]:
    """The files in a tar, of all archives that were appended to it; members that are not regular files are counted."""
    found: list[Member] = []
    size = path.stat().st_size
    start: int | None = 0
    try:
        with path.open("rb") as stream:
            while start is not None:
                stream.seek(start)
                with tarfile.open(fileobj=stream, mode="r:") as archive:
                    for member in archive:
                        _keep(member, found, path, left_out)
                    end = archive.offset
                stream.seek(end)
                block = stream.read(_BLOCK)
                if len(block) < _BLOCK or block.strip(b"\0"):
                    what = "ends without the mark of a tar's end" if len(block) < _BLOCK else "has a damaged header"
                    raise ValueError(f"{path} is cut off or damaged: at byte {end} of {size} it {what}")
                start = _next_archive(stream, end + _BLOCK)
                if start is not None:
                    left_out.note(f"{path.name} is several tars, one behind the other: all are read")
            return found
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a tar: {error}; it must be whole and uncompressed") from error


def _keep(member: tarfile.TarInfo, found: list[Member], path: Path, left_out: LeftOut) -> None:
    name = member.name
    if member.isdir():
        return
    if not member.isreg() or member.issparse():
        kind = "links" if member.islnk() or member.issym() else "members that are not regular files"
        left_out.add(f"{kind} in {path.name}", name)
    elif name.startswith(("/", "\\")) or ".." in PurePosixPath(name).parts or re.match(r"[A-Za-z]:[\\/]", name):
        left_out.add(f"members of {path.name} whose names lead outside", name)
    elif any(hidden(part) for part in PurePosixPath(name.removeprefix("./")).parts):
        left_out.add(f"hidden members of {path.name}", name)
    else:
        found.append((name.removeprefix("./"), member.offset_data, member.size))


def _next_archive(stream: Any, place: int) -> int | None:
    """Where a tar begins that was appended behind another's end, or None."""
    stream.seek(place)
    while block := stream.read(64 * _BLOCK):
        if block.strip(b"\0"):
            first = next(at for at in range(0, len(block), _BLOCK) if block[at : at + _BLOCK].strip(b"\0"))
            return place + first
        place += len(block)
    return None


def _samples(members: list[Member], path: Path, left_out: LeftOut) -> list[tuple[str, dict[str, tuple[str, int, int]]]]:
    """(key, column -> (extension, place, size)) of every sample, in the order in which they begin."""
    split = _last_dot if _keys_hold_dots([name for name, _, _ in members]) else _first_dot
    if split is _last_dot:
        left_out.note(f"the keys of {path.name} hold dots: a name's last dot ends its key")
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    place: dict[str, int] = {}
    twice = 0
    for name, offset, size in members:
        key, extension = split(name)
        if not extension or not key.rpartition("/")[2]:
            left_out.add(f"members of {path.name} that are not named like a sample (<key>.<extension>)", name)
            continue
        extension = extension.lower()
        if key not in place or extension in samples[place[key]][1]:
            twice += key in place
            place[key] = len(samples)
            samples.append((key, {}))
        samples[place[key]][1][extension] = (offset, size)
    if twice:
        left_out.note(f"{twice} keys of {path.name} occur again with the same files: these are separate samples")
    return [(key, _columns(parts)) for key, parts in samples]


def _columns(parts: dict[str, tuple[int, int]]) -> dict[str, tuple[str, int, int]]:
    """A sample's columns: its extensions, and `image` for its image."""
    images = [extension for extension in parts if f".{extension}" in IMAGES]
    the = min(images, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST)) if images else None
    taken = "image" in parts
    return {"image" if name == the and not taken else name: (name, *where) for name, where in parts.items()}


def _first_dot(name: str) -> tuple[str, str]:
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension


def _last_dot(name: str) -> tuple[str, str]:
    stem, _, extension = name.rpartition(".")
    return stem, extension


def _keys_hold_dots(names: list[str]) -> bool:
    """Whether the last dot ends the keys and not, as WebDataset has it, the first one.

    So where names split at the last dot give samples of one make (an image with its text), or at the first dot give
    more extensions than samples.
    """
    dotted = [name for name in names if name.rpartition("/")[2].count(".") > 1]
    if not dotted:
        return False
    last: dict[str, list[str]] = {}
    for name in names:
        key, extension = _last_dot(name)
        last.setdefault(key, []).append(extension.lower())
    makes = Counter(tuple(sorted(set(each))) for each in last.values())
    make, count = makes.most_common(1)[0]
    if count < 0.9 * len(last):
        return False
    first = {_first_dot(name) for name in names}
    return len(make) > 1 or len({extension for _, extension in first}) > len({key for key, _ in first})
