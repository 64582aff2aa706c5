"""Many processes: checks before the start, and messages when another rank is lost.

torchrun starts the ranks, and ends the others when one ends. A collective waits for every rank, at most
`--ddp_timeout` seconds. Recipes import this file: torch is imported only where it is needed.
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

PATIENCE = 3.0  # seconds in which a launcher ends the other ranks after a failure
EXIT_CODE = 75  # of a rank that lost another one (EX_TEMPFAIL: start again with --resume)


def run_recipe(main: Callable[[], Any]) -> None:
    """Run a recipe's `main()`: a user's error becomes `error: ...` on stderr and exit code 2, without traceback.

    Exit code 3: the model is saved, and a step after the training failed (`Run.after_training`). 75: another rank was
    lost. `MLLM_VISION_TRACEBACK=1` also shows the traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # an ASCII pipe must not end the run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except IncompleteRun as error:
        print(f"error: {tidy(str(error))}", file=sys.stderr)
        raise SystemExit(3) from None
    except Exception as error:
        tell_launcher(error)
        message = explain(error)
        if message is None and is_collective_error(error):
            print(lost_rank(error), file=sys.stderr)
            raise SystemExit(EXIT_CODE) from None
        if message is None or os.environ.get("MLLM_VISION_TRACEBACK", "0") not in ("", "0"):
            raise
        if os.environ.get("LOCAL_RANK", "0") != "0":  # the first rank of a machine reports a failure of all
            time.sleep(PATIENCE)
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; a run with checkpoints continues with --resume", file=sys.stderr)
        raise SystemExit(130) from None


# ---- before the start ----------------------------------------------------------------------------------------


def check_launch(arguments: Any) -> None:
    """Refuse settings of FSDP that would silently do something else.

    Args:
        arguments: the `TrainingArguments` as given; `fsdp`, `fsdp_config` and `use_cpu` are read, and the environment
            that `accelerate launch` sets.

    Raises:
        ValueError: FSDP on a CPU (accelerate would train with DDP), FSDP version 1, sharded checkpoints.
    """
    switch = str(arguments.fsdp or False).lower()
    if switch in ("true", "false"):  # on a command line a string, which the Trainer reads as an old option
        arguments.fsdp = switch == "true" or None
    by_flag = bool(arguments.fsdp)
    by_launcher = _is_true("ACCELERATE_USE_FSDP")
    if not by_flag and not by_launcher:
        return
    asked = f"--fsdp {arguments.fsdp}" if by_flag else "the accelerate config (distributed_type: FSDP)"
    if arguments.use_cpu or _is_true("ACCELERATE_USE_CPU") or not _has_accelerator():
        why = "--use_cpu is set" if arguments.use_cpu else "this process has no accelerator"
        raise ValueError(
            f"{asked} asks for FSDP, but {why}: on a CPU it would silently be DDP, the whole model on every process. "
            "Leave FSDP out (torchrun uses DDP), or start on GPUs"
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
    """Refuse a job whose processes would train separately.

    Args:
        arguments: the `TrainingArguments` as constructed.

    Raises:
        ValueError: the launcher started several processes, and the world size is 1: without an accelerator and without
            `--use_cpu` every process would train, and write, by itself.
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
    """Apply `--ddp_timeout` to gloo, on every rank, once the process group exists.

    accelerate passes it to NCCL only; gloo would wait for half an hour. (torch 2.13 has no public name for
    `_set_pg_timeout`.)
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def is_collective_error(error: BaseException) -> bool:
    """Whether an error means that another rank ended or did not answer in time."""
    names = {base.__name__ for base in type(error).__mro__}
    text = str(error).lower()
    signs = ("connection closed by peer", "connection reset", "timed out", "gloo", "nccl", "socket", "broken pipe")
    return "DistError" in names or ("RuntimeError" in names and any(sign in text for sign in signs))


def lost_rank(error: BaseException) -> str:
    """The message of a rank whose collective failed: the meaning, where to find the cause, the remedy."""
    rank, first = os.environ.get("RANK", "0"), (str(error).strip().splitlines() or [""])[0]
    return (
        f"error: rank {rank} lost another rank: it ended, or did not answer within --ddp_timeout ({first[:160]}). The "
        "cause is in the output of that rank, or in the launcher's report of the first failure; checkpoints are kept: "
        "start again with --resume"
    )


def tell_launcher(error: BaseException) -> None:
    """Record an error for torchrun, whose report names the first failed rank and its error."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
