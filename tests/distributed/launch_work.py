"""What each rank of test_lost_ranks.py does."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from mllm_vision.training.checkpoint.checkpoints import found_by_first
from mllm_vision.training.checkpoint.signals import AnyRank
from mllm_vision.training.recipe.launch import is_collective_error, limit_collectives


def wait_for_slow_rank(pause: float, timeout: float) -> tuple[str, float]:
    """Rank 1 holds the interpreter for a while before a collective; how this rank's went, and after how long."""
    limit_collectives(timeout)
    began = time.monotonic()
    while dist.get_rank() == 1 and time.monotonic() - began < pause:
        sum(range(3_000_000))
    try:
        total = torch.ones(1)
        dist.all_reduce(total)
    except RuntimeError as error:
        return ("lost" if is_collective_error(error) else str(error)), time.monotonic() - began
    return f"sum {total.item():g}", time.monotonic() - began


def agree() -> list[bool]:
    """Who says yes: nobody, rank 0, rank 1, both."""
    any_rank, rank = AnyRank(torch.device("cpu")), dist.get_rank()
    return [any_rank(says[rank]) for says in ((False, False), (True, False), (False, True), (True, True))]


def found(good: bool) -> str:
    """What the first rank finds; the others do not look."""

    def look() -> str:
        assert dist.get_rank() == 0
        if not good:
            raise FileNotFoundError("no checkpoint here")
        return "checkpoint-4"

    try:
        return str(found_by_first(look))
    except FileNotFoundError as error:
        return f"{type(error).__name__}: {error}"
