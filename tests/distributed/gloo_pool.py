"""Worker processes that stay alive between tests, so that several ranks cost their start-up once."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _serve(pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while (job := pipe.recv()) is not None:
        function, arguments, rank, world, store = job
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
            torch.manual_seed(0)
            pipe.send(("done", function(*arguments)))
        except BaseException:  # told to the test, which raises it
            pipe.send(("failed", traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


class GlooPool:
    """`run(world, function, *arguments)` calls an importable function on `world` gloo ranks."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Any]] = []
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0

    def run(self, world: int, function: Callable, *arguments: Any, timeout: float = 120) -> list[Any]:
        """What the function returned on every rank, in rank order; an exception on any rank is raised here."""
        context = multiprocessing.get_context("spawn")
        while len(self._workers) < world:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            self._workers.append((process, here))
        self._count += 1
        store = Path(self._folder.name) / f"store-{self._count}"
        for rank, (_, pipe) in enumerate(self._workers[:world]):
            pipe.send((function, arguments, rank, world, store))
        results, errors = [], []
        for rank, (_, pipe) in enumerate(self._workers[:world]):
            if errors or not pipe.poll(timeout):
                errors.append(f"rank {rank} did not answer within {timeout} s")
                continue
            state, value = pipe.recv()
            (results if state == "done" else errors).append(value)
        if errors:
            self.close()  # the other ranks may hang in a collective
            raise AssertionError("\n".join(errors))
        return results

    def close(self) -> None:
        """Ends the workers; the next `run` starts new ones."""
        for process, _ in self._workers:
            process.terminate()
            process.join(10)
        self._workers = []
