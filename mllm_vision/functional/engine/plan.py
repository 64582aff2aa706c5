"""Plan: the inputs of one tiled loss besides its features."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist

from mllm_vision.distributed import Columns
from mllm_vision.functional.engine.targets import Runs, Targets
from mllm_vision.functional.engine.tiles import Grid


@dataclass
class Plan:
    """How one loss runs: columns, tiles and positives.

    Attributes:
        columns: the columns of all ranks and their exchange.
        grid: the tiles.
        offset: number of this rank's first column, where rows and columns are paired; else `None`.
        targets: the positives; `None` without positives among the columns.
        excluded: pairs that are left out of the softmax.
        by_column: whether each column has a softmax over rows too.
        mirror: the columns are `rows.roll(mirror)`: scores are symmetric, and both halves of the gradient are equal.
        bound: upper bound of the absolute scores in nats, where the host knows one.
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
