"""Shared by all data sets: draws that depend only on (seed, epoch, index), and the count of bad samples.

Both survive worker processes: the epoch and the counters are in shared memory.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import get_worker_info
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

_MASK = (1 << 64) - 1
_T = TypeVar("_T")
_TRIES, _NEXT = 200, 16  # rows tried in place of a bad one; the next ones first, then drawn ones
_NOT_THE_ROW = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EIO, errno.ESTALE)


def draw_key(*values: int) -> int:
    """A pseudo-random number in [0, 2**63) that depends on `values` alone (splitmix64)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def text_id(text: str) -> int:
    """A stable 63-bit id of a text: equal texts, equal ids, in every process and on every machine."""
    return bytes_id(text.encode("utf-8"))


def bytes_id(data: bytes) -> int:
    """A stable 63-bit id of bytes (BLAKE2b)."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


class BadRow(ValueError):
    """A row that cannot be used; `reason` is a short phrase to count rows by."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def judge(where: str, read: Callable[..., _T], *args: Any) -> _T | BadRow:
    """What `read(*args)` makes of a row, or the `BadRow` (with `where` it is) that says why it cannot be used.

    The single check of rows, for map-style and streamed data, in training and in evaluation: any exception that the
    values of a row cause is a refusal. Failures that are not the row's (out of memory, too many open files, an
    interrupt) are raised.
    """
    try:
        return read(*args)
    except BadRow as error:
        found = error
    except Exception as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in _NOT_THE_ROW:
            raise
        logger.debug("%s: an exception from its values", where, exc_info=True)
        text = f"{type(error).__name__}: {error}" if type(error) is not ValueError else str(error)
        found = BadRow(_short_reason(error), text)
    bad = BadRow(f"{where}: {found}"[:500])
    bad.reason = found.reason
    return bad


def _short_reason(error: Exception) -> str:
    """A reason for an exception without one: its text without the values if it is a plain ValueError."""
    if type(error) is ValueError and str(error):
        return re.split(r"[:;\n]|(?<=\w)=", str(error), maxsplit=1)[0][:60]
    return f"unexpected {type(error).__name__}"


