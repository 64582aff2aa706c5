"""Rows of conversations to token ids with the assistant's tokens marked, and to refusals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mllm_vision.data.chat.messages import BadConversation, image_parts
from mllm_vision.data.chat.templates import CHAT_TEMPLATES, ChatTokenizer, Rendered
from mllm_vision.data.images.decoding import image_size
from mllm_vision.data.images.layouts import ImageLayout
from mllm_vision.data.records.forms import ConversationForm, Dialogue
from mllm_vision.data.records.sampling import BadRow, bytes_id, judge

_NUMBERS = ("row", "part", "parts", "variants", "length", "images", "prefix", "prefix_id", "truncated", "left_out")
_LISTS = ("ids", "mask", "ends", "sizes")
_MARKS = ("own_images", "free", "without_image")

# (height, width) of every image; None where the layout does not depend on them
Sizes = Sequence[Sequence[int]] | np.ndarray | None


class Placed(NamedTuple):
    """An image of the image column while its row is tokenised."""

    number: int
    height: int = 0
    width: int = 0
    unreadable: BadRow | None = None


@dataclass
class _Part:
    """One sample of a row while it is tokenised: alternatives with their number of images."""

    texts: list[tuple[Rendered, int]] = field(default_factory=list)
    sizes: Sizes = None
    refused: BadRow | None = None
    own_images: bool = False
    free: bool = False


@dataclass
class Tokeniser:
    """Rows to tokens, and to refusals.

    Args:
        form: reads a row. chat: messages to ids.
        layout, max_length, on_truncation, max_turns: see `ConversationDataset`.
    """

    form: ConversationForm
    chat: ChatTokenizer
    layout: ImageLayout
    max_length: int
    on_truncation: str
    max_turns: int | None

    def __call__(self, records: Sequence[dict[str, Any]], first: int) -> dict[str, list[Any]]:
        """The columns of `features()` for rows that begin with number `first`: one entry a sample or refusal."""
        rows = [(first + place, *self._parts(first + place, record)) for place, record in enumerate(records)]
        texts = [text for _, parts, *_ in rows for part in parts for text, _ in part.texts]
        encoded = iter(self.chat.encode(texts))
        found: dict[str, list[Any]] = {name: [] for name in features()}
        for row, parts, left_out, without_image in rows:
            entries = [self._entry(row, part, encoded) for part in parts]
            kept = [entry for entry in entries if entry["reason"] is None]
            for number, entry in enumerate(kept):
                entry |= {"part": number, "parts": len(kept)}
            entries[0] |= {"left_out": left_out, "without_image": without_image}
            for entry in entries:
                for name, values in found.items():
                    values.append(entry.get(name, name not in _MARKS and 0))
        return found

    def _parts(self, row: int, record: dict[str, Any]) -> tuple[list[_Part], int, bool]:
        """(the rendered samples of a row, images left out, whether it has none)."""
        dialogue = judge(f"row {row}", self.dialogue, record)
        if isinstance(dialogue, BadRow):
            return [_Part(refused=dialogue)], 0, False
        own = dialogue.images != self.form.images(record)  # inside the messages, or in an order of their own
        sizes = judge(f"row {row}", self.sizes, dialogue.images)
        if isinstance(sizes, BadRow):
            return [_Part(refused=sizes)], 0, False
        parts = []
        for variants in dialogue.samples(self.max_turns):
            part = _Part(sizes=sizes, own_images=own, free=dialogue.free)
            for messages in variants:
                rendered = judge(f"row {row}", self.chat.render, messages, self.max_length)
                if isinstance(rendered, BadRow):
                    part.refused = rendered
                else:
                    part.texts.append((rendered, len(image_parts(messages))))
            parts.append(part)
        return parts, dialogue.left, not dialogue.images

    def _entry(self, row: int, part: _Part, encoded: Iterator[Any]) -> dict[str, Any]:
        """A sample as its columns, or its refusal."""
        good: list[tuple[np.ndarray, np.ndarray, bool]] = []
        last = part.refused
        for rendered, count in part.texts:
            found = judge(f"row {row}", self.fitting, next(encoded), rendered, count, part.sizes)
            if isinstance(found, BadRow):
                last = found
            else:
                good.append(found)
        entry: dict[str, Any] = {"row": row, "reason": None, "example": None}
        entry |= {name: [] for name in _LISTS}
        if not good:
            assert last is not None
            return entry | {"reason": last.reason, "example": str(last)}
        first, mask = good[0][:2]
        prefix, _ = self.chat.turns(first, mask)
        _, repeat = self.layout.expand(first, part.sizes)
        ids = np.concatenate([tokens for tokens, *_ in good])
        images = [int((tokens == self.chat.image_token_id).sum()) for tokens, *_ in good]
        return entry | {
            "ids": ids,
            "mask": np.concatenate([mask for _, mask, _ in good]),
            "ends": np.cumsum([len(tokens) for tokens, *_ in good]),
            "variants": len(good),
            "sizes": np.asarray([] if part.sizes is None else part.sizes, dtype=np.int32).reshape(-1),
            "own_images": part.own_images,
            "free": part.free,
            "length": repeat.sum(),
            "images": sum(images),
            "prefix": repeat[:prefix].sum(),
            "prefix_id": bytes_id(first[:prefix].tobytes()),
            "truncated": sum(cut for *_, cut in good),
        }

    def dialogue(self, record: dict[str, Any]) -> Dialogue:
        """The content of a row; refused if the template would drop some of it."""
        dialogue = self.form(record)
        if self.chat.template == CHAT_TEMPLATES["plain"] and not dialogue.captions:
            answers = sum(message["role"] == "assistant" for message in dialogue.messages)
            if answers > 1 or dialogue.pairs:
                raise BadConversation(
                    "the template 'plain' supports captions only",
                    f"the text of {answers or len(dialogue.pairs)} questions would be lost; choose another "
                    "--chat_template",
                )
        return dialogue

    def sizes(self, images: Sequence[Any]) -> Sizes:
        """(height, width) of a row's images, from their headers unless they are known; None for a fixed layout.

        Raises:
            BadRow: one of them cannot be read.
        """
        if self.layout.fixed:
            return None
        found = []
        for image in images:
            if not isinstance(image, Placed):
                found.append(image_size(image))
            elif image.unreadable is not None:
                raise image.unreadable
            else:
                found.append((image.height, image.width))
        return found

    def fitting(
        self, encoded: tuple[np.ndarray, np.ndarray] | BadConversation, rendered: Rendered, images: int, sizes: Sizes
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """(unexpanded ids, mask, whether they were cut) within `max_length`, or BadConversation."""
        if isinstance(encoded, BadConversation):
            raise encoded
        tokens, mask = encoded
        if rendered.cut:  # it is longer than max_length for certain, so that it was not read to its end
            whole = len(rendered.text) + rendered.cut
            if self.on_truncation == "refuse":
                raise self._too_long(f"{whole} characters")
            if int((tokens == self.chat.image_token_id).sum()) < images:
                raise BadConversation("truncation would cut image tokens", f"{whole} characters")
            if not mask.any():
                raise BadConversation("truncation leaves no supervised token", f"{whole} characters")
        return self.checked(tokens, mask, images, sizes)

    def checked(
        self, tokens: np.ndarray, mask: np.ndarray, images: int, sizes: Sizes
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """(unexpanded ids, mask, whether they were cut) within `max_length`, or BadConversation."""
        is_image = tokens == self.chat.image_token_id
        if int(is_image.sum()) != images:
            raise BadConversation(
                "more <image> tokens than images" if is_image.sum() > images else "more images than <image> tokens",
                f"{int(is_image.sum())} image tokens after the chat template, {images} images",
            )
        if not mask.any():
            raise BadConversation("no supervised token", "the assistant says nothing")
        ends = np.cumsum(self.layout.expand(tokens, sizes)[1])
        if ends[-1] <= self.max_length:
            return tokens, mask, False
        text = int((~is_image).sum())
        if self.on_truncation == "refuse":
            parts = f"{ends[-1] - text} of {images} images and {text} of text" if images else ""
            raise self._too_long(f"{ends[-1]} tokens", parts)
        keep = int((ends <= self.max_length).sum())
        if is_image[keep:].any():
            raise BadConversation(
                "truncation would cut image tokens",
                f"{ends[-1]} tokens, {ends[-1] - text} of {images} images, max_length={self.max_length}",
            )
        if not mask[:keep].any():
            raise BadConversation("truncation leaves no supervised token", f"max_length={self.max_length}")
        return tokens[:keep], mask[:keep], True

    def _too_long(self, size: str, parts: str = "") -> BadConversation:
        fewer = "" if self.layout.fixed or not parts else ", let an image take fewer tiles"
        return BadConversation(
            "longer than max_length",
            f"{size}, max_length={self.max_length}{f' ({parts})' if parts else ''}; raise --max_length{fewer}, or cut "
            "it with --on_truncation truncate",
        )


def features() -> Any:
    """The columns of tokenised data: a sample, or the `reason` and `example` of a refusal.

    `ids`, `mask` and `ends` hold all alternative wordings, one behind the other; `part` and `parts` number the kept
    samples of a row; `length` and `prefix` (up to the last image) count the first wording's tokens with its images';
    `sizes` are (height, width) of one image after the other, where the layout depends on them.
    """
    from datasets import Features, List, Value

    kinds = {name: Value("int64") for name in _NUMBERS} | {name: Value("bool") for name in _MARKS}
    kinds |= {"reason": Value("string"), "example": Value("string")}
    lists = {name: List(Value("bool" if name == "mask" else "int32")) for name in _LISTS}
    return Features(kinds | lists)
