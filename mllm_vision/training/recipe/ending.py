"""What comes after the training: steps that may fail, none of which takes with it what was trained."""

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

PATIENCE = 60.0  # seconds that a rank whose step failed waits for the others to come to its end
_numbers = itertools.count()  # of agreements; every rank makes the same ones in the same order


@dataclass
class Failure:
    """A step that failed: `severe` ones end the run with their own error, the others leave it incomplete."""

    step: str
    error: Exception
    remedy: str = ""
    severe: bool = False

    def entry(self) -> dict[str, str]:
        """For run.json: the step, its cause, and what to do where that is known."""
        return {"step": self.step, "cause": cause_of(self.error)} | ({"remedy": self.remedy} if self.remedy else {})


class Ending:
    """The failures of a run since it trained, and how it ends because of them."""

    def __init__(self) -> None:
        self.failures: list[Failure] = []

    def note(self, failure: Failure) -> None:
        """Keep a failure and warn of it; of one step once."""
        if any(known.step == failure.step for known in self.failures):
            return
        self.failures.append(failure)
        traced = os.environ.get("MLLM_VISION_TRACEBACK", "0") not in ("", "0")
        cause = failure.error if traced else None
        logger.warning("%s failed: %s", failure.step, cause_of(failure.error), exc_info=cause)

    def close(self) -> None:
        """Returns where all went well.

        Raises:
            Exception: the first severe failure's own error.
            IncompleteRun: what was trained is saved, and something else failed.
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
        everywhere: every rank takes this step, and its work holds collectives: it failed if it failed on any rank.
    """
    result, error = None, None
    try:
        result = work(*arguments)
    except Exception as problem:  # whatever it is: the step is lost, the run is not
        error = problem
    if everywhere and world_size() > 1:
        told = _agree(step, error)
        if told and error is None:
            error = RuntimeError("; ".join(f"rank {place}: {cause}" for place, cause in told.items()))
    return (None, error) if error is not None else (result, None)


def cause_of(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    return (f"{kind}: {text}" if text else kind)[:300]


def _agree(step: str, error: Exception | None) -> dict[int, str]:
    """rank -> cause of every rank that failed, the same on all ranks.

    Through the store of the process group and not by a collective: the others may stand in one of the step itself,
    where they wait for the rank that failed. Then that rank gives up after `PATIENCE` seconds, and its end ends them.

    Raises:
        ConnectionError: this rank failed, and another one did not come to the end of the step.
    """
    assert is_distributed()
    # read in torch 2.13: there is no public way to the store that the group was made with
    store = dist.PrefixStore(f"ending/{next(_numbers)}", dist.distributed_c10d._get_default_store())
    store.set(str(rank()), "" if error is None else cause_of(error))
    keys, pause, began = [str(place) for place in range(world_size())], 0.01, time.monotonic()
    while not store.check(keys):
        if error is not None and time.monotonic() - began > PATIENCE:
            raise ConnectionError(
                f"{step} failed on rank {rank()} ({cause_of(error)}) and not on the others, which wait for it: "
                "what was trained is saved; take up the rest with --resume"
            ) from error
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    told = {place: store.get(str(place)).decode() for place in range(world_size())}
    return {place: cause for place, cause in told.items() if cause}