class BadSamples:
    """Counts the samples that could not be used, by reason, across worker processes.

    Two kinds are kept apart, since they have different denominators: samples *met* while reading (a corrupt
    image), and samples *refused* when a data set was built (no supervised token, cut image tokens).

    `count` and `seen` are the totals of both, `examples` a few messages, `reasons` how often each reason
    led to a refusal.
    """

    _SLOTS, _EXAMPLES, _WIDTH = 65, 3, 240  # slot 0 is the main process, then one a worker
    _REASONS, _REASON_WIDTH = 16, 64  # reasons kept apart in one process; the last place counts all others

    def __init__(self, total: int | None = None) -> None:
        self.total = total
        self._counts = torch.zeros(self._SLOTS, 2, dtype=torch.int64).share_memory_()
        self._texts = torch.zeros(self._SLOTS, self._EXAMPLES, self._WIDTH, dtype=torch.uint8).share_memory_()
        self._whys = torch.zeros(self._SLOTS, self._REASONS, self._REASON_WIDTH, dtype=torch.uint8).share_memory_()
        self._why_counts = torch.zeros(self._SLOTS, self._REASONS, dtype=torch.int64).share_memory_()
        self.refused, self.examined = 0, 0
        self._refused_for: Counter[str] = Counter()
        self._refusals: list[str] = []

    @staticmethod
    def _slot() -> int:
        worker = get_worker_info()
        return 0 if worker is None else 1 + worker.id % (BadSamples._SLOTS - 1)

    def judge(self, where: str, read: Callable[..., _T], *args: Any) -> _T | BadRow:
        """Check a row while reading; it is counted either way."""
        found = judge(where, read, *args)
        if isinstance(found, BadRow):
            self.bad(str(found), found.reason)
        else:
            self.good()
        return found

    def judge_beforehand(self, where: str, read: Callable[..., _T], *args: Any) -> _T | BadRow:
        """Check one of the examined rows (`examine`) while a data set is built; a refusal is counted."""
        found = judge(where, read, *args)
        if isinstance(found, BadRow):
            self.refuse(found.reason, str(found))
        return found

    def good(self) -> None:
        """One sample was read and is fine."""
        self._counts[self._slot(), 1] += 1

    def bad(self, example: str, reason: str = "unusable") -> None:
        """One sample was read and cannot be used; `example` says which and why."""
        slot = self._slot()
        number = int(self._counts[slot, 0])
        if number < self._EXAMPLES:
            _write(self._texts[slot, number], example)
        self._counts[slot, 0] += 1
        self._counts[slot, 1] += 1
        known = [_words(row) for row in self._whys[slot]]
        reason = _cut(reason, self._REASON_WIDTH)
        if reason not in known:
            free = known.index("") if "" in known[:-1] else self._REASONS - 1
            reason = reason if free < self._REASONS - 1 else "other reasons"
            _write(self._whys[slot, free], reason)
            known[free] = reason
        self._why_counts[slot, known.index(reason)] += 1

    def examine(self, count: int) -> None:
        """`count` more samples were looked at while a data set was built."""
        self.examined += count

    def refuse(self, reason: str, example: str) -> None:
        """One of the examined samples cannot be used, for `reason` (a short phrase that repeats)."""
        self.refused += 1
        self._refused_for[reason] += 1
        if self._refused_for[reason] <= 2:
            self._refusals.append((example if reason in example else f"{reason}: {example}")[: self._WIDTH])

    @property
    def reasons(self) -> Counter[str]:
        """How often each reason led to a refusal, the samples met and those refused beforehand together."""
        found = Counter(self._refused_for)
        for slot, place in self._why_counts.nonzero().tolist():
            found[_words(self._whys[slot, place])] += int(self._why_counts[slot, place])
        return found

    @property
    def count(self) -> int:
        return int(self._counts[:, 0].sum()) + self.refused

    @property
    def seen(self) -> int:
        return int(self._counts[:, 1].sum()) + self.examined

    @property
    def examples(self) -> list[str]:
        texts = [_words(row) for row in self._texts.view(-1, self._WIDTH) if int(row[0])]
        return self._refusals[:6] + texts[:6]

    def check(self, max_fraction: float) -> None:
        """Raise ValueError with the counts, examples and remedy when more than `max_fraction` of them are bad.

        Early in an epoch the share is taken of the data set (at most 1000 samples of it), so that one bad sample
        among the first few does not end a run.
        """
        met, read = (int(value) for value in self._counts.sum(0))
        floor = min(self.total or 1000, 1000)
        for bad, of, kind in ((self.refused, self.examined, "refused"), (met, max(read, floor), "unusable")):
            if bad > max_fraction * of:
                listed = "\n".join(f"  - {example}" for example in self.examples)
                raise ValueError(
                    f"{bad} of {of} samples are {kind} ({bad / max(of, 1):.1%}), more than "
                    f"max_bad_fraction={max_fraction}:\n{listed}\n"
                    "Fix or remove them, or raise --max_bad_fraction if leaving them out is acceptable."
                )


def _cut(text: str, width: int) -> str:
    return text.encode("utf-8", "replace")[:width].decode("utf-8", "ignore")


