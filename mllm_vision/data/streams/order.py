"""The order of a stream: which row comes when, as numbers alone, the same on every rank and for every number of ranks.

The order depends on the shards, the seed, the size of the shuffle buffer and the number of readers (the canonical nodes
of MosaicML's StreamingDataset), not on the number of ranks or workers or on the batch size. Every rank computes all of
it and reads only its own rows: an order consists of integers, and so does its state.

Each reader reads its share of the shards, one after the other, into its share of the shuffle buffer. Rows are drawn
from the readers round-robin.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mllm_vision.data.streams.shards import Shard

_BLOCK = 1024  # random numbers made at once
_MASK = (1 << 64) - 1


class RowPosition(NamedTuple):
    """A row's position: source, shard and row in the shard; the epoch of the source, and the reader it came from."""

    source: int
    shard: int
    row: int
    epoch: int
    reader: int


class Source:
    """One data set of a stream: its shards, and how often it is drawn.

    Args:
        shards: in a fixed order.
        weight: relative to the other sources of the stream.

    Raises:
        ValueError: no shards, a weight that is not positive.
    """

    def __init__(self, shards: Sequence[Shard], *, weight: float = 1.0) -> None:
        if not shards:
            raise ValueError("a stream needs at least one shard")
        if not weight > 0:
            raise ValueError(f"weight={weight} of {shards[0].name} must be positive; leave the data set out instead")
        self.shards, self.weight = list(shards), float(weight)
        self._starts: dict[int, np.ndarray] = {}

    @property
    def known(self) -> bool:
        """Whether its rows can be counted without fetching shards."""
        return all(shard.local for shard in self.shards)

    def starts(self, shard: int) -> np.ndarray:
        """First row of each of a shard's groups, and the number of all its rows at the end."""
        if shard not in self._starts:
            self._starts[shard] = np.concatenate([[0], np.cumsum(self.shards[shard].groups)]).astype(np.int64)
        return self._starts[shard]

    def group_of(self, shard: int, row: int) -> int:
        """The group of its shard that contains a row."""
        return int(np.searchsorted(self.starts(shard), row, side="right")) - 1


class _Draws:
    """Random 64-bit numbers by index: the n-th depends on the key and n alone (splitmix64), so nothing is saved."""

    def __init__(self, *key: int) -> None:
        state = np.uint64(0x9E3779B97F4A7C15)
        for value in key:
            state = _splitmix(np.uint64((int(state) ^ (value & _MASK)) & _MASK))
        self._base = int(state)
        self._block, self._numbers = -1, [0]

    def __call__(self, index: int) -> int:
        block, place = divmod(index, _BLOCK)
        if block != self._block:
            counters = np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.uint64)
            with np.errstate(over="ignore"):
                mixed = _splitmix(np.uint64(self._base) + counters * np.uint64(0x9E3779B97F4A7C15))
            self._block, self._numbers = block, mixed.tolist()  # Python's numbers: quicker one by one
        return self._numbers[place]

    def shuffled(self, count: int) -> list[int]:
        """A permutation of `count` numbers (Fisher and Yates)."""
        order = list(range(count))
        for last in range(count - 1, 0, -1):
            other = self(last) % (last + 1)
            order[last], order[other] = order[other], order[last]
        return order


def _splitmix(state: Any) -> Any:
    with np.errstate(over="ignore"):
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


