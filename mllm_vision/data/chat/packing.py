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
        self._rows: list[list[int]] = []
        used = 0
        for index in range(len(samples)):
            begin = self._shared(index) if not self._rows or not self._same_record(index) else None
            if begin is None:
                shared = self._shared(self._rows[-1][0])
                own = int(samples.lengths[index]) - self._expanded(shared)
                if not np.array_equal(shared, self._shared(index)):
                    raise ValueError(
                        f"the conversations of record {samples.record_of(index)} begin differently, so they cannot "
                        "share their images: the chat template writes words before them; choose another "
                        "--chat_template, or leave --pack_turns out"
                    )
                if used + own <= self.max_length:
                    self._rows[-1].append(index)
                    used += own
                    continue
            self._rows.append([index])
            used = int(samples.lengths[index])

    def _same_record(self, index: int) -> bool:
        return self.samples.record_of(index) == self.samples.record_of(self._rows[-1][0])

    def _shared(self, index: int) -> np.ndarray:
        """The unexpanded ids up to the last image (or the beginning-of-text token where there is none)."""
        tokens, mask = self.samples.tokens_of(index)
        return tokens[: self.samples.chat.turns(tokens, mask)[0]]

    def _expanded(self, tokens: np.ndarray) -> int:
        images = int((tokens == self.samples.chat.image_token_id).sum())
        return len(tokens) + images * (self.samples.num_image_tokens - 1)

    def __len__(self) -> int:
        return len(self._rows)

    def set_epoch(self, epoch: int) -> None:
        """As `EpochDataset.set_epoch`, for the samples too."""
        super().set_epoch(epoch)
        self.samples.set_epoch(epoch)

    def _read(self, index: int, key: int) -> dict[str, Any]:
        first, *others = self._rows[index]
        row = self.samples._read(first, draw_key(key, first))
        shared = self._expanded(self._shared(first))
        ids, labels = [row["input_ids"]], [row["labels"]]
        turns = [np.where(np.arange(len(ids[0])) < shared, 0, 1)]
        for number, other in enumerate(others, start=2):
            tokens, mask = self.samples.tokens_of(other)
            tail = slice(len(self._shared(other)), None)
            ids.append(tokens[tail].astype(np.int64))
            labels.append(np.where(mask[tail], ids[-1], -100))
            turns.append(np.full(len(ids[-1]), number))
        packed = {"input_ids": np.concatenate(ids), "labels": np.concatenate(labels), "turns": np.concatenate(turns)}
        return {**row, **packed}
