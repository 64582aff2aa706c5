"""Words that error messages share. A leaf: any floor may import it, it imports nothing of ours."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

LONGEST_VALUE = 200  # characters of a user's value that a message shows


class IncompleteRun(RuntimeError):
    """What was trained is saved, and something after it (evaluation, samples, a push) failed; exit code 3."""


class _Short(reprlib.Repr):
    """`reprlib` with room for a sentence, and bytes by their number: a repr of 10 MB is never built."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxset, self.maxdict = 4, 8, 8, 8, 8
        self.maxstring = self.maxlong = self.maxother = limit

    def repr_bytes(self, value: Any, level: int) -> str:
        return repr(bytes(value)) if len(value) <= 40 else f"<{len(value)} bytes>"

    repr_bytearray = repr_memoryview = repr_bytes


def short(value: Any, limit: int = LONGEST_VALUE) -> str:
    """`repr(value)` of at most `limit` characters, for messages: long strings lose their middle, lists their end."""
    try:
        text = _Short(limit).repr(value)
    except ValueError:  # Python prints no integer beyond 4300 digits
        text = f"<{type(value).__name__} too long to print>"
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextmanager
def reading(what: Any) -> Iterator[None]:
    """What goes wrong while a user's file or folder is read, as one error that names it.

    Libraries answer damaged or foreign files with errors of their own kinds (safetensors, tokenizers, JSON that is too
    deep, a key that is not there), most of which say not which file it was.

    Args:
        what: the path or id, named in the message.

    Raises:
        ValueError: for every `Exception` but those that are `OSError`s or name `what` already, which pass.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError | MemoryError) or (isinstance(error, ValueError) and str(what) in str(error)):
            raise
        told = " ".join(str(error).split()) or "nothing more is known"
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what} cannot be read, it may be damaged or of another kind: {kind}{told}") from error


_LONG = re.compile(rf"'[^'\n]{{{LONGEST_VALUE},}}'|\"[^\"\n]{{{LONGEST_VALUE},}}\"|\S{{{LONGEST_VALUE},}}")


def tidy(message: str) -> str:
    """`message` without what no terminal wants: quotations and words beyond 200 characters lose their middle."""

    def cut(found: re.Match[str]) -> str:
        text = found[0]
        return f"{text[:80]}...{text[-40:]} ({len(text):,} characters)"

    return _LONG.sub(cut, message)


def explain(error: BaseException) -> str | None:
    """The one line that a user is told, or None where only a traceback helps: the fault is the toolkit's.

    `ValueError` and `OSError` are a user's, by the rules of this package. Some other kinds come from a machine or a
    library and have one meaning.
    """
    if "Original Traceback (most recent call last)" in str(error):  # raised in a process of the data loader
        return tidy(str(error).strip().splitlines()[-1].partition(": ")[2] or str(error))
    told = " ".join(str(error).split())
    name = type(error).__name__
    if isinstance(error, OSError):
        return tidy(_cache_told(error) or str(error))
    if isinstance(error, ValueError):
        return tidy(str(error))
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("mllm_vision"):
        return f"this needs the package {error.name!r}, which is not installed: pip install {error.name}"
    if isinstance(error, ImportError):
        return tidy(f"a package that this needs cannot be imported: {told}")
    if name == "OutOfMemoryError" or isinstance(error, MemoryError):
        return tidy(
            f"out of memory ({told[:160] or 'of the host'}): take a smaller --per_device_train_batch_size, "
            "--activation_checkpointing or --bf16, and see scripts/doctor.py for what a step needs"
        )
    if isinstance(error, RuntimeError) and told.startswith("DataLoader worker"):
        return tidy(
            f"a process that reads the data died: {told}. Its memory may have run out: take fewer "
            "--dataloader_num_workers (0 reads in this process); a run with checkpoints goes on with --resume"
        )
    if name in ("SafetensorError", "UnpicklingError", "TemplateError", "RecursionError", "BadZipFile", "ReadError"):
        return tidy(f"a file that was read is damaged or of another kind ({name}): {told}")
    return None


def _cache_told(error: OSError) -> str | None:
    """A cache that cannot be written, named by the variable that says where it is."""
    place = str(error.filename or "")
    if not place or isinstance(error, FileNotFoundError | FileExistsError):
        return None
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_HOME"):
        folder = os.environ.get(name)
        if not folder:
            continue
        if place.startswith(os.path.abspath(os.path.expanduser(folder))) or place.startswith(folder):
            return f"{name}={folder} cannot be written ({error.strerror}: {place}); set {name} to a folder that can be"
    return None


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` most likely meant, or None where nothing is near.

    Case, hyphens and underscores do not count as differences.
    """
    plain = {candidate.lower().replace("-", "_"): candidate for candidate in known}
    wanted = name.lower().replace("-", "_")
    if wanted in plain:
        return plain[wanted]
    found = difflib.get_close_matches(wanted, plain, n=1, cutoff=0.5)
    if not found:  # an abbreviation or an extension of a known name is near too
        found = [candidate for candidate in plain if candidate.startswith(wanted) or wanted.startswith(candidate)][:1]
    return plain[found[0]] if found else None


def nearby(path: Any) -> str:
    """What lies where `path` was looked for and is not, for the end of a message: `; runs/first holds dual...`.

    The folder is the deepest one of the path that exists; where one of its entries is near to the word that failed,
    that one is named alone.
    """
    wanted = os.path.abspath(os.path.expanduser(str(path)))
    folder, missing = os.path.split(wanted)
    while folder and not os.path.isdir(folder) and os.path.dirname(folder) != folder:
        folder, missing = os.path.split(folder)
    try:
        found = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return ""
    close = nearest(missing, found)
    if close is not None:
        return f"; the nearest there is {short(os.path.join(folder, close))}"
    return f"; {short(folder)} holds {', '.join(found[:6]) or 'nothing'}{' ...' * (len(found) > 6)}"


def unknown_name(kind: str, name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """`unknown objective 'simlcr'; the nearest known one is 'simclr'`, or all of them where none is near."""
    known = list(known)
    close = nearest(name, known)
    if close is not None:
        return f"unknown {kind} {prefix + name!r}; the nearest known one is {prefix + close!r}"
    if len(known) > 40:
        return f"unknown {kind} {prefix + name!r}, and none of the {len(known)} known ones is near; --help lists them"
    return f"unknown {kind} {prefix + name!r}; known are {', '.join(prefix + candidate for candidate in sorted(known))}"
