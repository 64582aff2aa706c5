"""What is written and removed in a run folder: names that stay inside it, folders that are whole or not there.

Everything hidden that a killed process may leave is called `.<name>.previous` (what stood there before) or
`.<name>.partial` (what was being written); `clean` knows no other leftovers.
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
# what torch and safetensors say when the disk is full: they do not raise OSError
_FULL_DISK = ("no space left", "disk quota exceeded", "file write failed", "failed writing file", "unexpected pos")


def check_name(name: str, what: str = "name") -> str:
    """`name` if a folder of that name may be made in a run folder, beside what a run writes there.

    Args:
        name: one folder's name, no path.
        what: what it is called in the message, e.g. "--artifact_name".

    Raises:
        ValueError: it is empty, a path, hidden, taken, too long, or holds control characters.
    """
    if not name or name != name.strip() or any(ord(sign) < 32 or ord(sign) == 127 for sign in name):
        why = "it is empty, or has spaces around it or control characters in it"
    elif "/" in name or "\\" in name or Path(name).is_absolute():
        why = "it is a path, and would be written, and replaced, outside the run folder"
    elif name.startswith("."):
        why = "it begins with a dot: hidden folders are a run's own, and . and .. are no folders in it"
    elif CHECKPOINT.match(name) or name in _TAKEN:
        why = "the run itself writes something of that name"
    elif len(os.fsencode(name)) > 200:
        why = "it is longer than 200 bytes"
    else:
        return name
    raise ValueError(f"{what} {name!r} cannot be used: {why}; give one plain folder name, e.g. model")


def remove(path: Path, run_folder: Path, *, strict: bool = True) -> None:
    """Remove an entry of the run folder: the only place where a folder is deleted. A link goes, not what it points to.

    Args:
        path: directly in `run_folder`.
        strict: raise where the system refuses; otherwise a warning is logged.

    Raises:
        ValueError: `path` is not directly in the run folder.
    """
    if path.name in ("", ".", "..") or path.parent.resolve() != run_folder.resolve():
        raise ValueError(f"{path} is not in the run folder {run_folder}: it is not removed")
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
    """Undo what a killed process left: put back what it had put aside, remove what it had not finished."""
    if not run_folder.is_dir():
        return
    for path in list_checkpoints(run_folder):
        if _unfinished(path):
            logger.warning("%s was not finished (the process ended while it was written); it is removed", path)
            remove(path, run_folder, strict=False)
    for path in sorted(run_folder.iterdir()):
        found = _LEFTOVER.match(path.name)
        if found is None:
            continue
        final = run_folder / found.group(1)
        if found.group(2) == "previous" and not os.path.lexists(final):
            logger.warning("%s is put back: the process ended while another one was written", final)
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


def _unfinished(checkpoint: Path) -> bool:
    return not (checkpoint / "trainer_state.json").exists()


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Gives a folder to write step by step, which becomes `final` at the end; if that fails, all is as it was before.

    Args:
        final: a folder in the run folder.

    Raises:
        OSError: the disk is full (or another failure to write); names the path and the remedy.
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
    """Whether an error, of whatever type, says that writing failed."""
    return isinstance(error, OSError) or any(words in str(error).lower() for words in _FULL_DISK)


def write_failure(path: Path, error: Exception) -> OSError:
    """The error for a user whose `path` could not be written: what stands, how much is free, what to do."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free / 2**20
    whole = [checkpoint.name for checkpoint in list_checkpoints(folder) if not _unfinished(checkpoint)]
    kept = f"the earlier {whole[-1]} is whole" if whole else "no earlier checkpoint was there"
    return OSError(
        getattr(error, "errno", None) or errno.ENOSPC,
        f"could not save {path}: {error}. What was half written is removed; {kept}. {free:.0f} MiB are free there: "
        "make room (or lower --save_total_limit, or choose another --output_dir) and go on with --resume",
    )