class _ShardReader:
    """A share of a source's shards, read one after the other into a share of the shuffle buffer."""

    def __init__(self, source: Source, shards: Sequence[int], size: int, draws: _Draws) -> None:
        self.source, self.shards, self.size, self.draws = source, list(shards), max(1, size), draws
        self.place, self.group, self.offset = 0, 0, 0  # which of its shards, group of the shard, row of the group
        self.drawn = 0
        self.buffer: list[int] = []  # shard << 32 | row
        self._rows: range | None = None

    def _open(self) -> bool:
        """Whether a row is left; moves on to the next group that has one."""
        while self._rows is None or self.offset >= len(self._rows):
            if self._rows is not None:
                self.group, self.offset, self._rows = self.group + 1, 0, None
            if self.place >= len(self.shards):
                return False
            shard = self.shards[self.place]
            if self.group < len(self.source.shards[shard].groups):
                start, stop = (
                    int(row) | (shard << 32) for row in self.source.starts(shard)[self.group : self.group + 2]
                )
                self._rows = range(start, stop)
            else:
                self.place, self.group, self.offset = self.place + 1, 0, 0
        return True

    def draw(self) -> int | None:
        """The next row, or None when none is left in this epoch."""
        buffer = self.buffer
        while len(buffer) < self.size and self._open():
            assert self._rows is not None
            rows = self._rows[self.offset : self.offset + self.size - len(buffer)]
            buffer += rows
            self.offset += len(rows)
        if not buffer:
            return None
        place = self.draws(self.drawn) % len(buffer)
        self.drawn += 1
        row = buffer[place]
        if self._open():
            assert self._rows is not None
            buffer[place] = self._rows[self.offset]
            self.offset += 1
        else:
            buffer[place] = buffer[-1]
            buffer.pop()
        self._open()  # so that one place has one state, on every rank
        return row

    def waiting(self, shard: int, group: int) -> set[int]:
        """The rows of a group that are still to be drawn in this pass."""
        start, stop = self.source.starts(shard)[group : group + 2] | (shard << 32)
        rows = {row & 0xFFFFFFFF for row in self.buffer if start <= row < stop}
        coming, here = self._open(), (self.place, self.group)
        place = (self.shards.index(shard), group)
        if coming and place == here:
            assert self._rows is not None
            rows.update(row & 0xFFFFFFFF for row in self._rows[self.offset :])
        elif coming and place > here:
            rows.update(row & 0xFFFFFFFF for row in range(start, stop))
        return rows

    def ahead(self) -> tuple[int, int] | None:
        """(shard, group) that is read next."""
        return (self.shards[self.place], self.group) if self.place < len(self.shards) else None

    def state(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("place", "group", "offset", "drawn")},
            "buffer": self.buffer.copy(),
        }

    def load(self, state: dict[str, Any]) -> None:
        for name in ("place", "group", "offset", "drawn"):
            setattr(self, name, int(state[name]))
        self.buffer = [int(row) for row in state["buffer"]]
        self._rows = None


