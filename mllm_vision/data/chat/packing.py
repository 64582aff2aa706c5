"""Several independent conversations about one image in one row: the image's tokens are computed once.

Questions on an image are asked one by one in use, but written one after the other (as LLaVA's data does) a later
question sees the earlier answers, and learns from them instead of from the image: whoever reads "where is the red
circle?" knows that there is one. Here every conversation of a row attends to the image and to itself only, at the
positions it would have alone, so loss and gradients are those of separate samples at a fraction of the tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mllm_vision.data.chat.conversations import ConversationDataset
from mllm_vision.data.records.sampling import EpochDataset, draw_key


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
