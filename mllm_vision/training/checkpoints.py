"""Checkpoints that are whole or not there: what happens when the disk is full or the process is killed."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
SEAL = "complete.json"  # names and sizes of all files, written last; a checkpoint whose files differ is torn
UNSEALED = "INCOMPLETE"  # lies in a checkpoint while it is written
_NAME = re.compile(r"^checkpoint-(\d+)$")
# what torch and safetensors say when the disk is full: they do not raise OSError
_FULL_DISK = ("no space left", "disk quota exceeded", "file write failed", "failed writing file", "unexpected pos")


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, by every process: all files are there in their full length.

    One without a seal (of the stock Trainer) passes with a readable trainer state and weights.
    """
    if (checkpoint / UNSEALED).exists():
        return False
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        if (checkpoint / SEAL).is_file():
            sealed = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))["files"]
            return all((checkpoint / name).stat().st_size == size for name, size in sealed.items())
    except (OSError, ValueError, KeyError):
        return False
    return any(checkpoint.glob("*.safetensors")) or any(checkpoint.glob("*/*.safetensors"))


def check_shapes(checkpoint: Path, model: torch.nn.Module) -> None:
    """Refuses weights of other sizes than the model's, before any is loaded.

    Args:
        checkpoint: a folder; where it holds no `model.safetensors` (adapters, shards) nothing is checked.
        model: what is to go on from it.

    Raises:
        ValueError: tensors of the same name and another shape, with the first of them.
    """
    file = checkpoint / "model.safetensors"
    if not file.is_file():
        return
    here = {name: list(value.shape) for name, value in model.state_dict().items()}
    with safe_open(file, "pt") as opened:
        names = [name for name in list(opened.keys()) if name in here]
        there = {name: list(opened.get_slice(name).get_shape()) for name in names}
    other = [name for name in names if there[name] != here[name]]
    if other:
        raise ValueError(
            f"{checkpoint} does not fit this model: {len(other)} of its weights have another size "
            f"({other[0]}: {there[other[0]]} there, {here[other[0]]} here). Resume with the recipe the run was started "
            f"with ({checkpoint.parent / 'recipe.yaml'}), or start anew with --overwrite"
        )


def unsealed(checkpoint: Path) -> None:
    """Begin a checkpoint: until `seal` it counts as torn."""
    checkpoint.mkdir(parents=True)
    (checkpoint / UNSEALED).touch()


def seal(checkpoint: Path) -> None:
    """End a checkpoint: every file is on the disk, and a list of them with their sizes beside it."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name not in (SEAL, UNSEALED))
    for path in files:
        _to_disk(path)
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    (checkpoint / SEAL).write_text(json.dumps({"files": sizes}, indent=1), encoding="utf-8")
    _to_disk(checkpoint / SEAL)
    (checkpoint / UNSEALED).unlink()
    _to_disk(checkpoint)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rotate(run_folder: Path, keep: int | None, best: str | None = None) -> None:
    """Remove torn checkpoints, and whole ones but the last `keep` (None or 0: all stay); the best one stays.

    As in the stock Trainer the best one counts among them, and the last ones are those written last.
    """
    found = sorted(list_checkpoints(run_folder), key=lambda path: path.stat().st_mtime)
    whole = [path for path in found if is_whole(path)]
    gone = [path for path in found if path not in whole]
    if keep and whole:
        protected = [path for path in whole if path == whole[-1] or (best and path.name == Path(best).name)]
        others = [path for path in whole if path not in protected]
        gone += others[: max(0, len(whole) - max(keep, len(protected)))]
    for path in gone:
        shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(run_folder: Path) -> list[Path]:
    """The `checkpoint-<step>` folders in a run folder, whole or not, by step."""
    found = [path for path in run_folder.iterdir() if path.is_dir() and _NAME.match(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(run_folder: Path) -> str | None:
    """The newest whole checkpoint of a run; torn ones are reported and passed over. None where there is none yet.

    Raises:
        FileNotFoundError: there is no run in the folder.
    """
    if not run_folder.is_dir() or not any(run_folder.iterdir()):
        raise FileNotFoundError(f"--resume: {run_folder} holds no run to go on with; leave --resume out to start one")
    for checkpoint in reversed(list_checkpoints(run_folder)):
        if is_whole(checkpoint):
            return str(checkpoint)
        logger.warning("%s is torn (the process ended while it was written); it is passed over", checkpoint)
    logger.warning("%s holds no whole checkpoint yet: the run starts at step 0", run_folder)
    return None


def check_checkpoint(checkpoint: Path) -> Path:
    """`checkpoint` if it is there and whole.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is torn.
    """
    if not checkpoint.is_dir():
        beside = [path.name for path in list_checkpoints(checkpoint.parent)] if checkpoint.parent.is_dir() else []
        raise FileNotFoundError(
            f"--resume_from_checkpoint {checkpoint}: no such folder; beside it are {', '.join(beside) or 'none'}"
        )
    if not is_whole(checkpoint):
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint} is torn: files of it are missing or cut off; "
            "use an earlier checkpoint, or --resume to take the newest whole one"
        )
    return checkpoint


@contextmanager
def whole_folder(final: Path) -> Iterator[None]:
    """Code inside may write the folder `final` step by step; if it fails, what stood there before is back.

    Raises:
        OSError: the disk is full (or another failure to write); names the path and the remedy.
    """
    previous = final.with_name(f".{final.name}.previous")
    if previous.exists():  # left by a process that was killed
        if final.exists():
            shutil.rmtree(previous)
        else:
            os.replace(previous, final)
    if final.exists():
        os.replace(final, previous)
    try:
        yield
    except BaseException as error:
        shutil.rmtree(final, ignore_errors=True)
        if previous.exists():
            os.replace(previous, final)
        if isinstance(error, Exception) and is_write_failure(error):
            raise write_failure(final, error) from error
        raise
    shutil.rmtree(previous, ignore_errors=True)


def is_write_failure(error: Exception) -> bool:
    """Whether an error, of whatever type, says that writing failed."""
    return isinstance(error, OSError) or any(words in str(error).lower() for words in _FULL_DISK)


def write_failure(path: Path, error: Exception) -> OSError:
    """The error for a user whose `path` could not be written: what stands, how much is free, what to do."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free / 2**20
    whole = [checkpoint.name for checkpoint in list_checkpoints(folder) if is_whole(checkpoint)]
    kept = f"the earlier {whole[-1]} is whole" if whole else "no earlier checkpoint was there"
    return OSError(
        getattr(error, "errno", None) or errno.ENOSPC,
        f"could not save {path}: {error}. What was half written is removed; {kept}. {free:.0f} MiB are free there: "
        "make room (or lower --save_total_limit, or choose another --output_dir) and go on with --resume",
    )
