"""Checkpoint folders: the manifest, damage, the newest one, and the removal of old ones."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import safe_open

from mllm_vision.distributed import is_distributed
from mllm_vision.training.recipe.folders import list_checkpoints, remove, step_of

logger = logging.getLogger(__name__)

Found = TypeVar("Found")
STATE_FILE = "trainer_state.json"
MANIFEST = "complete.json"  # size and sha256 of every other file, written last


def write_manifest(checkpoint: Path) -> None:
    """List every file of a checkpoint with its size and sha256."""
    files = {str(path.relative_to(checkpoint)): path for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    listed = {
        "files": {name: path.stat().st_size for name, path in files.items()},
        "sha256": {name: _hash(path) for name, path in files.items()},
    }
    (checkpoint / MANIFEST).write_text(json.dumps(listed, indent=1), encoding="utf-8")


def damage(checkpoint: Path, *, contents: bool = False) -> str | None:
    """What is wrong with a checkpoint, or None.

    Args:
        checkpoint: a folder. Without a manifest (the stock Trainer's) a readable state and weights suffice.
        contents: also compare the hash of every file (about a second per gigabyte).
    """
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        if not (checkpoint / MANIFEST).exists():
            return None if any(checkpoint.rglob("*.safetensors")) else "it contains no weights"
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, size in manifest["files"].items():
            if (found := (checkpoint / name).stat().st_size) != size:
                return f"{name} has {found} bytes, {size} were written"
        for name, expected in manifest.get("sha256", {}).items() if contents else ():
            if _hash(checkpoint / name) != expected:
                return f"the content of {name} differs from what was written (sha256)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{STATE_FILE} or {MANIFEST} cannot be read ({error})"
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint exist with their sizes."""
    return damage(checkpoint) is None


def check_shapes(checkpoint: Path, model: Any) -> None:
    """Compare the shapes of the weights with the model's, before loading.

    Raises:
        ValueError: a tensor has another shape. Nothing is checked without a `model.safetensors`.
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
            f"with ({checkpoint.parent / 'recipe.yaml'}), or start from scratch with --overwrite"
        )


def check_complete(checkpoint: Path, processes: int, accept: bool) -> None:
    """Look for optimizer, schedule and random states, which an exact resume needs.

    Args:
        checkpoint: a folder.
        processes: how many wrote it.
        accept: log what is missing instead of raising.

    Raises:
        ValueError: with the missing files.
    """
    names = {path.name for path in checkpoint.iterdir()}
    random = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    missing = [name for name in ("scheduler.pt", *random) if name not in names]
    if not any(name.startswith(("optimizer", "pytorch_model_fsdp", "global_step")) for name in names):
        missing.insert(0, "optimizer.pt")
    if missing and not accept:
        raise ValueError(
            f"{checkpoint} has no {', '.join(missing)}: only its weights could be resumed. "
            "Resume from a complete checkpoint (one saved without --save_only_model), or give --accept_missing_state"
        )
    if missing:
        logger.warning("%s has no %s: they start from scratch (--accept_missing_state)", checkpoint, ", ".join(missing))


def rotate(run_folder: Path, keep: int | None, best: str | None = None, step: int | None = None) -> None:
    """Remove damaged checkpoints, and whole ones but the last `keep` (None or 0: all stay); the best one stays.

    As in the stock Trainer the best one counts among `keep`. The order is by step, not by time.

    Args:
        run_folder: contains the checkpoints.
        keep: how many stay.
        best: path of the best checkpoint.
        step: of the checkpoint just written; later ones, of an abandoned continuation, are removed.
    """
    found = list_checkpoints(run_folder)
    left = [path for path in found if step is not None and step_of(path) > step]
    if left:
        logger.warning("removed %s: the run was resumed from an earlier step", ", ".join(path.name for path in left))
    whole = [path for path in found if path not in left and is_whole(path)]
    gone = [path for path in found if path not in whole]
    if keep and whole:
        protected = [path for path in whole if path == whole[-1] or (best and path.name == Path(best).name)]
        others = [path for path in whole if path not in protected]
        gone += others[: max(0, len(whole) - max(keep, len(protected)))]
    for path in gone:
        remove(path, run_folder, strict=False)


def last_checkpoint(run_folder: Path) -> str | None:
    """The newest whole checkpoint of a run, or None; damaged ones are logged and skipped.

    Raises:
        FileNotFoundError: the folder contains no run.
    """
    if not run_folder.is_dir() or not any(run_folder.iterdir()):
        raise FileNotFoundError(f"--resume: {run_folder} contains no run to resume; leave --resume out to start one")
    for checkpoint in reversed(list_checkpoints(run_folder)):
        wrong = damage(checkpoint, contents=True)
        if wrong is None:
            return str(checkpoint)
        logger.warning("skipped %s, which is damaged: %s", checkpoint, wrong)
    logger.warning("%s contains no checkpoint to resume from: the run starts at step 0", run_folder)
    return None


def check_checkpoint(checkpoint: Path) -> Path:
    """`checkpoint` if it exists and is whole, contents included.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is damaged.
    """
    if not checkpoint.is_dir():
        beside = [path.name for path in list_checkpoints(checkpoint.parent)] if checkpoint.parent.is_dir() else []
        raise FileNotFoundError(
            f"--resume_from_checkpoint {checkpoint}: no such folder; found {', '.join(beside) or 'none'}"
        )
    wrong = damage(checkpoint, contents=True)
    if wrong is not None:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint} is damaged: {wrong}; "
            "use an earlier checkpoint, or --resume for the newest whole one"
        )
    return checkpoint


def found_by_first(find: Callable[[], Found]) -> Found:
    """The result of `find` on the first process, on every process; all raise its error."""
    if not is_distributed():
        return find()
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = find()
        except (ValueError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def barrier() -> None:
    """Wait for all processes, where there are several."""
    if is_distributed():
        dist.barrier()


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
