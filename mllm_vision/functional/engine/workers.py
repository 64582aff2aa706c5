"""Tiles in parallel: one tile per thread, with sums in the order of a single thread.

By default torch splits each operation over the cores and waits for the slowest one. A tile takes about ten operations
of a few milliseconds, so a busy core delays all of them, and the loss becomes several times slower. Here each thread
computes whole tiles: a busy core delays its own tile only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mllm_vision.functional.engine.tiles import Grid

STRIPS_PER_WORKER = 2  # strips of rows and of columns: with fewer, workers wait for each other

# (tile, spare tile, row strip, column strip, scaled rows, columns, their gradient or None) -> collected result
Work = Callable[[Tensor, Tensor, int, int, Tensor, Tensor, Tensor | None], Any]


def for_each_tile(
    x: Tensor, factor: Tensor, blocks: Iterable[tuple[int, Tensor, Tensor | None]], grid: Grid, work: Work
) -> list[Any]:
    """Computes every tile of `factor * x @ block.T` and passes it to `work`.

    Args:
        x: `[n, D]` rows of this rank.
        factor: 0-d tensor.
        blocks: number of the first column, columns `[m, D]` and their gradient, as yielded by `Columns.iterate`.
        grid: the tiles.
        work: receives the tile, a spare buffer of its shape, the numbers of its row and column strip, the scaled rows,
            the columns and their gradient; it may overwrite both buffers. It runs on several threads, but never for
            two tiles of one strip at once, and along a strip in order.

    Returns:
        The results of `work`, block by block and row strip by row strip.
    """
    workers = worker_count(x, grid)
    scratch = [_Scratch(x, factor, grid) for _ in range(workers)]

    def one_block(start: int, block: Tensor, gradient: Tensor | None) -> list[Any]:
        strips = list(grid.of_block(start, len(block)))
        found: list[Any] = [None] * (len(grid.rows) * len(strips))

        def compute(worker: int, row: int, place: int) -> None:
            index, across = strips[place]
            local = slice(across.start - start, across.stop - start)
            scaled, tile, spare = scratch[worker].of(row, across.stop - across.start)
            torch.mm(scaled, block[local].T, out=tile)
            own = None if gradient is None else gradient[local]
            found[row * len(strips) + place] = work(tile, spare, row, index, scaled, block[local], own)

        in_order(len(grid.rows), len(strips), compute, workers)
        return found

    return [result for start, block, gradient in blocks for result in one_block(start, block, gradient)]


class _Scratch:
    """The buffers of one worker."""

    def __init__(self, x: Tensor, factor: Tensor, grid: Grid) -> None:
        self._x, self._factor, self._rows = x, factor, grid.rows
        rows = grid.rows[0].stop
        self._tiles = [x.new_empty(rows * grid.widest) for _ in range(2)]
        self._scaled, self._row = x.new_empty(rows, x.shape[1]), -1

    def of(self, row: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """The scaled rows of a strip, and two buffers `[rows, width]`."""
        down = self._rows[row]
        height = down.stop - down.start
        scaled = self._scaled[:height]
        if row != self._row:
            torch.mul(self._x[down], self._factor, out=scaled)
            self._row = row
        tile, spare = (flat[: height * width].view(height, width) for flat in self._tiles)
        return scaled, tile, spare


def worker_count(x: Tensor, grid: Grid) -> int:
    """Threads that share the tiles: torch's number if there are enough tiles.

    One under fake or traced tensors, dispatch modes and compilation, which are local to this thread.
    """
    if x.device.type != "cpu" or type(x) is not Tensor or torch.compiler.is_compiling():
        return 1
    if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
        return 1
    return max(1, min(torch.get_num_threads(), min(len(grid.rows), len(grid.columns)) // STRIPS_PER_WORKER))


def in_order(rows: int, columns: int, compute: Callable[[int, int, int], None], workers: int) -> None:
    """Calls `compute(worker, row, column)` for every tile, from `workers` threads.

    A tile waits for its left and its upper neighbour, so that sums along rows and columns do not depend on the number
    of workers. Each thread uses an equal share of torch's threads. The first error of `compute` is raised; tiles not
    yet started are skipped.
    """
    if workers == 1:
        for row in range(rows):
            for column in range(columns):
                compute(0, row, column)
        return
    queue = _Queue(rows, columns)
    threads, recording = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def serve(worker: int) -> None:
        torch.set_num_threads(threads // workers)  # for this thread only: OpenMP's setting is thread-local
        with torch.inference_mode(recording), torch.no_grad():
            queue.serve(lambda row, column: compute(worker, row, column))

    try:
        with ThreadPoolExecutor(workers - 1, "tiles") as pool:
            others = [pool.submit(serve, worker) for worker in range(1, workers)]
            serve(0)
            for other in others:
                other.result()
    finally:
        torch.set_num_threads(threads)


class _Queue:
    """The tiles not yet computed; any number of threads call `serve`."""

    def __init__(self, rows: int, columns: int) -> None:
        self._columns = columns
        self._done = [0] * rows  # tiles of each row, from the left
        self._taken = [False] * rows
        self._failed = False
        self._changed = threading.Condition()

    def serve(self, compute: Callable[[int, int], None]) -> None:
        row: int | None = None
        while (row := self._take(row)) is not None:
            try:
                compute(row, self._done[row])
            except BaseException:
                self._failed = True
                raise
            finally:
                with self._changed:
                    self._done[row] += 1
                    self._taken[row] = False
                    self._changed.notify_all()

    def _take(self, last: int | None) -> int | None:
        """A row whose next tile is ready, preferably `last`; None when nothing is left."""
        with self._changed:
            while not self._failed and self._done[-1] < self._columns:
                ready = [row for row in range(len(self._done)) if self._ready(row)]
                if ready:
                    row = last if last in ready else min(ready, key=lambda row: row + self._done[row])
                    self._taken[row] = True
                    return row
                self._changed.wait()
            return None

    def _ready(self, row: int) -> bool:
        done = self._done[row]
        return not self._taken[row] and done < self._columns and (row == 0 or self._done[row - 1] > done)
