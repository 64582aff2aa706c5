"""Several independent conversations in one row: about one image, whose tokens are computed once, or any.

Questions on an image are asked one by one in use, but written one after the other (as LLaVA's data does) a later
question sees the earlier answers, and learns from them instead of from the image: whoever reads "where is the red
circle?" knows that there is one. Here every conversation of a row attends to the image and to itself only, at the
positions it would have alone, so loss and gradients are those of separate samples at a fraction of the tokens.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any

import numpy as np

from mllm_vision.data.chat.collate import IGNORED
from mllm_vision.data.chat.conversations import ConversationDataset
from mllm_vision.data.records.sampling import BadRow, EpochDataset, draw_key


class PackedConversations(EpochDataset):
    """Samples of a `ConversationDataset` that share a record, packed behind one copy of their images.

    Args:
        samples: built with `max_turns=1` and `shuffle_turns=False`, so that each holds one question, always the same.
        max_length: of a packed row, in tokens with the images'; what does not fit opens another row.

    A row is one of `ConversationDataset` with "turns" `[T]` beside "input_ids": 0 where the shared beginning is, k
    in the k-th conversation. `ConversationCollator` makes the attention mask and the positions of it.

    Raises:
        ValueError: shuffled samples; conversations of one record that begin differently before or at their images.
    """

    def __init__(self, samples: ConversationDataset, *, max_length: int) -> None:
        if samples.shuffle_turns:
            raise ValueError("packed conversations do not see each other: build the samples with shuffle_turns=False")
        super().__init__(samples.seed, len(samples), samples.bad_samples)
        self.samples, self.max_length = samples, int(max_length)
        records, prefixes, marks = samples.beginnings()
        starts: list[int] = []  # the first sample of every row
        used = 0
        for index, (record, length, own) in enumerate(
            zip(records, samples.lengths, samples.lengths - prefixes, strict=True)
        ):
            if starts and record == records[starts[-1]]:
                if marks[index] != marks[starts[-1]]:
                    raise ValueError(
                        f"the conversations of record {record} begin differently, so they cannot share their images: "
                        "the chat template writes text before them; choose another --chat_template, or leave "
                        "--pack_turns out"
                    )
                if used + own <= self.max_length:
                    used += own
                    continue
            starts.append(index)
            used = length
        self._starts = np.asarray([*starts, len(samples)], dtype=np.int64)

    def _tail(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, mask) of what follows a sample's last image."""
        tokens, mask = self.samples.tokens_of(index)
        prefix = self.samples.chat.turns(tokens, mask)[0]
        return tokens[prefix:], mask[prefix:]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def set_epoch(self, epoch: int) -> None:
        """As `EpochDataset.set_epoch`, for the samples too."""
        super().set_epoch(epoch)
        self.samples.set_epoch(epoch)

    def _read(self, index: int, key: int) -> dict[str, Any]:
        first, *others = range(self._starts[index], self._starts[index + 1])
        row = self.samples._read(first, draw_key(key, first))
        ids, labels = [row["input_ids"]], [row["labels"]]
        tail, _ = self._tail(first)
        turns = [np.where(np.arange(len(ids[0])) < len(ids[0]) - len(tail), 0, 1)]
        for number, other in enumerate(others, start=2):
            tokens, mask = self._tail(other)
            ids.append(tokens.astype(np.int64))
            labels.append(np.where(mask, ids[-1], -100))
            turns.append(np.full(len(ids[-1]), number))
        packed = {"input_ids": np.concatenate(ids), "labels": np.concatenate(labels), "turns": np.concatenate(turns)}
        return {**row, **packed}


class PackedSamples(EpochDataset):
    """Samples of a `ConversationDataset` in rows of up to `max_length` tokens, in place of padding.

    Which samples share a row depends on the seed alone, so that every rank, epoch and resumed run has the same rows;
    the Trainer shuffles them. Samples of a row do not see each other.

    Args:
        samples: any conversations, with any number of images.
        max_length: of a row, in tokens with the images'.

    A row is one of `ConversationDataset` with "segments" `[T]`, the number of each token's sample in the row.
    `ConversationCollator` makes positions of it that begin again with every sample. A sample that cannot be read is
    counted and left out of its row. `lengths` holds the tokens of the rows.
    """

    def __init__(self, samples: ConversationDataset, *, max_length: int) -> None:
        super().__init__(samples.seed, len(samples), samples.bad_samples)
        self.samples, self.max_length = samples, int(max_length)
        lengths = samples.longest_wordings()
        packs = best_fit(lengths, self.max_length, samples.seed)
        self._members = np.concatenate(packs)
        self._ends = np.cumsum([len(pack) for pack in packs])
        self.lengths = np.add.reduceat(lengths[self._members], self._ends - [len(pack) for pack in packs])

    @property
    def filled(self) -> float:
        """The share of the rows' tokens that are not padding, if all rows were padded to `max_length`."""
        return float(self.lengths.sum() / (len(self.lengths) * self.max_length))

    def members(self, index: int) -> list[int]:
        """The samples of a row."""
        return self._members[self._ends[index - 1] if index else 0 : self._ends[index]].tolist()

    def record_of(self, index: int) -> int:
        return self.samples.record_of(self.members(index)[0])

    def __len__(self) -> int:
        return len(self._ends)

    def set_epoch(self, epoch: int) -> None:
        """As `EpochDataset.set_epoch`, for the samples too."""
        super().set_epoch(epoch)
        self.samples.set_epoch(epoch)

    def _read(self, index: int, key: int) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        bad: list[BadRow] = []
        for sample in self.members(index):
            where = f"row {self.samples.record_of(sample)}"
            row = self.bad_samples.judge(where, self.samples._read, sample, draw_key(key, sample))
            if isinstance(row, BadRow):
                bad.append(row)
            else:
                rows.append(row)
        if not rows:
            raise bad[-1]
        labels = [row["labels"].copy() for row in rows]
        for each in labels:
            each[0] = IGNORED  # nothing before it predicts it
        sizes = [len(row["input_ids"]) for row in rows]
        return {
            "input_ids": np.concatenate([row["input_ids"] for row in rows]),
            "labels": np.concatenate(labels),
            "segments": np.repeat(np.arange(len(rows)), sizes),
            "images": [image for row in rows for image in row["images"]],
            "keys": [each for row in rows for each in row["keys"]],
            "index": rows[0]["index"],
        }


def best_fit(lengths: np.ndarray, room: int, seed: int) -> list[np.ndarray]:
    """Items in bins, each into the fullest bin that has room for it, in an order drawn from the seed.

    Args:
        lengths: of the items, int `[n]`; one above `room` has a bin of its own.
        room: of a bin.
        seed: of the order.

    Returns:
        The items of every bin, int64.
    """
    bins: list[list[int]] = []
    left: list[int] = []  # what bins that are not full have left, ascending
    of_room: dict[int, list[int]] = {}  # -> the bins with that much left
    for item in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        length = int(lengths[item])
        at = bisect_left(left, length)
        if at == len(left):
            number, rest = len(bins), room - length
            bins.append([item])
        else:
            free = left[at]
            number, rest = of_room[free].pop(), free - length
            if not of_room[free]:
                del of_room[free], left[at]
            bins[number].append(item)
        if rest > 0:
            if rest not in of_room:
                insort(left, rest)
            of_room.setdefault(rest, []).append(number)
    return [np.asarray(each, np.int64) for each in bins]
