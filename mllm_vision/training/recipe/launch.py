"""Many processes: what is refused before they start, and what they say when another one is lost.

Starting the ranks, and ending the others when one ends, is the launcher's work (torchrun). A collective waits for
every rank, at most `--ddp_timeout` seconds: a rank that is slow is not a rank that is dead. torch is imported only
where it is needed: recipes import this file.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from mllm_vision.errors import IncompleteRun, explain, tidy

PATIENCE = 3.0  # seconds that a launcher takes to end the ranks beside one that failed
EXIT_CODE = 75  # of a rank that ends because another one was lost ("temporary failure": start again with --resume)


def run_recipe(main: Callable[[], Any]) -> None:
    """Run a recipe's `main()`: a user's error becomes `error: ...` on stderr and exit code 2, without traceback.

    Exit code 3 says: trained and saved, and something after it failed (`Run.after_training`). 75: another rank was
    lost.

    `MLLM_VISION_TRACEBACK=1` shows the traceback all the same.
    """
    for stream in (sys.stdout, sys.stderr):  # a pipe that takes ascii alone shows signs escaped, and ends no run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except IncompleteRun as error:
        print(f"error: {tidy(str(error))}", file=sys.stderr)
        raise SystemExit(3) from None
    except Exception as error:
        tell_launcher(error)
        told = explain(error)
        if told is None and is_collective_error(error):
            print(lost_rank(error), file=sys.stderr)
            raise SystemExit(EXIT_CODE) from None
        if told is None or os.environ.get("MLLM_VISION_TRACEBACK", "0") not in ("", "0"):
            raise
        _wait_for_the_first_rank()
        print(f"error: {told}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; a run with checkpoints goes on with --resume", file=sys.stderr)
        raise SystemExit(130) from None


def _wait_for_the_first_rank() -> None:
    """Where all ranks of a machine fail for one reason, the first reports it, and the launcher ends the others."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE)


# ---- before the start ----------------------------------------------------------------------------------------


def check_launch(arguments: Any) -> None:
    """Refuses ways to start that would quietly do something else.

    Args:
        arguments: the `TrainingArguments` as given; `fsdp`, `fsdp_config` and `use_cpu` are read, and what
            `accelerate launch` put into the environment.

    Raises:
        ValueError: FSDP on a CPU (accelerate would train with DDP, every rank holding the whole model), FSDP
            version 1, sharded checkpoints.
    """
    word = str(arguments.fsdp or False).lower()
    if word in ("true", "false"):  # on a command line a switch is a word, which the Trainer takes for an old option
        arguments.fsdp = word == "true" or None
    by_flag = bool(arguments.fsdp)
    by_launcher = _is_true("ACCELERATE_USE_FSDP")
    if not by_flag and not by_launcher:
        return
    asked = f"--fsdp {arguments.fsdp}" if by_flag else "the accelerate config (distributed_type: FSDP)"
    if arguments.use_cpu or _is_true("ACCELERATE_USE_CPU") or not _has_accelerator():
        why = "--use_cpu is set" if arguments.use_cpu else "this process has no accelerator"
        raise ValueError(
            f"{asked} asks for FSDP, but {why}: on a CPU it would silently be DDP, the whole model on every process. "
            "Leave FSDP out (torchrun alone gives DDP), or start on GPUs"
        )
    given = arguments.fsdp_config or {}
    if isinstance(given, str):
        given = json.loads(Path(given).read_text(encoding="utf-8"))
    version = given.get("fsdp_version", given.get("version", os.environ.get("FSDP_VERSION", 2)))
    if int(version) != 2:
        raise ValueError(
            f"{asked}: fsdp_version {version} flattens the parameters, which breaks learning rates and weight decay "
            "per module; use fsdp_version 2"
        )
    usual = "FULL_STATE_DICT" if by_flag else os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    if given.get("fsdp_state_dict_type", given.get("state_dict_type", usual)).upper() == "SHARDED_STATE_DICT":
        raise ValueError(f"{asked}: checkpoints here are whole files; set fsdp_state_dict_type: FULL_STATE_DICT")


def check_joined(arguments: Any) -> None:
    """Refuses a job whose processes would not know of each other.

    Args:
        arguments: the `TrainingArguments` as constructed.

    Raises:
        ValueError: the launcher started several processes and this one takes itself for the only one. On a machine
            without accelerator that is what happens without `--use_cpu`: every process would train, and write, alone.
    """
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started > 1 and arguments.world_size == 1:
        raise ValueError(
            f"the launcher started {started} processes, but each would train by itself: no accelerator was found; "
            "add --use_cpu to train them together on the CPU"
        )


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _has_accelerator() -> bool:
    import torch

    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return kind is not None and kind.type not in ("cpu", "mps")


# ---- while it runs -------------------------------------------------------------------------------------------


def limit_collectives(seconds: float) -> None:
    """The longest that a collective waits for a rank; to be called on every rank once the process group is there.

    accelerate hands `ddp_timeout` to NCCL alone; gloo would wait its own half hour. (torch has no public name for this:
    `_set_pg_timeout`, read from 2.13.)
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def is_collective_error(error: BaseException) -> bool:
    """Whether an error says that another rank ended, or kept this one waiting for too long."""
    names = {base.__name__ for base in type(error).__mro__}
    text = str(error).lower()
    signs = ("connection closed by peer", "connection reset", "timed out", "gloo", "nccl", "socket", "broken pipe")
    return "DistError" in names or ("RuntimeError" in names and any(sign in text for sign in signs))


def lost_rank(error: BaseException) -> str:
    """The line for a rank whose collective failed: what that means, where the cause is, how to go on."""
    rank, first = os.environ.get("RANK", "0"), (str(error).strip().splitlines() or [""])[0]
    return (
        f"error: rank {rank} lost another rank: it ended, or did not answer within --ddp_timeout ({first[:160]}). The "
        "cause is in what that rank said, or in the launcher's report of the first failure; what was saved stays: "
        "start again with --resume"
    )


def tell_launcher(error: BaseException) -> None:
    """Leaves an error where torchrun looks for it: its report names the first rank that failed, and why."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
