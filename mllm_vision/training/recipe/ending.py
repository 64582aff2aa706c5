"""Steps after the training: any of them may fail without losing what was trained."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from mllm_vision.distributed import is_distributed, rank, world_size
from mllm_vision.errors import IncompleteRun

logger = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds that a rank whose step failed waits for the others
_numbers = itertools.count()  # of agreements, the same on every rank


@dataclass
class Failure:
    """A failed step: a `severe` one ends the run with its own error, the others leave it incomplete."""

    step: str
    error: Exception
    remedy: str = ""
    severe: bool = False

    def entry(self) -> dict[str, str]:
        """For run.json: the step, its cause, and the remedy where one is known."""
        return {"step": self.step, "cause": cause_of(self.error)} | ({"remedy": self.remedy} if self.remedy else {})


class Ending:
    """The failures after the training, and the exit of the run."""

    def __init__(self) -> None:
        self.failures: list[Failure] = []

    def note(self, failure: Failure) -> None:
        """Keep a failure and log it, once per step."""
        if any(known.step == failure.step for known in self.failures):
            return
        self.failures.append(failure)
        traced = os.environ.get("MLLM_VISION_TRACEBACK", "0") not in ("", "0")
        cause = failure.error if traced else None
        logger.warning("%s failed: %s", failure.step, cause_of(failure.error), exc_info=cause)

    def close(self) -> None:
        """Raise if a step failed.

        Raises:
            Exception: the first severe failure's own error.
            IncompleteRun: the model is saved, and another step failed.
        """
        for failure in self.failures:
            if failure.severe:
                raise failure.error
        if self.failures:
            steps = ", ".join(failure.step for failure in self.failures)
            raise IncompleteRun(f"trained and saved; failed: {steps} (the table above says why)")


def attempt(step: str, work: Callable[..., Any], *arguments: Any, everywhere: bool = False) -> tuple[Any, Any]:
    """(what `work(*arguments)` returned, None), or (None, its exception). Interrupts pass through.

    Args:
        step: its name, for messages.
        everywhere: every rank runs the step, which contains collectives; it failed if it failed on any rank.
    """
    result, error = None, None
    try:
        result = work(*arguments)
    except Exception as problem:  # the step is lost, the run is not
        error = problem
    if everywhere and world_size() > 1:
        failed = _agree(step, error)
        if failed and error is None:
            error = RuntimeError("; ".join(f"rank {place}: {cause}" for place, cause in failed.items()))
    return (None, error) if error is not None else (result, None)


def cause_of(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    return (f"{kind}: {text}" if text else kind)[:300]


def _agree(step: str, error: Exception | None) -> dict[int, str]:
    """rank -> cause of every rank that failed, the same on all ranks.

    Through the store of the process group, not a collective: the others may be waiting in a collective of the step.

    Raises:
        ConnectionError: this rank failed, and another did not reach the end of the step within `PATIENCE` seconds.
    """
    assert is_distributed()
    # torch 2.13 has no public access to the store of the default group
    store = dist.PrefixStore(f"ending/{next(_numbers)}", dist.distributed_c10d._get_default_store())
    store.set(str(rank()), "" if error is None else cause_of(error))
    keys, pause, began = [str(place) for place in range(world_size())], 0.01, time.monotonic()
    while not store.check(keys):
        if error is not None and time.monotonic() - began > PATIENCE:
            raise ConnectionError(
                f"{step} failed on rank {rank()} ({cause_of(error)}) and not on the others, which wait for it: "
                "the model is saved; repeat the rest with --resume"
            ) from error
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    failed = {place: store.get(str(place)).decode() for place in range(world_size())}
    return {place: cause for place, cause in failed.items() if cause}
