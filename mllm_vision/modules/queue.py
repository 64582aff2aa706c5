"""A first-in-first-out memory of features, the same on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mllm_vision.distributed import all_gather, row_counts


class FeatureQueue(nn.Module):
    """The last `size` rows that were put in, with ids that tell what each row shows.

    A ring of buffers, so that it is part of a checkpoint and a resumed run goes on exactly. It starts empty and
    holds what was put in, no random vectors. What `enqueue` takes is gathered over ranks in rank order, so every
    rank holds the same queue. `size` need not be a multiple of the batch: a batch that reaches the end of the ring
    goes on at its beginning, and of a batch larger than the queue its last rows stay.

    Args:
        size: how many rows are kept.
        width: of a row.
        id_columns: how many ids come with a row; 0 for none.

    Raises:
        ValueError: a size or a width below one.

    Reference:
        He et al., 2020, "Momentum Contrast for Unsupervised Visual Representation Learning", section 3.2
        (https://arxiv.org/abs/1911.05722).

    Example:
        >>> queue = FeatureQueue(3, 1)
        >>> queue.enqueue(torch.tensor([[1.0], [2.0]]))
        >>> queue.enqueue(torch.tensor([[3.0], [4.0]]))
        >>> sorted(queue.rows.flatten().tolist())
        [2.0, 3.0, 4.0]
    """

    features: Tensor
    id_table: Tensor
    written: Tensor

    def __init__(self, size: int, width: int, *, id_columns: int = 0) -> None:
        super().__init__()
        if size < 1 or width < 1 or id_columns < 0:
            raise ValueError(f"size={size} and width={width} must be at least 1, id_columns={id_columns} at least 0")
        self.register_buffer("features", torch.zeros(size, width))
        self.register_buffer("id_table", torch.full((size, id_columns), -1, dtype=torch.int64) if id_columns else None)
        # Rows that ever came in: a buffer for the checkpoint, and an integer beside it, because reading the buffer
        # would wait for whatever the device has to do, several times a step.
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))
        self._written = 0
        self.register_load_state_dict_post_hook(_read_written)

    @property
    def size(self) -> int:
        """How many rows there is room for."""
        return len(self.features)

    def __len__(self) -> int:
        """How many rows it holds."""
        return min(self._written, self.size)

    @property
    def rows(self) -> Tensor:
        """`[len, width]`, in the order of the ring; a view that the next `enqueue` overwrites."""
        return self.features[: len(self)]

    @property
    def ids(self) -> Tensor | None:
        """`[len, id_columns]` of `rows`, or None without id columns."""
        return None if self.id_table is None else self.id_table[: len(self)]

    @torch.no_grad()
    def enqueue(self, rows: Tensor, ids: Tensor | None = None, *, group: dist.ProcessGroup | None = None) -> None:
        """Puts the rows of all ranks in, over the oldest ones.

        Args:
            rows: `[N, width]` of this rank; ranks may hold different N. Stored without gradient, in fp32.
            ids: int64 `[N, id_columns]`; without them the rows get -1, which means unknown.
            group: process group; `None` is the default group when initialised, else this process alone.

        Raises:
            ValueError: shapes that do not fit.
        """
        columns = 0 if self.id_table is None else self.id_table.shape[1]
        if rows.ndim != 2 or rows.shape[1] != self.features.shape[1]:
            raise ValueError(f"rows must be [N, {self.features.shape[1]}], got {list(rows.shape)}")
        if ids is not None and ids.shape != (len(rows), columns):
            raise ValueError(f"ids must be [{len(rows)}, {columns}], got {list(ids.shape)}")
        sizes = row_counts(rows, group)
        rows = all_gather(rows.to(self.features), group, sizes)
        if self.id_table is not None and ids is not None:
            ids = all_gather(ids.to(self.id_table), group, sizes)
        total = len(rows)
        first = max(0, total - self.size)  # of more rows than there is room for, the earlier would be overwritten
        start = (self._written + first) % self.size
        before = min(total - first, self.size - start)  # rows up to the end of the ring; the others go to its beginning
        for place, part in ((start, slice(first, first + before)), (0, slice(first + before, total))):
            here = slice(place, place + part.stop - part.start)
            self.features[here] = rows[part]
            if self.id_table is not None:
                self.id_table[here] = -1 if ids is None else ids[part]
        self._written += total
        self.written.fill_(self._written)


def _read_written(queue: FeatureQueue, _: Any) -> None:
    queue._written = int(queue.written)
