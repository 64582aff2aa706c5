"""Tiles of the matrix of all pairs, and their size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from mllm_vision.distributed import rank

# Large enough for fast matrix products, small enough for the cache. 768 was measured on a CPU (docs/engine.md); 4096
# for a GPU was not measured.
TILE_ON_CPU, TILE_ON_GPU = 768, 4096
SMALLEST_TILE = 256  # lower limit where tiles are shared by several CPU threads


class Grid:
    """The rectangle of `rows` local rows by the columns of all ranks, in tiles.

    Args:
        rows: number of rows.
        blocks: (first, last + 1) of the blocks of columns; a tile never spans two blocks.
        size: maximal rows and columns of a tile.
    """

    def __init__(self, rows: int, blocks: list[tuple[int, int]], size: int) -> None:
        self.size = size
        self.rows = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
        self.columns = [
            slice(start, min(start + size, stop)) for first, stop in blocks for start in range(first, stop, size)
        ]
        self._starts = [columns.start for columns in self.columns]
        self.widest = max(columns.stop - columns.start for columns in self.columns)

    def of_block(self, start: int, length: int) -> Iterator[tuple[int, slice]]:
        """(number, columns) of the column strips of the block of `length` columns that starts at `start`."""
        for index, columns in enumerate(self.columns):
            if start <= columns.start < start + length:
                yield index, columns

    def number(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Number of each pair's tile, row by row."""
        strips = torch.bucketize(columns, torch.tensor(self._starts, device=columns.device), right=True) - 1
        return rows // self.size * len(self.columns) + strips


def choose_tile(tile_size: int | None, device: torch.device, rows: int = 0) -> int:
    """`tile_size`, or a size for the device and the number of rows; raises ValueError for a size below one."""
    if tile_size is not None:
        if tile_size < 1:
            raise ValueError(f"tile_size={tile_size} must be at least 1; None chooses one")
        return int(tile_size)
    if device.type != "cpu":
        return TILE_ON_GPU
    threads = cpu_threads()
    if threads == 1 or rows < 4 * SMALLEST_TILE:
        return TILE_ON_CPU
    return min(TILE_ON_CPU, max(SMALLEST_TILE, -(-rows // (2 * threads))))  # two strips of rows per thread


@torch.compiler.assume_constant_result
def cpu_threads() -> int:
    """Number of threads of one operation; a constant in compiled code, where the call would break the graph."""
    return torch.get_num_threads()


def first_row(sizes: list[int], group: dist.ProcessGroup | None) -> int:
    """Number of this rank's first row among those of all ranks."""
    return sum(sizes[: rank(group)]) if len(sizes) > 1 else 0
