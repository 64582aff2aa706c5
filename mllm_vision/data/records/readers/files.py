"""Finding files: what a name means (file, folder, pattern or Hub id), which files are of which split."""

from __future__ import annotations

import glob
import logging
import lzma
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mllm_vision.errors import nearby

logger = logging.getLogger(__name__)

TABLES = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
    ".tar": "tar",
}
CHUNK = 8192  # rows of a text file that become Arrow at once
PACKED = (".gz", ".bz2", ".xz")  # of texts (JSON, CSV); a packed tar cannot be read from its middle
IMAGES = frozenset(  # what files of `image_files.FORMATS` are called
    f".{end}"
    for end in "png jpg jpeg jpe jfif mpo webp bmp gif tif tiff ppm pgm pbm pnm jp2 j2k avif".split()  # noqa: SIM905
)
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
WORDS = tuple(_SPLIT_OF)
_NUMBER = r"(?:[-_. ]?\d+(?:[-_]of[-_]\d+)?)?"  # of a shard: train-00001-of-00008, train_01, train2017


class LeftOut:
    """What a reader leaves out or reads unexpectedly: counted by kind, reported once, with examples."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.notes: list[str] = []
        self.outside: list[str] = []
        self._reported: set[str] = set()

    def add(self, what: str, example: object, count: int = 1) -> None:
        """`count` more of `what` (a plural, "hidden files") are left out; the first example of each is shown."""
        self.counts[what] += count
        self.examples.setdefault(what, str(example)[:200])

    def note(self, text: str) -> None:
        """Something the user should know about how the data is read; the same text is reported once."""
        if text not in self.notes:
            self.notes.append(text)

    def lies_outside(self, path: str) -> None:
        """An image outside the data's folder: read as requested; the first few are listed once."""
        if len(self.outside) < 4 and path not in self.outside:
            self.outside.append(path)

    def merge(self, other: LeftOut) -> None:
        """Add what another reader left out."""
        self.counts.update(other.counts)
        self.examples = {**other.examples, **self.examples}
        for text in other.notes:
            self.note(text)
        for path in other.outside:
            self.lies_outside(path)

    def state(self) -> dict[str, Any]:
        """The state for `LeftOut.of`, JSON-serialisable."""
        return {name: getattr(self, name) for name in ("counts", "examples", "notes", "outside")}

    @classmethod
    def of(cls, state: dict[str, Any]) -> LeftOut:
        """What was left out when `state` was taken."""
        found = cls()
        found.counts, found.examples = Counter(state["counts"]), dict(state["examples"])
        found.notes, found.outside = list(state["notes"]), list(state["outside"])
        return found

    def report(self, where: object) -> None:
        """Log a line for each note and one for all that is left out, each once."""
        lines = list(self.notes)
        if self.counts:
            each = (f"{count} {what} ({self.examples[what]})" for what, count in self.counts.most_common())
            lines.append("not read: " + ", ".join(each))
        if self.outside and "outside" not in self._reported:
            self._reported.add("outside")
            more = ", ..." if len(self.outside) > 3 else ""
            lines.append(f"images outside of its folder are read as requested: {', '.join(self.outside[:3])}{more}")
        for line in lines:
            if line not in self._reported:
                logger.warning("%s: %s", where, line)
        self._reported.update(lines)


@contextmanager
def reading_as(path: Path, kind: str) -> Iterator[None]:
    """Errors of a library that reads `path`, as a ValueError that names the file and what it was read as.

    A file that does not exist stays a FileNotFoundError.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ValueError, NotImplementedError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be read as {kind}: {error}") from error


@dataclass(frozen=True)
class Found:
    """Files below a folder.

    Attributes:
        root: the folder.
        files: paths below it, with slashes, in order.
        named: the user named them (a file, a pattern): they are one split, whatever they are called.
    """

    root: Path
    files: list[str]
    named: bool = False


def kind_of(name: str | Path) -> str:
    """One of "parquet", "json", "csv", "arrow", "tar" or "image" by the end of a file's name; "" for another."""
    path = PurePosixPath(str(name).lower())
    if path.suffix in PACKED:
        inner = TABLES.get(PurePosixPath(path.stem).suffix, "")
        return inner if inner in ("json", "csv") else ""
    return "image" if path.suffix in IMAGES else TABLES.get(path.suffix, "")


