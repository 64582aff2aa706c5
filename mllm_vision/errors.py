"""Words that error messages share. A leaf: any floor may import it, it imports nothing of ours."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
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


def unknown_name(kind: str, name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """`unknown objective 'simlcr'; the nearest known one is 'simclr'`, or the whole list where nothing is near."""
    known = list(known)
    close = nearest(name, known)
    if close is not None:
        return f"unknown {kind} {prefix + name!r}; the nearest known one is {prefix + close!r}"
    return f"unknown {kind} {prefix + name!r}; known are {', '.join(prefix + candidate for candidate in sorted(known))}"
