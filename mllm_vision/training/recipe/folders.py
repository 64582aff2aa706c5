"""What is written and removed in a run folder: safe names, and folders that are whole or absent.

A killed process leaves only hidden entries: `.<name>.previous` (the replaced folder) and `.<name>.partial` (the folder
being written); `clean` removes them.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mllm_vision.utils import to_disk
from mllm_vision.utils import write_whole as write_whole

logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
_LEFTOVER = re.compile(r"^\.(.+)\.(previous|partial)$")
_TAKEN = ("recipe.yaml", "metrics.jsonl", "run.json")
# messages of torch and safetensors on a full disk: they do not raise OSError
_FULL_DISK = ("no space left", "disk quota exceeded", "file write failed", "failed writing file", "unexpected pos")


def check_name(name: str, what: str = "name") -> str:
    """`name` if a run folder may contain a folder of that name.

    Args:
        name: the name of one folder, not a path.
        what: how the message calls it, e.g. "--artifact_name".

    Raises:
        ValueError: it is empty, a path, hidden, reserved, too long, or contains control characters.
    """
    if not name or name != name.strip() or any(ord(sign) < 32 or ord(sign) == 127 for sign in name):
        why = "it is empty, or contains surrounding spaces or control characters"
    elif "/" in name or "\\" in name or Path(name).is_absolute():
        why = "it is a path, and would be outside the run folder"
    elif name.startswith("."):
        why = "it begins with a dot, as the temporary folders of a run do"
    elif CHECKPOINT.match(name) or name in _TAKEN:
        why = "the run itself writes a file or folder of that name"
    elif len(os.fsencode(name)) > 200:
        why = "it is longer than 200 bytes"
    else:
        return name
    raise ValueError(f"{what} {name!r} cannot be used: {why}; give a plain folder name, e.g. model")


def remove(path: Path, run_folder: Path, *, strict: bool = True) -> None:
    """Remove an entry of the run folder; of a link the link, not its target. Nothing else deletes folders.

    Args:
        path: directly in `run_folder`.
        strict: raise on an OSError; otherwise log a warning.

    Raises:
        ValueError: `path` is not directly in the run folder.
    """
    if path.name in ("", ".", "..") or path.parent.resolve() != run_folder.resolve():
        raise ValueError(f"{path} is not in the run folder {run_folder} and was not removed")
    try:
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
    except OSError as error:
        if strict:
            raise
        logger.warning("%s could not be removed (%s)", path, error)


def clean(run_folder: Path) -> None:
    """Remove what a killed process left unfinished, and restore what it was replacing."""
    if not run_folder.is_dir():
        return
    for path in sorted(run_folder.iterdir()):
        found = _LEFTOVER.match(path.name)
        if found is None:
            continue
        final = run_folder / found.group(1)
        if found.group(2) == "previous" and not os.path.lexists(final):
            logger.warning("restored %s: the process ended while it was replaced", final)
            os.replace(path, final)
        else:
            remove(path, run_folder, strict=False)


def list_checkpoints(run_folder: Path) -> list[Path]:
    """The `checkpoint-<step>` folders in a run folder, whole or not, by step."""
    found = [path for path in run_folder.iterdir() if path.is_dir() and CHECKPOINT.match(path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` at the end of the block; on failure nothing changes.

    Args:
        final: a folder in the run folder.

    Raises:
        OSError: the disk is full, or another failure to write; with the path and the remedy.
    """
    previous, partial = (final.with_name(f".{final.name}.{kind}") for kind in ("previous", "partial"))
    for leftover in (partial, previous):
        if leftover == previous and os.path.lexists(previous) and not os.path.lexists(final):
            os.replace(previous, final)
        remove(leftover, final.parent)
    try:
        partial.mkdir(parents=True)
        yield partial
        to_disk(partial)
        if os.path.lexists(final):
            os.replace(final, previous)
        os.replace(partial, final)
    except BaseException as error:
        remove(partial, final.parent, strict=False)
        if os.path.lexists(previous):
            os.replace(previous, final)
        if isinstance(error, Exception) and is_write_failure(error):
            raise write_failure(final, error) from error
        raise
    remove(previous, final.parent, strict=False)


def is_write_failure(error: Exception) -> bool:
    """Whether an error of any type reports a failed write."""
    return isinstance(error, OSError) or any(sign in str(error).lower() for sign in _FULL_DISK)


def write_failure(path: Path, error: Exception) -> OSError:
    """The error for a `path` that could not be written: what is left, how much space is free, the remedy."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free / 2**20
    earlier = list_checkpoints(folder)
    kept = f"the earlier {earlier[-1].name} is whole" if earlier else "there is no earlier checkpoint"
    return OSError(
        getattr(error, "errno", None) or errno.ENOSPC,
        f"could not save {path}: {error}. The partial files were removed; {kept}. {free:.0f} MiB are free there: "
        "free some space (or lower --save_total_limit, or choose another --output_dir) and continue with --resume",
    )
