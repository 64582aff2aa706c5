"""Small helpers: atomic files, tables and durations as text. A leaf: every room may import it, it imports none."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO


def write_whole(path: str | os.PathLike, content: str | bytes | Callable[[IO[bytes]], object]) -> Path:
    """Writes a file atomically, through a temporary one in the same folder.

    Args:
        path: the file; its folder is created.
        content: text (UTF-8), bytes, or a function that writes to the open file.

    Raises:
        OSError: the file cannot be written; an existing one is unchanged.
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as stream:
            if callable(content):
                content(stream)
            else:
                stream.write(content.encode() if isinstance(content, str) else content)
        to_disk(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def to_disk(path: Path) -> None:
    """Flushes a file, or a folder with its content, to the disk."""
    if path.is_dir():
        for entry in path.iterdir():
            to_disk(entry)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def duration(seconds: float, space: str = " ") -> str:
    """`95` -> `1 min 35 s`; `space` separates a number from its unit."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}{space}h {minutes}{space}min"
    if not minutes:
        return f"{rest}{space}s"
    return f"{minutes}{space}min {rest}{space}s" if rest else f"{minutes}{space}min"


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """The lines of a table for a terminal, with aligned columns.

    Args:
        rows: the head and the cells of each row.
        right: indices of right-aligned columns.
    """
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
