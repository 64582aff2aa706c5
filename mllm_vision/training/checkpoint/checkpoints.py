"""Checkpoints that are whole or do not count: sealed with a hash of every file, ordered by their step."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors import safe_open

from mllm_vision.distributed import is_distributed
from mllm_vision.training.recipe.folders import UNSEALED, list_checkpoints, remove, step_of, to_disk, write_whole

__all__ = ["is_whole", "last_checkpoint", "list_checkpoints", "rotate", "seal"]
logger = logging.getLogger(__name__)

Found = TypeVar("Found")
STATE_FILE = "trainer_state.json"
SEAL = "complete.json"  # sizes and hashes of all files, written last; a checkpoint whose files differ is torn


def damage(checkpoint: Path, *, contents: bool = False) -> str | None:
    """What is wrong with a checkpoint, or None where it was written to its end, by every process.

    Args:
        checkpoint: a folder. One without a seal (of the stock Trainer) passes with a readable state and weights.
        contents: compare the hash of every file too (about a second a gigabyte), not its size alone.
    """
    if (checkpoint / UNSEALED).exists():
        return "the process ended while it was written"
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        sealed = json.loads((checkpoint / SEAL).read_text(encoding="utf-8")) if (checkpoint / SEAL).exists() else None
        for name, size in (sealed or {"files": {}})["files"].items():
            if (checkpoint / name).stat().st_size != size:
                return f"{name} is {(checkpoint / name).stat().st_size} bytes long, it was written with {size}"
        for name, expected in (sealed or {}).get("sha256", {}).items() if contents else ():
            if _hash(checkpoint / name) != expected:
                return f"the content of {name} is not what was written (sha256): the disk or a copy changed it"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{STATE_FILE} or {SEAL} cannot be read ({error})"
    if sealed is None and not any(checkpoint.rglob("*.safetensors")):
        return "it holds no weights"
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint are there in their full length; their contents are not read."""
    return damage(checkpoint) is None


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
    """End a checkpoint: every file is on the disk, and a list of them with sizes and hashes beside it."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name not in (SEAL, UNSEALED))
    for path in files:
        to_disk(path)
    names = {str(path.relative_to(checkpoint)): path for path in files}
    listed = {
        "files": {name: path.stat().st_size for name, path in names.items()},
        "sha256": {name: _hash(path) for name, path in names.items()},
    }
    write_whole(checkpoint / SEAL, json.dumps(listed, indent=1))
    (checkpoint / UNSEALED).unlink()
    to_disk(checkpoint)


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def rotate(run_folder: Path, keep: int | None, best: str | None = None, step: int | None = None) -> None:
    """Remove torn checkpoints, and whole ones but the last `keep` (None or 0: all stay); the best one stays.

    As in the stock Trainer the best one counts among them. The last ones are those of the highest steps, whatever the
    clock said when they were written.

    Args:
        step: of the checkpoint just written. Those of later steps belong to a continuation that was given up by
            resuming from before them: they go.
    """
    found = list_checkpoints(run_folder)
    left = [path for path in found if step is not None and step_of(path) > step]
    if left:
        logger.warning("removed %s: the run was resumed before them", ", ".join(path.name for path in left))
    whole = [path for path in found if path not in left and is_whole(path)]
    gone = [path for path in found if path not in whole]
    if keep and whole:
        protected = [path for path in whole if path == whole[-1] or (best and path.name == Path(best).name)]
        others = [path for path in whole if path not in protected]
        gone += others[: max(0, len(whole) - max(keep, len(protected)))]
    for path in gone:
        remove(path, run_folder, strict=False)


def last_checkpoint(run_folder: Path) -> str | None:
    """The newest whole checkpoint of a run; torn ones are reported and passed over. None where there is none yet.

    Raises:
        FileNotFoundError: there is no run in the folder.
    """
    if not run_folder.is_dir() or not any(run_folder.iterdir()):
        raise FileNotFoundError(f"--resume: {run_folder} holds no run to go on with; leave --resume out to start one")
    for checkpoint in reversed(list_checkpoints(run_folder)):
        wrong = damage(checkpoint, contents=True)
        if wrong is None:
            return str(checkpoint)
        logger.warning("%s is torn: %s; it is passed over", checkpoint, wrong)
    logger.warning("%s holds no whole checkpoint yet: the run starts at step 0", run_folder)
    return None


def check_checkpoint(checkpoint: Path) -> Path:
    """`checkpoint` if it is there and whole, its contents included.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is torn.
    """
    if not checkpoint.is_dir():
        beside = [path.name for path in list_checkpoints(checkpoint.parent)] if checkpoint.parent.is_dir() else []
        raise FileNotFoundError(
            f"--resume_from_checkpoint {checkpoint}: no such folder; beside it are {', '.join(beside) or 'none'}"
        )
    wrong = damage(checkpoint, contents=True)
    if wrong is not None:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint} is torn: {wrong}; "
            "use an earlier checkpoint, or --resume to take the newest whole one"
        )
    return checkpoint


def found_by_first(find: Callable[[], Found]) -> Found:
    """What the first process finds, on every process: a folder is judged once. All raise its error."""
    if not is_distributed():
        return find()
    answer: list = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = find()
        except (ValueError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