def _write(place: torch.Tensor, text: str) -> None:
    data = _cut(text, len(place)).encode("utf-8")
    place.zero_()
    place[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _words(place: torch.Tensor) -> str:
    return bytes(place.tolist()).rstrip(b"\0").decode("utf-8", "ignore")


class EpochDataset(torch.utils.data.Dataset):
    """A map-style data set whose draws change with the epoch and which skips bad samples.

    A subclass gives `_read(index, key)`, which returns the sample or raises (`BadRow` with its reason; any other
    exception is a refusal too, see `judge`); `key` is a number from (seed, epoch, index) for the sample's random
    choices. A bad sample is replaced by the next good one, behind a longer run of bad ones by one drawn at random, and
    counted in `bad_samples`. The length is fixed, so that ranks stay in step.
    """

    def __init__(self, seed: int, total: int, bad_samples: BadSamples | None) -> None:
        self.seed = int(seed)
        self.bad_samples = BadSamples(total) if bad_samples is None else bad_samples
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Draws depend on the epoch; worker processes see the new one (it is in shared memory)."""
        self._epoch[0] = int(epoch)

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} has no length")

    def record_of(self, index: int) -> int:
        """The row of the records that a sample comes from."""
        return index

    def _read(self, index: int, key: int) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} reads nothing")

    def __getitem__(self, index: int) -> dict[str, Any]:
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index {index} is out of range for {size} samples")
        index %= size
        key, last = draw_key(self.seed, self.epoch, index), ""
        for step in range(min(size, _TRIES)):
            candidate = (index + step) % size if step < _NEXT else draw_key(self.seed, index, step) % size
            sample = self.bad_samples.judge(f"row {self.record_of(candidate)}", self._read, candidate, key)
            if not isinstance(sample, BadRow):
                return sample
            last = str(sample)
        raise ValueError(f"{min(size, _TRIES)} samples from {index} on cannot be used; the last one, {last}")


class OwnRows(torch.utils.data.Dataset):
    """The samples of an `EpochDataset` as an evaluation takes them: one that cannot be used is its `BadRow`, and no
    other sample replaces it, which would count twice. Bad rows found here do not count as the training's."""

    def __init__(self, dataset: EpochDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | BadRow:
        data = self.dataset
        key = draw_key(data.seed, data.epoch, index)
        return judge(f"row {data.record_of(index)}", data._read, index, key)


class EpochCallback(TrainerCallback):
    """Sets the epoch of the training data set.

    The Trainer and Accelerate call `set_epoch` of a map-style data set only in one process and only when the epoch
    is not resumed in its middle; through this callback the draws are the same in every case.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        dataset = getattr(train_dataloader, "dataset", None)
        set_epoch: Callable[[int], None] | None = getattr(dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(int((state.epoch or 0.0) + 1e-6))


def rows_of(records: Any) -> int:
    """The number of rows; ValueError when there are none or the records have no length."""
    try:
        size = len(records)
    except TypeError:
        raise ValueError(
            f"{type(records).__name__} has no length: pass a datasets.Dataset or a list, not a stream"
        ) from None
    if size == 0:
        raise ValueError("the data set is empty (0 rows); check the path, the split and max_rows")
    return size


def only_columns(records: Any, names: Sequence[str]) -> Any:
    """The records with just these columns, without copying; in a list of dicts a row that lacks one has None there.

    Images stay undecoded: `datasets` would open any format, and a broken one could not be reported.
    """
    if hasattr(records, "select_columns"):
        from mllm_vision.data.records.readers.arrow import undecoded

        found = records.select_columns(list(names))
        for name, feature in (getattr(found, "features", None) or {}).items():
            if (plain := undecoded(feature)) != feature:
                found = found.cast_column(name, plain)
        return found
    return _Rows(getattr(records, "rows", records), tuple(names))


class _Rows(Sequence):
    """Some columns of a list of dicts."""

    def __init__(self, rows: Sequence[Any], names: tuple[str, ...]) -> None:
        self.rows, self.names = rows, names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Rows(self.rows[index], self.names)
        row = self.rows[index]
        return {name: row.get(name) if isinstance(row, dict) else None for name in self.names}


def by_selected_row(records: Any, per_row: np.ndarray) -> np.ndarray:
    """Values of all rows of a `datasets.Dataset`'s table, for the rows it selects.

    `select` and `shuffle` leave the table unchanged and keep the rows' numbers beside it (`datasets` 5.2.0).
    """
    return per_row if records._indices is None else per_row[np.asarray(records._indices.column(0))]


def column_values(records: Any, name: str) -> list[Any]:
    """The cells of one column, of a `datasets.Dataset` or of a list of dicts (None where a row lacks it)."""
    if hasattr(records, "column_names"):
        return list(only_columns(records, [name])[name])
    return [row[name] for row in only_columns(records, [name])]


def draw_rows(total: int, count: int | None, seed: int = 0) -> list[int]:
    """`count` of the rows 0 to total - 1, drawn at random by `seed`, ascending; all of them with None or too few.

    Neither the first rows nor every n-th one show what is in the data: rows come sorted by class, or with the classes
    alternating.
    """
    if count is None or count >= total:
        return list(range(total))
    return sorted(torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist())
