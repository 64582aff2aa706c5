"""What every data set here shares: draws that depend only on (seed, epoch, index), and the count of bad samples.

Both survive worker processes: the epoch and the counters lie in shared memory.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import get_worker_info
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

_MASK = (1 << 64) - 1


def draw_key(*values: int) -> int:
    """A number in [0, 2**63) that looks random and depends on `values` alone (splitmix64 over them)."""
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


class BadSamples:
    """Counts the samples that could not be used, across worker processes.

    Two kinds are kept apart, since they have different denominators: samples *met* while reading (a corrupt
    image), and samples *refused* when a data set was built (no supervised token, cut image tokens).

    `count` and `seen` are the totals of both, `examples` a few reasons in words, `reasons` how often each reason
    led to a refusal.
    """

    _SLOTS, _EXAMPLES, _WIDTH = 65, 3, 240  # slot 0 is the main process, then one a worker

    def __init__(self, total: int | None = None) -> None:
        self.total = total
        self._counts = torch.zeros(self._SLOTS, 2, dtype=torch.int64).share_memory_()
        self._texts = torch.zeros(self._SLOTS, self._EXAMPLES, self._WIDTH, dtype=torch.uint8).share_memory_()
        self.refused, self.examined = 0, 0
        self.reasons: Counter[str] = Counter()
        self._refusals: list[str] = []

    @staticmethod
    def _slot() -> int:
        worker = get_worker_info()
        return 0 if worker is None else 1 + worker.id % (BadSamples._SLOTS - 1)

    def good(self) -> None:
        """One sample was read and is fine."""
        self._counts[self._slot(), 1] += 1

    def bad(self, example: str) -> None:
        """One sample was read and cannot be used; `example` says which and why."""
        slot = self._slot()
        number = int(self._counts[slot, 0])
        if number < self._EXAMPLES:
            data = example.encode("utf-8")[: self._WIDTH]
            self._texts[slot, number, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._counts[slot, 0] += 1
        self._counts[slot, 1] += 1

    def examine(self, count: int) -> None:
        """`count` more samples were looked at while a data set was built."""
        self.examined += count

    def refuse(self, reason: str, example: str) -> None:
        """One of the examined samples cannot be used, for `reason` (a short phrase that repeats)."""
        self.refused += 1
        self.reasons[reason] += 1
        if self.reasons[reason] <= 2:
            self._refusals.append(f"{reason}: {example}"[: self._WIDTH])

    @property
    def count(self) -> int:
        return int(self._counts[:, 0].sum()) + self.refused

    @property
    def seen(self) -> int:
        return int(self._counts[:, 1].sum()) + self.examined

    @property
    def examples(self) -> list[str]:
        texts = [bytes(row.tolist()).rstrip(b"\0") for row in self._texts.view(-1, self._WIDTH) if int(row[0])]
        return self._refusals[:6] + [text.decode("utf-8", "ignore") for text in texts][:6]

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
                    "Mend or remove them, or raise --max_bad_fraction if leaving them out is acceptable."
                )


class EpochDataset(torch.utils.data.Dataset):
    """A map-style data set whose draws change with the epoch, and which passes over samples it cannot use.

    A subclass gives `_read(index, key)`, which returns the sample or raises ValueError (`BadImage` is one); `key`
    is a number from (seed, epoch, index) for the sample's random choices. A bad sample is replaced by the next
    good one and counted in `bad_samples`. The length is fixed, so that ranks stay in step.
    """

    def __init__(self, seed: int, total: int, bad_samples: BadSamples | None) -> None:
        self.seed = int(seed)
        self.bad_samples = BadSamples(total) if bad_samples is None else bad_samples
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Draws depend on the epoch; worker processes see the new one (it lies in shared memory)."""
        self._epoch[0] = int(epoch)

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} has no length")

    def _read(self, index: int, key: int) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} reads nothing")

    def __getitem__(self, index: int) -> dict[str, Any]:
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index {index} is out of range for {size} samples")
        index %= size
        key, last = draw_key(self.seed, self.epoch, index), ""
        for step in range(min(size, 100)):
            candidate = (index + step) % size
            try:
                sample = self._read(candidate, key)
            except ValueError as error:
                last = f"row {candidate}: {error}"
                self.bad_samples.bad(last)
                continue
            self.bad_samples.good()
            return sample
        raise ValueError(f"{min(size, 100)} samples in a row from {index} cannot be used; the last one, {last}")


class EpochCallback(TrainerCallback):
    """Tells the training data set which epoch begins.

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
            f"{type(records).__name__} has no length: pass a map-style data set (datasets.Dataset or a list), no stream"
        ) from None
    if size == 0:
        raise ValueError("the data set is empty (0 rows); check the path, the split and max_rows")
    return size


def only_columns(records: Any, names: Sequence[str]) -> Any:
    """The records with just these columns, where the container can do that without copying."""
    return records.select_columns(list(names)) if hasattr(records, "select_columns") else records
