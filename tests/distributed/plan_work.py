"""What the ranks do in test_plan.py: losses with every byte that is sent counted."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mllm_vision.functional.image_text import clip_loss, siglip_loss

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "benchmark"))


class Counter:
    """Counts what this rank sends, as ring collectives do: a gathered block passes every rank but one."""

    def __init__(self, monkey: dict) -> None:
        self.sent, self.world, self.kept = 0.0, dist.get_world_size(), monkey
        share = self.world - 1
        new = hasattr(dist, "all_gather_single")  # torch 2.13 renamed both
        gather = "all_gather_single" if new else "all_gather_into_tensor"
        scatter = "reduce_scatter_single" if new else "reduce_scatter_tensor"
        self._wrap(gather, lambda output, rows, **_: rows.nbytes * share)
        self._wrap(scatter, lambda output, rows, **_: rows.nbytes / self.world * share)
        self._wrap("all_reduce", lambda value, **_: 2 * value.nbytes / self.world * share)
        self._wrap("batch_isend_irecv", lambda ops: sum(op.tensor.nbytes for op in ops if op.op is dist.isend))

    def _wrap(self, name: str, count) -> None:
        usual = self.kept[name] = getattr(dist, name)

        def counting(*args, **kwargs):
            self.sent += count(*args, **{key: value for key, value in kwargs.items() if key not in ("op", "group")})
            return usual(*args, **kwargs)

        setattr(dist, name, counting)

    def close(self) -> None:
        for name, usual in self.kept.items():
            setattr(dist, name, usual)


def loss(kind, exchange, rows, dimension, tile):
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    image, text = (torch.randn(rows, dimension, requires_grad=True) for _ in range(2))
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)

    def step():
        image.grad = text.grad = None
        if kind == "clip":
            clip_loss(image, text, scale, exchange=exchange, tile_size=tile).backward()
        else:
            siglip_loss(image, text, scale, bias, exchange=exchange, tile_size=tile).backward()

    return step


def sent(kind, exchange, rows, dimension):
    step = loss(kind, exchange, rows, dimension, 64)
    counter = Counter({})
    try:
        step()
    finally:
        counter.close()
    return counter.sent


def peak(kind, exchange, rows, dimension, tile):
    from timing import peak_memory

    step = loss(kind, exchange, rows, dimension, tile)
    step()
    dist.barrier()
    return peak_memory(step)