def find(name: str | Path, left_out: LeftOut) -> Found | None:
    """The files that a name means, or None for what can only be a Hub id.

    A path that exists is that path, whatever characters are in it; only one that does not is a pattern (`*`, `?`,
    `[..]`, `{000..127}`, `{a,b}`). A folder that a pattern matches means the files below it.

    Raises:
        ValueError: an empty name. FileNotFoundError: nothing is there, or some of the files that braces name.
    """
    text = str(name).strip()
    if not text:
        raise ValueError("no data set was named: pass a file, a pattern, a folder or a Hub id (--dataset_name)")
    path = Path(text).expanduser()
    if path.is_file():
        return Found(path.parent, [path.name], named=True)
    if path.is_dir():
        return Found(path, walk(path, left_out))
    if "{" in text or glob.has_magic(text):
        return _matched(text, path, left_out)
    looks_local = text.startswith((".", "/", "~", "\\")) or text.count("/") > 1
    if looks_local or kind_of(text) or path.suffix in (*PACKED, ".zip", ".tgz"):
        folder = "" if path.parent.is_dir() else f", and neither does the folder {str(path.parent)!r}"
        raise FileNotFoundError(f"{text!r} does not exist (working folder: {Path.cwd()}){folder}{nearby(path)}")
    return None


