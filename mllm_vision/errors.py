"""Helpers for error messages. A leaf: every room may import it, it imports none."""

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
    """The trained model is saved, but a later step (evaluation, samples, a push) failed; exit code 3."""


class _Short(reprlib.Repr):
    """`reprlib` with longer strings, and bytes by their number: a repr of 10 MB is never built."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxset, self.maxdict = 4, 8, 8, 8, 8
        self.maxstring = self.maxlong = self.maxother = limit

    def repr_bytes(self, value: Any, level: int) -> str:
        return repr(bytes(value)) if len(value) <= 40 else f"<{len(value)} bytes>"

    repr_bytearray = repr_memoryview = repr_bytes


def short(value: Any, limit: int = LONGEST_VALUE) -> str:
    """`repr(value)` with at most `limit` characters: long strings lose their middle, lists their end."""
    try:
        text = _Short(limit).repr(value)
    except ValueError:  # Python does not print integers beyond 4300 digits
        text = f"<{type(value).__name__} too long to print>"
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextmanager
def reading(what: Any) -> Iterator[None]:
    """Raises errors of libraries that read a user's file or folder as one ValueError that names it.

    Args:
        what: the path or id.

    Raises:
        ValueError: for every `Exception` except `OSError`, `MemoryError` and ValueErrors that already name `what`.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError | MemoryError) or (isinstance(error, ValueError) and str(what) in str(error)):
            raise
        message = " ".join(str(error).split()) or "no further details"
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what} cannot be read, it may be damaged or of another kind: {kind}{message}") from error


_LONG = re.compile(rf"'[^'\n]{{{LONGEST_VALUE},}}'|\"[^\"\n]{{{LONGEST_VALUE},}}\"|\S{{{LONGEST_VALUE},}}")


def tidy(message: str) -> str:
    """`message` for a terminal: quotations and words beyond 200 characters lose their middle."""

    def cut(found: re.Match[str]) -> str:
        text = found[0]
        return f"{text[:80]}...{text[-40:]} ({len(text):,} characters)"

    return _LONG.sub(cut, message)


def explain(error: BaseException) -> str | None:
    """One line for the user, or None for a bug of the toolkit, which needs a traceback.

    By convention, ValueError and OSError are errors of the user; some other types from the machine or a library have
    one known meaning.
    """
    if "Original Traceback (most recent call last)" in str(error):  # raised in a process of the data loader
        return tidy(str(error).strip().splitlines()[-1].partition(": ")[2] or str(error))
    message = " ".join(str(error).split())
    name = type(error).__name__
    if isinstance(error, OSError):
        return tidy(_unwritable_cache(error) or str(error))
    if isinstance(error, ValueError):
        return tidy(str(error))
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("mllm_vision"):
        return f"this needs the package {error.name!r}, which is not installed: pip install {error.name}"
    if isinstance(error, ImportError):
        return tidy(f"a required package cannot be imported: {message}")
    if name == "OutOfMemoryError" or isinstance(error, MemoryError):
        return tidy(
            f"out of memory ({message[:160] or 'of the host'}): use a smaller --per_device_train_batch_size, "
            "--activation_checkpointing or --bf16, and see scripts/doctor.py for what a step needs"
        )
    if isinstance(error, RuntimeError) and message.startswith("DataLoader worker"):
        return tidy(
            f"a data loader process died: {message}. Its memory may have run out: use fewer "
            "--dataloader_num_workers (0 reads in this process); a run with checkpoints continues with --resume"
        )
    if name in ("SafetensorError", "UnpicklingError", "TemplateError", "RecursionError", "BadZipFile", "ReadError"):
        return tidy(f"a file is damaged or of another kind ({name}): {message}")
    return None


def _unwritable_cache(error: OSError) -> str | None:
    """Message for a cache that cannot be written, naming its environment variable."""
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
    """The known name closest to `name` (ignoring case, hyphens and underscores), or None."""
    plain = {candidate.lower().replace("-", "_"): candidate for candidate in known}
    wanted = name.lower().replace("-", "_")
    if wanted in plain:
        return plain[wanted]
    found = difflib.get_close_matches(wanted, plain, n=1, cutoff=0.5)
    if not found:  # abbreviations and extensions of a known name are close too
        found = [candidate for candidate in plain if candidate.startswith(wanted) or wanted.startswith(candidate)][:1]
    return plain[found[0]] if found else None


def nearby(path: Any) -> str:
    """What exists near a missing `path`, for the end of a message: the closest name, or the content of the folder."""
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
    return f"; {short(folder)} contains {', '.join(found[:6]) or 'nothing'}{' ...' * (len(found) > 6)}"


def unknown_name(kind: str, name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """`unknown objective 'simlcr'; the nearest known one is 'simclr'`, or a list of all if none is close."""
    known = list(known)
    close = nearest(name, known)
    if close is not None:
        return f"unknown {kind} {prefix + name!r}; the nearest known one is {prefix + close!r}"
    if len(known) > 40:
        return f"unknown {kind} {prefix + name!r}, and none of the {len(known)} known ones is close; --help lists them"
    return f"unknown {kind} {prefix + name!r}; known are {', '.join(prefix + candidate for candidate in sorted(known))}"