class _SourceOrder:
    """One source's rows, pass after pass."""

    def __init__(self, source: Source, number: int, seed: int, buffer: int, readers: int) -> None:
        self.source, self.number, self.seed = source, number, seed
        self.count = min(readers, len(source.shards))
        self.share = -(-buffer // self.count) if buffer > 1 else 1
        self.shuffle = buffer > 1
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        """A new epoch: the shards in a new order, split among the readers."""
        self.epoch, self.taken, self.next = epoch, 0, 0
        order = list(range(len(self.source.shards)))
        if self.shuffle:
            order = _Draws(self.seed, self.number, epoch, 1).shuffled(len(order))
        self.readers = [
            _ShardReader(
                self.source, order[reader :: self.count], self.share, _Draws(self.seed, self.number, epoch, 2, reader)
            )
            for reader in range(self.count)
        ]

    def draw(self) -> RowPosition | None:
        """The next row of this pass; None at its end."""
        for _ in range(self.count):
            reader = self.next
            self.next = (self.next + 1) % self.count
            row = self.readers[reader].draw()
            if row is not None:
                self.taken += 1
                return RowPosition(self.number, row >> 32, row & 0xFFFFFFFF, self.epoch, reader)
        return None

    def state(self) -> dict[str, Any]:
        return {
            "turn": self.epoch,
            "taken": self.taken,
            "next": self.next,
            "lanes": [reader.state() for reader in self.readers],
        }

    def load(self, state: dict[str, Any]) -> None:
        self._begin(int(state["turn"]))
        self.taken, self.next = int(state["taken"]), int(state["next"])
        for reader, saved in zip(self.readers, state["lanes"], strict=True):
            reader.load(saved)


class StreamOrder:
    """The global order of a stream's rows.

    Args:
        sources: with one, a pass shows every row once and then the next pass begins, in another order. With several,
            every position draws its source by the weights, each source passes at its own pace, and there is no end.
        seed: of all draws.
        buffer: rows in the shuffle buffer, over all readers; 0 or 1 keeps the order of the files.
        readers: how many shards of a source are read at once. Ranks share the readers, so that with a multiple of the
            number of ranks every rank reads shards of its own.

    Raises:
        ValueError: no sources, a negative buffer, no readers.
    """

    def __init__(self, sources: Sequence[Source], *, seed: int = 0, buffer: int = 10_000, readers: int = 8) -> None:
        if not sources:
            raise ValueError("a stream needs at least one source")
        if buffer < 0 or readers < 1:
            raise ValueError(f"shuffle_buffer={buffer} must not be negative, and stream_readers={readers} at least 1")
        self.sources = list(sources)
        self.seed, self.buffer, self.readers = int(seed), int(buffer), int(readers)
        weights = np.cumsum([source.weight for source in self.sources])
        self._bounds = (weights / weights[-1]).tolist()
        self._chosen = _Draws(self.seed, 3)
        self.restart()

    def restart(self) -> None:
        """Back to the first row of the first pass."""
        self.position = 0
        self.source_orders = [
            _SourceOrder(source, number, self.seed, self.buffer, self.readers)
            for number, source in enumerate(self.sources)
        ]

    @property
    def total(self) -> int | None:
        """Rows of a pass, or None where it is not known beforehand (weights, shards on the Hub)."""
        if len(self.sources) > 1 or not self.sources[0].known:
            return None
        if not hasattr(self, "_total"):
            self._total = sum(shard.rows for shard in self.sources[0].shards)
        return self._total

    def next_pass(self) -> None:
        """Leave out what is left of this pass (less than a batch)."""
        self.source_orders[0]._begin(self.source_orders[0].epoch + 1)

    def take(self, count: int) -> list[RowPosition]:
        """The next `count` rows; across the end of a pass where need be.

        Raises:
            ValueError: a whole pass over a source has no row.
        """
        positions = []
        for _ in range(count):
            number = 0
            if len(self.sources) > 1:
                number = min(bisect_right(self._bounds, self._chosen(self.position) / 2**64), len(self.sources) - 1)
            source_order = self.source_orders[number]
            position = source_order.draw()
            if position is None:
                if not source_order.taken:
                    names = ", ".join(shard.name for shard in source_order.source.shards[:3])
                    raise ValueError(f"a whole pass over {names} gave no row: they are empty")
                source_order._begin(source_order.epoch + 1)
                position = source_order.draw()
                if position is None:
                    raise ValueError(f"{source_order.source.shards[0].name} gave rows once and none in the next pass")
            self.position += 1
            positions.append(position)
        return positions

    # ---- state -----------------------------------------------------------------------------------------------

    @property
    def identity(self) -> dict[str, Any]:
        """What the order depends on; a saved state fits only the same."""
        return {
            "seed": self.seed,
            "shuffle_buffer": self.buffer,
            "stream_lanes": self.readers,
            "shards": [[shard.name for shard in source.shards] for source in self.sources],
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to continue from here: numbers and lists of them."""
        return {"position": self.position, "sources": [source_order.state() for source_order in self.source_orders]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken."""
        self.position = int(state["position"])
        for source_order, saved in zip(self.source_orders, state["sources"], strict=True):
            source_order.load(saved)


def split_among_ranks(positions: Sequence[RowPosition], sources: Sequence[int], world: int) -> list[list[int]]:
    """Which positions of a global batch each rank reads: those of its own readers first, and equally many for all.

    Args:
        positions: a global batch; its length is a multiple of `world`.
        sources: how many readers each source has.
        world: number of ranks.

    Returns:
        For every rank the places in `positions`, in order. Together they are all places, each once.
    """
    share = len(positions) // world
    taken: list[list[int]] = [[] for _ in range(world)]
    others: list[int] = []
    for place, position in enumerate(positions):
        own = taken[position.reader * world // sources[position.source]]
        (own if len(own) < share else others).append(place)
    for own in taken:
        while len(own) < share:
            own.append(others.pop(0))
        own.sort()
    return taken