def _matched(text: str, path: Path, left_out: LeftOut) -> Found:
    there, *parts = Path(), *path.parts
    while len(parts) > 1 and (there / parts[0]).is_dir():  # a folder that exists is that folder, brackets and all
        there /= parts.pop(0)
    folder = glob.escape(str(there))
    spelled = [each if folder == "." else os.path.join(folder, each) for each in braces(os.path.join(*parts))]
    found = {each: glob.glob(each, recursive=True) for each in spelled}
    missing = [each for each, files in found.items() if not any(map(os.path.exists, files))]
    if len(missing) == len(spelled):
        raise FileNotFoundError(f"no file matches {text!r} (working folder: {Path.cwd()})")
    if missing:
        names = ", ".join(re.sub(r"\[([*?[])\]", r"\1", each) for each in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FileNotFoundError(f"{text!r} names {len(spelled)} files, and {len(missing)} are missing: {names}{more}")
    paths = sorted({path for files in found.values() for path in files if os.path.exists(path)})
    root = Path(os.path.commonpath([os.path.dirname(path) or "." for path in paths]))
    files = [os.path.relpath(path, root).replace(os.sep, "/") for path in paths if not os.path.isdir(path)]
    for below in filter(os.path.isdir, paths):
        prefix = os.path.relpath(below, root).replace(os.sep, "/")
        files += [file if prefix == "." else f"{prefix}/{file}" for file in walk(Path(below), left_out)]
    if not files:
        raise FileNotFoundError(f"{text!r} matches folders only, and they are empty (working folder: {Path.cwd()})")
    return Found(root, sorted(set(files)), named=True)


def walk(folder: Path, left_out: LeftOut) -> list[str]:
    """All files below a folder, as paths below it, in order; links are followed, hidden files are counted."""
    found: list[str] = []
    seen: set[str] = set()

    def unreadable(error: OSError) -> None:
        left_out.add("folders that cannot be read", f"{error.filename}: {error.strerror}")

    for place, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(place)
        if real in seen:  # a link that leads back
            left_out.add("folders that are linked in twice", place)
            folders[:] = []
            continue
        seen.add(real)
        for name in [each for each in folders if hidden(each)]:
            left_out.add("hidden folders", os.path.join(place, name))
        folders[:] = sorted(name for name in folders if not hidden(name))
        below = os.path.relpath(place, folder).replace(os.sep, "/")
        for name in files:
            file = name if below == "." else f"{below}/{name}"
            if hidden(name):
                left_out.add("hidden files", file)
            elif not file.isascii() and file.encode("utf-8", "replace").decode() != file:
                left_out.add("files whose names are not UTF-8", ascii(file))
            else:
                found.append(file)
    return sorted(found)


def hidden(name: str) -> bool:
    """Whether a file or folder is hidden or a system's own: .DS_Store, ._x.jpg, Thumbs.db, __MACOSX."""
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini", "__macosx", "__pycache__")


def braces(pattern: str) -> list[str]:
    """`{000..127}` and `{a,b}` in WebDataset's notation, expanded."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span:
        words = [str(number).zfill(len(span[1])) for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        words = found[1].split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [spelled for word in words for spelled in braces(f"{before}{word}{after}")]


# ---- splits ------------------------------------------------------------------------------------------------------


def usual_name(split: str) -> str:
    """The split's usual name: "validation" for "val"; another name is itself."""
    return _SPLIT_OF.get(split.lower(), split)


def split_word(name: str, asked: str = "") -> str | None:
    """The split a file's stem or a folder is called by ("val2017" -> "validation"), or None.

    Args:
        name: without its folder and suffixes.
        asked: a split of another name that counts too.
    """
    words = [*_SPLIT_OF, *([asked.lower()] if asked else [])]
    found = re.fullmatch(rf"({'|'.join(map(re.escape, words))}){_NUMBER}", name.lower())
    return None if found is None else _SPLIT_OF.get(found[1], asked)


def table_splits(files: Sequence[str], asked: str = "") -> tuple[dict[str, list[str]], list[str]]:
    """(split -> files, files of no split) of tables, by their names; ({}, files) where the names do not name a split.

    A name is exact (`val.parquet`, `train-00001-of-00008.tar`, `test/part.csv`) or has a word at its end or
    beginning. Words count only where two names differ in them alone (`coco_train`, `coco_val`), or all files are of the
    training split or the requested one: bullet_train and test_tube are not splits.
    """
    prefix = common_folder(files)
    exact, worded = {}, {}
    for file in files:
        *folders, name = PurePosixPath(file[len(prefix) :]).parts
        stem = stem_of(name)
        exact[file] = split_word(stem, asked) or (split_word(folders[0], asked) if folders else None)
        worded[file] = _word_in([*folders, stem])
    top = split_word(PurePosixPath(prefix).parts[-1], asked) if prefix else None
    if top is not None and not any(exact.values()):
        return {top: list(files)}, []
    named = exact
    if not any(exact.values()):
        known = {found for found in worded.values() if found is not None}
        paired = len({rest for _, rest in known}) < len(known)
        alone = {split for split, _ in known} in ({"train"}, {_SPLIT_OF.get(asked, asked)})
        if not paired and not (alone and None not in worded.values()):
            return {}, list(files)
        named = {file: found[0] if found is not None else None for file, found in worded.items()}
    return _grouped(named)


def _grouped(split_of: dict[str, str | None]) -> tuple[dict[str, list[str]], list[str]]:
    """(split -> files, files of no split); the usual splits come first."""
    others = [file for file, own in split_of.items() if own is None]
    found = {own for own in split_of.values() if own is not None}
    order = [split for split in SPLITS if split in found] + sorted(found - set(SPLITS))
    return {split: [file for file, own in split_of.items() if own == split] for split in order}, others


def _word_in(parts: Sequence[str]) -> tuple[str, str] | None:
    """(split, the rest of the name) of a path with a part that ends or begins with a split's word: coco_train."""
    for part in parts:
        words = [word for word in re.split(r"[^a-z]+", part.lower()) if word not in ("", "of")]
        for place in (-1, 0):
            if len(words) > 1 and words[place] in _SPLIT_OF:
                return _SPLIT_OF[words[place]], "_".join(words[:-1] if place else words[1:])
    return None


def stem_of(name: str) -> str:
    """A file's name without the suffixes that say its type."""
    path = PurePosixPath(name)
    while path.suffix.lower() in (*TABLES, *PACKED):
        path = PurePosixPath(path.stem)
    return path.name


def image_splits(files: Sequence[str]) -> tuple[dict[str, list[str]], list[str], str]:
    """(split -> files, files of no split, the folder that holds the splits or classes) of images.

    Only real folders at the top count: all of them are called like splits, or most are and there are two splits.
    """
    prefix = ""
    while True:
        tops = Counter(_top(file[len(prefix) :]) for file in files)
        only = next(iter(tops))
        if len(tops) > 1 or not only or split_word(only):
            break
        prefix += f"{only}/"
    named = {top: split_word(top) for top in tops}
    splits = {split for split in named.values() if split is not None}
    others = sum(split is None for split in named.values())
    if not splits or (others and (len(splits) < 2 or others > len(named) - others or "" in tops)):
        return {}, list(files), prefix
    return *_grouped({file: named[_top(file[len(prefix) :])] for file in files}), prefix


def _top(file: str) -> str:
    """The first folder of a path, "" where it has none."""
    return file.partition("/")[0] if "/" in file else ""


def common_folder(files: Iterable[str]) -> str:
    """The folders that all paths share, with the slash at the end; "" where they share none."""
    folders = {file.rpartition("/")[0] for file in files}
    shared = os.path.commonpath(folders) if folders else ""
    return f"{shared}/" if shared else ""
