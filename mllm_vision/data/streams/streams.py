"""Streams: Parquet and WebDataset shards read in order, shuffled in a buffer, mixed, resumed exactly.

    stream = Stream.open("shards/{000..127}.tar", seed=0, shuffle_buffer=10_000)
    columns = bind_columns(stream.head(), ("image", "caption"))
    dataset = StreamDataset(stream, PairDataset(stream.head(), columns, transform=transform))
    loader = StreamLoader(dataset, batch_size=256, collate_fn=collator)       # on every rank, with its rank

`StreamLoader.state_dict()` after any batch, and `load_state_dict` in a new process, on any number of ranks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from mllm_vision.data.records.readers.arrow import united
from mllm_vision.data.records.readers.files import LeftOut
from mllm_vision.data.records.readers.paths import ImagePaths
from mllm_vision.data.records.readers.table_cache import ends_of, fingerprint
from mllm_vision.data.records.readers.tables import with_paths
from mllm_vision.data.records.sampling import BadRow, BadSamples, draw_key
from mllm_vision.data.streams.order import RowPosition, Source, StreamOrder, split_among_ranks
from mllm_vision.data.streams.shards import find_shards

_HEADS = 8  # shards that are looked at for their columns
_ROWS_TRIED, _SHARDS_TRIED = 200, 8  # in place of a row that cannot be used


class Stream:
    """Sources, and the order in which their rows come.

    Args:
        sources: data sets with weights.
        image_root: what relative image paths start from; otherwise the folder of the shard.
        seed, shuffle_buffer, readers: see `StreamOrder`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        image_root: str | Path | None = None,
        seed: int = 0,
        shuffle_buffer: int = 10_000,
        readers: int = 8,
    ) -> None:
        self.sources = list(sources)
        self.image_root = Path(image_root).expanduser() if image_root is not None else None
        self.settings = {"seed": seed, "buffer": shuffle_buffer, "readers": readers}
        self._left_out = LeftOut()
        self.total = self.order().total

    @classmethod
    def open(
        cls,
        name: str | Path,
        *,
        split: str = "train",
        mix: Mapping[str, float] | None = None,
        **settings: Any,
    ) -> Stream:
        """A stream over `name` and, with weights relative to its 1, over the data sets of `mix`.

        Args:
            name, split: see `find_shards`; the split is that of every data set.
            mix: data set -> weight; the name itself may be among them, to give it another weight than 1.
            settings: as for `Stream`.

        Raises:
            FileNotFoundError, ValueError: as `find_shards` and `Stream` say.
        """
        weights = {str(name): 1.0, **{str(other): float(weight) for other, weight in (mix or {}).items()}}
        sources = [Source(find_shards(each, split), weight=weight) for each, weight in weights.items()]
        return cls(sources, **settings)

    def order(self) -> StreamOrder:
        """The order of rows, at its beginning."""
        return StreamOrder(self.sources, **self.settings)

    def head(self, count: int = 16) -> Any:
        """The first rows of the first source as a data set, images undecoded: what columns are bound by."""
        return self._head(self.sources[0], count)

    def _head(self, source: Source, count: int) -> Any:
        """The first rows of the first shard that has any, and one of each of the next few that has other columns.

        Raises:
            ValueError: no shard has rows.
        """
        from datasets import Dataset, DatasetInfo

        tables: list[tuple[str, Any]] = []
        for shard in source.shards:
            if tables and (not shard.local or len(tables) == _HEADS):
                break
            table = shard.head(1 if tables else count)
            if table.num_rows:
                root = self.image_root or shard.file().parent
                tables.append((shard.name, with_paths(table, ImagePaths(root, self._left_out))))
        if not tables:
            raise ValueError(f"{source.shards[0].name} and all other shards of its data set are empty: no rows")
        known = set(tables[0][1].column_names)
        others = [(name, table) for name, table in tables[1:] if not known.issuperset(table.column_names)]
        table, features = united([tables[0], *others], LeftOut())
        return Dataset(table, info=DatasetInfo(features=features))

    @property
    def left_out(self) -> dict[str, int]:
        """What is not read of the shards that were opened so far: how many of each kind."""
        found: Counter[str] = Counter()
        for source in self.sources:
            for shard in source.shards:
                found.update(shard.left_out.counts)
        return dict(found)

    @property
    def bounded(self) -> bool:
        """Whether a pass has a known number of rows, so that training can be counted in epochs."""
        return self.total is not None

    @property
    def _fingerprint(self) -> str:
        """Of the settings, the shards' names, and the sizes and ends of local ones: what a record calls the data by."""
        identity = json.dumps(self.order().identity, sort_keys=True).encode()
        local = [shard for source in self.sources for shard in source.shards if shard.local]
        return fingerprint([identity, *(ends_of(shard.file(), shard.name) for shard in local)])

    def read(
        self, source: int, shard: int, group: int, columns: Sequence[str], images: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """The rows of a group; relative image paths start from `image_root` or from the folder of the shard.

        Args:
            source, shard, group: which.
            columns: those to read.
            images: columns that are of images, whatever they are called.
        """
        file = self.sources[source].shards[shard]
        rows = file.read(group, columns)
        paths = ImagePaths(self.image_root or file.file().parent, self._left_out, images)
        for name in columns:
            values = [row[name] for row in rows]
            changed = paths.column(name, values)
            if changed is not values:
                for row, value in zip(rows, changed, strict=True):
                    row[name] = value
        self._left_out.report(file.name)
        return rows


class StreamDataset(Dataset):
    """Turns the rows of a stream into samples. `StreamLoader` passes it rows that have been read, with
    their positions.

    Args:
        stream: what is read.
        reader: a `PairDataset`, `ImageDataset` or `ConversationDataset` over `stream.head()`: its
            `read_record(record, key, index)` makes a sample of a row, or raises ValueError for one that cannot be used.
        columns: those to read; by default those the reader bound.

    A row that cannot be used is counted in `bad_samples` and replaced by the next good one of its group of rows: the
    order of all others stays as it was, on every number of ranks. The random choices of a sample depend on the seed,
    the pass and the row alone.

    Raises:
        ValueError: the reader reads no single records; sources lack one of its columns.
    """

    def __init__(self, stream: Stream, reader: Any, columns: Sequence[str] | None = None) -> None:
        if not hasattr(reader, "read_record"):
            raise ValueError(f"{type(reader).__name__} needs all rows beforehand: it cannot be streamed")
        self.stream, self.reader = stream, reader
        self.reader.bad_samples = BadSamples(stream.total)  # without those met among the first rows, which come again
        self.columns = list(dict.fromkeys(columns or reader.columns.values()))
        self.seed = stream.settings["seed"]
        self._images = [name for role, name in reader.columns.items() if role == "image"]
        for source in stream.sources:
            names = stream._head(source, 16).column_names  # the first sample of a tar may lack what others have
            missing = [name for name in self.columns if name not in names]
            if missing:
                raise ValueError(
                    f"{source.shards[0].name} has no column {', '.join(missing)}; its columns are {', '.join(names)}"
                )

    @property
    def bad_samples(self) -> BadSamples:
        """The reader's counter."""
        return self.reader.bad_samples

    def __len__(self) -> int:
        if self.stream.total is None:
            raise TypeError("the stream has no known length (weights, or shards on the Hub)")
        return self.stream.total

    def __getitem__(self, item: tuple[RowPosition, dict[str, Any]]) -> dict[str, Any]:
        position, row = item
        key = draw_key(self.seed, position.epoch, position.source, position.shard, position.row)
        last = self._check(row, position, key)
        if not isinstance(last, BadRow):
            return last
        tried = 1
        for other, row in self._instead(position):
            last = self._check(row, other, key)
            if not isinstance(last, BadRow):
                return last
            tried += 1
        name = self.stream.sources[position.source].shards[position.shard].name
        raise ValueError(f"{tried} rows from row {position.row} of {name} on cannot be used; the last one, {last}")

    def _instead(self, position: RowPosition) -> Iterator[tuple[RowPosition, dict[str, Any]]]:
        """Rows to take in place of one: those of its group, then of the groups and shards behind it."""
        source = self.stream.sources[position.source]
        count = 0
        shards = [*range(position.shard, len(source.shards)), *range(position.shard)]
        for shard in shards[:_SHARDS_TRIED]:
            groups = range(len(source.shards[shard].groups))
            own = source.group_of(shard, position.row) if shard == position.shard else 0
            for group in [*groups[own:], *groups[:own]]:
                start = int(source.starts(shard)[group])
                stop = start + source.shards[shard].groups[group]
                others = [*range(start, stop)]
                if (shard, group) == (position.shard, own):
                    others = [*range(position.row + 1, stop), *range(start, position.row)]
                rows = self.read(position.source, shard, group) if others else []
                for row in others:
                    yield position._replace(shard=shard, row=row), rows[row - start]
                    count += 1
                    if count == _ROWS_TRIED:
                        return

    def read(self, source: int, shard: int, group: int) -> list[dict[str, Any]]:
        """The rows of a group with the columns that are needed."""
        return self.stream.read(source, shard, group, self.columns, self._images)

    def _check(self, row: dict[str, Any], position: RowPosition, key: int) -> dict[str, Any] | BadRow:
        """The sample, or the reason it cannot be used."""
        where = f"{self.stream.sources[position.source].shards[position.shard].name} row {position.row}"
        return self.bad_samples.judge(where, self._sample, row, position, key)

    def _sample(self, row: dict[str, Any], position: RowPosition, key: int) -> dict[str, Any]:
        for value in row.values():
            if isinstance(value, BadRow):
                raise value
        return self.reader.read_record(row, key, position.row)


class RowReader:
    """Reads the rows of one rank, a group at a time, and keeps those that are still to come in the shuffle buffer.

    What is held is encoded: about `shuffle_buffer` rows over all ranks, and the groups the readers are in. Groups of
    the rank's own readers are fetched ahead in a thread.
    """

    def __init__(self, dataset: StreamDataset, order: StreamOrder, rank: int, world: int) -> None:
        self.dataset, self.order, self.rank, self.world = dataset, order, rank, world
        self._rows: dict[_File, dict[int, dict]] = {}  # row -> what was read
        self._ahead: dict[tuple[_File, int], Future] = {}
        self._loaded: set[tuple[_File, int]] = set()
        self._pool: ThreadPoolExecutor | None = None
        self.groups_read = 0

    def read(self, positions: Sequence[RowPosition]) -> list[tuple[RowPosition, dict[str, Any]]]:
        """This rank's rows of a global batch that `order` has just given."""
        mine = split_among_ranks(
            positions, [source_order.count for source_order in self.order.source_orders], self.world
        )[self.rank]
        wanted: dict[tuple[_File, int], set[int]] = {}
        for place in mine:
            file, row = _file(positions[place]), positions[place].row
            if row not in self._rows.get(file, ()):
                group = self.order.sources[file.source].group_of(file.shard, row)
                wanted.setdefault((file, group), set()).add(row)
        for (file, group), rows in wanted.items():
            self._load(file, group, rows)
        found = [(positions[place], self._rows[_file(positions[place])].pop(positions[place].row)) for place in mine]
        for position in positions:  # what the other ranks took
            self._rows.get(_file(position), {}).pop(position.row, None)
        if any(
            position.epoch != positions[0].epoch for position in positions
        ):  # a pass ended: nothing of it is still to come
            self._drop_old()
        self._look_ahead()
        return found

    def _load(self, file: _File, group: int, needed: set[int]) -> None:
        future = self._ahead.pop((file, group), None)
        rows = future.result() if future is not None else self._read(file, group)
        source_order = self.order.source_orders[file.source]
        alive = set(needed)
        if file.epoch == source_order.epoch:
            reader = next(reader for reader in source_order.readers if file.shard in reader.shards)
            alive |= reader.waiting(file.shard, group)
        start = int(self.order.sources[file.source].starts(file.shard)[group])
        self._rows.setdefault(file, {}).update({row: rows[row - start] for row in alive})
        self._loaded.add((file, group))

    def _read(self, file: _File, group: int) -> list[dict[str, Any]]:
        self.groups_read += 1
        return self.dataset.read(file.source, file.shard, group)

    def _look_ahead(self) -> None:
        """Start reading the groups that the rank's own readers are in."""
        for number, source_order in enumerate(self.order.source_orders):
            for index, reader in enumerate(source_order.readers):
                place = reader.ahead()
                if place is None or index * self.world // source_order.count != self.rank:
                    continue
                file, group = _File(number, source_order.epoch, place[0]), place[1]
                known = (file, group) in self._loaded or (file, group) in self._ahead
                if not known and group < len(source_order.source.shards[file.shard].groups):
                    self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="stream")
                    self._ahead[file, group] = self._pool.submit(self._read, file, group)

    def _drop_old(self) -> None:
        epochs = [source_order.epoch for source_order in self.order.source_orders]
        self._rows = {file: rows for file, rows in self._rows.items() if file.epoch == epochs[file.source]}
        self._ahead = {key: future for key, future in self._ahead.items() if key[0].epoch == epochs[key[0].source]}
        self._loaded = {key for key in self._loaded if key[0].epoch == epochs[key[0].source]}

    def forget(self) -> None:
        """Drop all that was read: the order is at another epoch or position."""
        self.settle()
        self._rows, self._ahead, self._loaded = {}, {}, set()

    def settle(self) -> None:
        """Wait for what is being read, so that no thread holds a lock while worker processes are forked."""
        for future in self._ahead.values():
            future.exception()


class _File(NamedTuple):
    """A shard in one pass over its source."""

    source: int
    epoch: int
    shard: int


def _file(position: RowPosition) -> _File:
    return _File(position.source, position.epoch, position.shard)
