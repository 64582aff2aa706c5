"""What the ranks do in test_endings_ranks.py."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from mllm_vision.distributed import rank
from mllm_vision.training.recipe import ending


def failing_on_rank_one(*, alone: bool) -> float:
    """A sum over the ranks; rank 1 fails before it (alone: and the others wait in it) or after it."""
    if rank() == 1 and alone:
        raise RuntimeError("no image here")
    total = torch.ones(())
    dist.all_reduce(total)
    if rank() == 1 and not alone:
        raise RuntimeError("no image here")
    return float(total)


def agreed() -> list[Any]:
    """A step that fails on one rank is one that failed; the next one meets the same collectives on all of them."""
    result, error = ending.attempt("first", lambda: failing_on_rank_one(alone=False), everywhere=True)
    second, none = ending.attempt("second", lambda: float(dist.get_world_size()), everywhere=True)
    return [result, str(error), second, none]


def stuck() -> dict[str, Any]:
    """Rank 1 fails where the others wait in a collective: it gives up, its end frees them, nobody hangs."""
    ending.PATIENCE, began = 0.3, time.monotonic()
    try:
        _, error = ending.attempt("lonely", lambda: failing_on_rank_one(alone=True), everywhere=True)
    except ConnectionError as problem:
        error = problem
        if rank() == 1:
            dist.destroy_process_group()  # as the end of its process would
    return {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - began}


class OneBad(torch.utils.data.Dataset):
    """Held-out rows, of which the one that rank 1 meets second cannot be read."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 3:
            raise OSError("row 3 is gone")
        return torch.tensor([1, 2, 3, 4]) + index


def held_out() -> list[Any]:
    """What two evaluators give: one meets a row on rank 1 that cannot be read, the next one does not."""
    import tiny

    from mllm_vision.evaluation.base import examine
    from mllm_vision.vlm import HeldOutLoss

    def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}

    model, found = tiny.tiny_llama(64), []
    for rows in (OneBad(), [torch.tensor([5, 6])] * 4):
        evaluator = HeldOutLoss("loss", rows, collate, 2)
        result, error = ending.attempt("evaluation", examine, evaluator, model, everywhere=True)
        found.append(str(error) if result is None else result.metrics["loss"])
    return found
