"""Plan: all that one tiled loss needs to know besides its features."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist

from mllm_vision.distributed import Columns
from mllm_vision.functional.engine.targets import Runs, Targets
from mllm_vision.functional.engine.tiles import Grid


@dataclass
class Plan:
    """How one loss runs: whose rows, whose columns, in which tiles, with which positives.

    Attributes:
        columns: how the columns come by.
        grid: the tiles.
        offset: number of this rank's first column, where rows and columns belong together; else `None`.
        targets: the positives; `None` where there are none among the columns.
        excluded: pairs that are left out altogether.
        by_column: whether the softmax runs over rows too, for a loss of each column.
        mirror: rows are the columns in another order, `rows.roll(mirror)`: then the scores are symmetric, what
            holds for a row holds for its column, and half of the gradient is the other half.
        bound: what no score exceeds in absolute value, in nats, where the host knows that much.
    """

    columns: Columns
    grid: Grid
    offset: int | None = None
    targets: Targets | None = None
    excluded: Runs | None = None
    by_column: bool = True
    mirror: int | None = None
    bound: float | None = None
    sizes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = self.columns.sizes

    @property
    def total(self) -> int:
        """Number of columns, of all ranks."""
        return sum(self.sizes)

    @property
    def group(self) -> dist.ProcessGroup | None:
        return self.columns.group
