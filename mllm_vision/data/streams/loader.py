"""A data loader over a stream whose state after every batch is known, whatever the workers have fetched ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from mllm_vision.data.streams.streams import RowReader, StreamDataset
from mllm_vision.errors import short


class StreamLoader:
    """The batches of one rank. Every rank has one; together they go through the stream's global order.

    A global batch is `batch_size * world` rows, the next ones of the order; each rank takes as many. Rows are read in
    this process, encoded, and decoded and transformed in `num_workers` processes. Where the length of a pass is known,
    an iteration is a pass without its last incomplete batch (`len` says how many there are); otherwise it has no end.

    Args:
        dataset: rows to samples.
        batch_size: of one rank.
        rank, world: which of how many ranks this is.
        drop_last: False gives the last, smaller batch of a pass too; on one rank only.
        accumulate: batches that make an optimizer step: a pass holds whole ones, so that their number does not depend
            on how many ranks and batches a step is spread over.
        options: passed on to `torch.utils.data.DataLoader`.

    Raises:
        ValueError: the stream has fewer rows than one global batch; `drop_last=False` on several ranks.
    """

    def __init__(
        self,
        dataset: StreamDataset,
        batch_size: int,
        *,
        collate_fn: Callable | None = None,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = True,
        accumulate: int = 1,
        **options: Any,
    ) -> None:
        self.dataset, self.batch_size, self.rank, self.world = dataset, int(batch_size), rank, world
        self.order = dataset.stream.order()
        if not drop_last and world > 1:
            raise ValueError(
                f"dataloader_drop_last=False cannot give {world} processes equal parts of a stream's last batch; "
                "leave it True (the rest of a pass is left out, and the next pass is shuffled again)"
            )
        self.drop_last, self.accumulate = drop_last, int(accumulate)
        total, batch = self.order.total, self.batch_size * world * self.accumulate
        if total is not None and total < batch and drop_last:
            raise ValueError(
                f"the stream has {total} rows, fewer than one batch of {batch} (per_device_train_batch_size="
                f"{self.batch_size} x {world} processes x gradient_accumulation_steps={self.accumulate}); use "
                f"--per_device_train_batch_size {max(1, total // (world * self.accumulate))}"
            )
        self.reader = RowReader(dataset, self.order, rank, world)
        self._states: deque[dict[str, Any]] = deque()
        self._state = self.order.state_dict()
        options.setdefault(
            "generator", torch.Generator().manual_seed(self.order.seed)
        )  # draws nothing from the model's
        self.batch_sampler = _Batches(self)
        self._loader: DataLoader = DataLoader(
            dataset, batch_sampler=self.batch_sampler, collate_fn=collate_fn, **options
        )

    def __len__(self) -> int:
        if self.order.total is None:
            raise TypeError("the stream has no known length (weights, or shards on the Hub)")
        return self._left(0)

    def _left(self, taken: int) -> int:
        """Batches left of a pass of which so many rows are taken."""
        total, batch = self.order.total or 0, self.batch_size * self.world
        if not self.drop_last:
            return -(-(total - taken) // batch)
        step = batch * self.accumulate
        return max(0, total // step * step - taken) // batch

    @property
    def batches_done(self) -> int:
        """Batches of an iteration before the saved state; 0 if an iteration has no end."""
        return 0 if self.order.total is None else len(self) - self._left(self._state["sources"][0]["taken"])

    @property
    def passes_done(self) -> int:
        """Whole passes before the saved state, where their length is known."""
        source_order = self._state["sources"][0]
        return source_order["turn"] + (self.order.total is not None and self.batches_done == len(self))

    def __iter__(self) -> Iterator[Any]:
        if self._states:  # the last iteration was left before its end: workers had fetched more than was used
            self._states.clear()
            self.order.load_state_dict(self._state)
            self.reader.forget()
        self.reader.settle()
        for batch in self._loader:
            self._state = self._states.popleft()
            yield batch

    # ---- state -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch, JSON-serialisable. The same on every rank."""
        return {"identity": self.order.identity, **self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which the state was taken; ranks and batch size may differ.

        Raises:
            ValueError: the state is of another stream; says in what.
        """
        own, saved = self.order.identity, state["identity"]
        different = [name for name in own if own[name] != saved.get(name)]
        if different:
            name = different[0]
            then, now = short(saved.get(name), 120), short(own[name], 120)
            raise ValueError(
                f"the checkpoint's stream has another {name}: {then}, now {now}; its order cannot be continued. Resume"
                " with the flags and shards the run was started with"
            )
        self._states.clear()
        self.order.load_state_dict(state)
        self._state = self.order.state_dict()
        self.reader.forget()


class _Batches:
    """What the workers are given, batch by batch: this rank's rows. Notes the order's state after each."""

    def __init__(self, loader: StreamLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[list[Any]]:
        loader, order = self.loader, self.loader.order
        batch, bounded, source_order = loader.batch_size * loader.world, order.total is not None, order.source_orders[0]
        if bounded and not loader._left(source_order.taken):
            order.next_pass()
            loader.reader.forget()
        while not bounded or loader._left(source_order.taken):
            count = batch if order.total is None else min(batch, order.total - source_order.taken)
            rows = loader.reader.read(order.take(count))
            loader._states.append(order.state_dict())
            yield rows
