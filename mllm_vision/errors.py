"""Words that error messages share. A leaf: any floor may import it, it imports nothing of ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
