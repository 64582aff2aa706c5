"""Rows of conversations to batches, and a batch as text that shows what is supervised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mllm_vision.data.images.layouts import ImageLayout

IGNORED = -100  # the label of tokens without supervision


class ConversationCollator:
    """Rows of `ConversationDataset` to a batch, padded on the right.

    Args:
        tokenizer: gives the padding id (the end token's where it has none; padding is masked anyway).
        layout: images to tensors.
        pad_to_multiple_of: round the length up.
        token_weights: rows and length to the weights of their labels, as `TokenWeights`.

    Gives "input_ids", "attention_mask" and "labels" `[B, T]`, and the layout's tensors of all images in the order of
    their tokens ("pixel_values" and, for some, more); a batch of text alone has none of these. With
    `token_weights` also "token_weights", float32 `[B, T]`. With rows of
    `PackedConversations` the "attention_mask" is `[B, 1, T, T]` (True: the row's token attends to the column's), and
    "position_ids" `[B, T]` start at every conversation. Rows of `PackedSamples` have these positions and no mask.
    """

    def __init__(
        self,
        tokenizer: Any,
        layout: ImageLayout,
        *,
        pad_to_multiple_of: int = 1,
        token_weights: Callable[[Sequence[dict[str, Any]], int], Tensor] | None = None,
    ) -> None:
        pad = tokenizer.pad_token_id
        self.pad_id = int(pad if pad is not None else tokenizer.eos_token_id)
        self.layout, self.multiple = layout, max(1, int(pad_to_multiple_of))
        self.token_weights = token_weights

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        length = -(-max(len(row["input_ids"]) for row in rows) // self.multiple) * self.multiple
        batch = self.pad(rows, length, self.pad_id)
        if self.token_weights is not None:
            batch["token_weights"] = self.token_weights(rows, length)
        images = [image for row in rows for image in row["images"]]
        if images:
            batch |= self.layout(images, keys=[key for row in rows for key in row["keys"]])
        return batch

    @classmethod
    def pad(cls, rows: Sequence[dict[str, Any]], length: int, pad_id: int) -> dict[str, Tensor]:
        """Ids, labels and what separates conversations, `[B, length]`."""
        ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
        labels = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
        attention = torch.zeros(len(rows), length, dtype=torch.int64)
        for number, row in enumerate(rows):
            size = len(row["input_ids"])
            ids[number, :size] = torch.as_tensor(row["input_ids"])
            labels[number, :size] = torch.as_tensor(row["labels"])
            attention[number, :size] = 1
        batch = {"input_ids": ids, "attention_mask": attention, "labels": labels}
        if any("segments" in row for row in rows):
            del batch["attention_mask"]  # without a mask, positions that begin again separate
            return batch | {"position_ids": torch.stack([cls._positions(row["segments"], length) for row in rows])}
        if any("turns" in row for row in rows):
            batch |= cls.separate(rows, length)
        return batch

    @staticmethod
    def _positions(segments: Any, length: int) -> Tensor:
        """`[length]` positions that begin again with every segment, and with the padding."""
        own = torch.full((length,), -1, dtype=torch.int64)
        own[: len(segments)] = torch.as_tensor(segments)
        places = torch.arange(length)
        starts = torch.cat([torch.ones(1, dtype=torch.bool), own[1:] != own[:-1]])
        return places - torch.cummax(torch.where(starts, places, 0), dim=0).values

    @staticmethod
    def separate(rows: Sequence[dict[str, Any]], length: int) -> dict[str, Tensor]:
        """Mask and positions that keep packed conversations apart: each sees the shared beginning and itself."""
        turns = torch.full((len(rows), length), -1, dtype=torch.int64)  # -1: padding, which sees only padding
        positions = torch.zeros(len(rows), length, dtype=torch.int64)
        for number, row in enumerate(rows):
            size = len(row["input_ids"])
            own = torch.as_tensor(row["turns"]) if "turns" in row else torch.zeros(size, dtype=torch.int64)
            turns[number, :size] = own
            places = torch.arange(size)
            shared = int((own == 0).sum())
            starts = torch.cat([torch.ones(1, dtype=torch.bool), own[1:] != own[:-1]])
            begin = torch.cummax(torch.where(starts, places, 0), dim=0).values
            positions[number, :size] = torch.where(own == 0, places, places - begin + shared)
        visible = (turns[:, :, None] == turns[:, None, :]) | ((turns[:, None, :] == 0) & (turns[:, :, None] >= 0))
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        return {"attention_mask": (visible & causal)[:, None], "position_ids": positions}


def preview_labels(batch: dict[str, Tensor], tokenizer: Any, row: int = 0) -> str:
    """One row of a batch as text, its supervised text between « and », repeated tokens as `<image>×16`."""
    ids, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
    kept = [True] * len(ids)
    if "attention_mask" in batch:
        mask = batch["attention_mask"][row]
        kept = [bool(value) for value in (mask if mask.dim() == 1 else mask[0, :, 0]).tolist()]  # padding sees no BOS
    runs: list[tuple[bool, list[int]]] = []
    for token, label, keep in zip(ids, labels, kept, strict=True):
        if not keep:
            continue
        if runs and runs[-1][0] == (label != IGNORED):
            runs[-1][1].append(token)
        else:
            runs.append((label != IGNORED, [token]))
    return "".join(f"«{_text(run, tokenizer)}»" if supervised else _text(run, tokenizer) for supervised, run in runs)


def _text(tokens: list[int], tokenizer: Any) -> str:
    pieces: list[str] = []
    at = 0
    while at < len(tokens):
        end = at
        while end < len(tokens) and tokens[end] == tokens[at]:
            end += 1
        if end - at > 3:
            pieces.append(f"{tokenizer.decode([tokens[at]])}×{end - at}")
            at = end
            continue
        start, end = at, at + 1
        while end < len(tokens) and tokens[end : end + 4] != [tokens[end]] * 4:
            end += 1
        pieces.append(tokenizer.decode(tokens[start:end]))
        at = end
    return "".join(pieces)
