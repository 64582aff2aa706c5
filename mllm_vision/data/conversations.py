"""Conversations about pictures as token ids with labels on the assistant's words only."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .chat import CHAT_TEMPLATES, ChatTokenizer
from .collate import IGNORED, ConversationCollator, preview_labels
from .columns import bind_columns
from .images import ImageTransform, load_image
from .messages import (
    BadConversation,
    caption_texts,
    from_caption,
    from_pairs,
    image_parts,
    question_pairs,
    record_images,
    to_messages,
)
from .sampling import BadRow, BadSamples, EpochDataset, draw_key, only_columns, rows_of

__all__ = [
    "CHAT_TEMPLATES",
    "BadConversation",
    "ConversationCollator",
    "ConversationDataset",
    "bind_conversations",
    "preview_labels",
    "to_messages",
]
logger = logging.getLogger(__name__)


def bind_conversations(records: Any, overrides: dict[str, str] | None = None) -> dict[str, str]:
    """The columns of a conversation: "messages", else "conversations", else "question" and "answer", else "caption".

    An "image" column is bound where there is one. What `overrides` names is preferred.

    Raises:
        ValueError: none of these is there; lists the columns.
    """
    rows_of(records)
    overrides = {role: name for role, name in (overrides or {}).items() if name}
    forms: list[tuple[str, ...]] = [("messages",), ("conversations",), ("question", "answer"), ("caption",)]
    forms.sort(key=lambda form: not any(role in overrides for role in form))
    for form in forms:
        bound = bind_columns(records, [*(f"{role}?" for role in form), "image?"], overrides)
        if all(role in bound for role in form):
            return bound
    try:
        bind_columns(records, ("messages",))
    except ValueError as error:
        raise ValueError(
            "no conversation found: neither messages, conversations, question with answer, nor caption. "
            + str(error).partition(". ")[2]
        ) from None
    raise AssertionError("unreachable: messages would have been bound")


class ConversationDataset(EpochDataset):
    """Conversations, tokenised when the data set is built, so that what is refused is known before training.

    Args:
        records: a `datasets.Dataset` (or a list of dicts) with undecoded pictures, see `load_records`.
        columns: role -> column, as `bind_conversations` gives it (or bind_columns); None binds by name and type.
        tokenizer: the language model's; holds the image token.
        num_image_tokens: how many tokens a picture takes; the image token is repeated as often.
        image_token: stands for a picture in the chat template's output.
        max_length: in tokens, image tokens included.
        on_truncation: "refuse" leaves out a longer conversation; "truncate" cuts it at the end, but refuses it
            where image tokens or all supervised words would be cut.
        chat_template: a name in CHAT_TEMPLATES, a Jinja text with generation marks, or None for the tokenizer's.
        max_turns: rows with more questions than this become several samples that share the picture.
        shuffle_turns: several questions on a picture come in an order drawn from (seed, epoch, row), since they
            are asked one by one in use. Conversations proper keep theirs.
        transform: decodes pictures with its own settings; optional.
        seed, bad_samples: as for `PairDataset`.
        progress: show a bar while tokenising.

    A row is {"input_ids", "labels" (int64 arrays [T], -100 outside the assistant's words), "images": [PIL],
    "keys", "index"}. `refused` counts what was left out by reason, `lengths` holds the samples' tokens.

    Raises:
        ValueError: an empty data set, nothing left after refusals (with the reasons), an impossible setting, and
            what `ChatTokenizer` raises.
    """

    def __init__(
        self,
        records: Any,
        columns: dict[str, str] | None,
        tokenizer: Any,
        *,
        num_image_tokens: int,
        image_token: str = "<image>",
        max_length: int = 1024,
        on_truncation: str = "refuse",
        chat_template: str | None = None,
        max_turns: int | None = None,
        shuffle_turns: bool = True,
        transform: ImageTransform | None = None,
        seed: int = 0,
        bad_samples: BadSamples | None = None,
        progress: bool = True,
    ) -> None:
        total = rows_of(records)
        if num_image_tokens < 1:
            raise ValueError(f"num_image_tokens={num_image_tokens} must be at least 1")
        if on_truncation not in ("refuse", "truncate"):
            raise ValueError(f"on_truncation={on_truncation!r} is neither 'refuse' nor 'truncate'")
        if max_length <= num_image_tokens:
            raise ValueError(
                f"max_length={max_length} has no room for words beside num_image_tokens={num_image_tokens} a picture; "
                "raise max_length"
            )
        if max_turns is not None and max_turns < 1:
            raise ValueError(f"max_turns={max_turns} must be at least 1")
        super().__init__(seed, total, bad_samples)
        self.columns = dict(columns) if columns else bind_conversations(records)
        self.chat = ChatTokenizer(tokenizer, chat_template, image_token)
        self.num_image_tokens, self.max_length = int(num_image_tokens), int(max_length)
        self.on_truncation, self.max_turns, self.transform = on_truncation, max_turns, transform
        self._by_question = not {"messages", "conversations"} & set(self.columns) and "question" in self.columns
        self.shuffle_turns = shuffle_turns and self._by_question
        self.records = only_columns(records, list(self.columns.values()))
        names = [self.columns[role] for role in ("image", "messages") if role in self.columns]
        self._pictures = only_columns(self.records, names)
        self._tokenise(progress)

    # -- building ---------------------------------------------------------------------------------------------

    def _tokenise(self, progress: bool) -> None:
        """Every conversation once: kept as flat arrays, which worker processes share without copies."""
        from tqdm.auto import tqdm

        samples: list[tuple[int, int, int, int]] = []  # row, part of it, first variant, number of variants
        ids: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        total = rows_of(self.records)
        self.bad_samples.examine(total)
        with tqdm(
            total=total, desc="tokenising conversations", unit="row", disable=not progress or total < 2000
        ) as bar:
            for chunk in _chunks(self._text_rows(), 256):
                wanted: list[tuple[int, list[Any]]] = []
                for row, record in chunk:
                    found = self.bad_samples.judge_beforehand(f"row {row}", self._variants, record)
                    if not isinstance(found, BadRow):
                        wanted += [(row, variants) for variants in found]
                encoded = iter(self.chat([messages for _, variants in wanted for messages in variants]))
                for row, variants in wanted:
                    good, last = [], None
                    for messages in variants:
                        tokens, mask = next(encoded)
                        try:
                            good.append(self._checked(tokens, mask, image_parts(messages)))
                        except BadConversation as error:
                            last = error
                    if not good:
                        assert last is not None
                        self.bad_samples.refuse(last.reason, f"row {row}: {last}")
                        continue
                    part = samples[-1][1] + 1 if samples and samples[-1][0] == row else 0  # among those kept
                    samples.append((row, part, len(ids), len(good)))
                    ids += [tokens for tokens, _ in good]
                    masks += [mask for _, mask in good]
                bar.update(len(chunk))
        self.refused = self.bad_samples.reasons
        if self.bad_samples.refused:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in self.refused.most_common())
            logger.warning("%d of %d conversations are refused: %s", self.bad_samples.refused, total, reasons)
        if not samples:
            listed = "\n".join(f"  - {example}" for example in self.bad_samples.examples)
            raise ValueError(f"no conversation of {total} can be used:\n{listed}")
        self._samples = np.asarray(samples, dtype=np.int64)
        self._ids, self._masks = np.concatenate(ids), np.concatenate(masks)
        self._offsets = np.concatenate([[0], np.cumsum([len(tokens) for tokens in ids])])
        images = np.add.reduceat(self._ids == self.chat.image_token_id, self._offsets[:-1])
        long = np.diff(self._offsets) + images * (self.num_image_tokens - 1)
        self.lengths = long[self._samples[:, 2]]
        self._turns = self._find_turns() if self.shuffle_turns else {}

    def _find_turns(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """row -> (what precedes its questions, (start, end) of each of them), for rows with several questions.

        Reordering the cached turns then replaces tokenising anew: a turn ends with the end token, across which
        tokenizers merge nothing. A template may still render the first turn differently (Vicuna's has the picture
        inside it), so this is tried out first; where it fails, every dialogue is tokenised as it is read.
        """
        turns: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for row, _, first, _ in self._samples:
            start, stop = self._offsets[first], self._offsets[first + 1]
            prefix, places = self.chat.turns(self._ids[start:stop], self._masks[start:stop])
            found = np.asarray(places, dtype=np.int64).reshape(-1, 2) + start
            if row in turns:
                found = np.concatenate([turns[row][1], found])
            turns[int(row)] = (np.arange(start, start + prefix), found)
        turns = {row: (prefix, found) for row, (prefix, found) in turns.items() if len(found) > 1}
        self._reorders = True
        for row in list(turns)[:8]:
            pairs = question_pairs(self.records[row], self.columns)
            if len(pairs) != len(turns[row][1]):
                continue
            order = np.random.default_rng(row).permutation(len(pairs))
            self._reorders &= np.array_equal(self._reordered(row, order, turns)[0], self._anew(row, order)[0])
        return turns

    def _reordered(self, row: int, order: Sequence[int], turns: dict[int, Any]) -> tuple[np.ndarray, np.ndarray]:
        prefix, places = turns[row]
        where = np.concatenate([prefix, *(np.arange(*places[turn]) for turn in order)])
        return self._ids[where], self._masks[where]

    def _anew(self, row: int, order: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The row's questions in this order through the chat template."""
        record = self.records[row]
        pairs = question_pairs(record, self.columns)
        count = len(record_images(record, self.columns))
        return self.chat([from_pairs([pairs[turn] for turn in order], count)])[0]

    def _text_rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows without their pictures; the image column holds as many placeholders as there are pictures."""
        image = self.columns.get("image")
        texts = [name for role, name in self.columns.items() if role != "image"]
        counts = image_counts(self.records, image) if image else None
        rows = only_columns(self.records, texts)
        for row, record in enumerate(rows):
            record = {name: record.get(name) for name in texts}
            if image is not None and counts is not None:
                record[image] = [b"?"] * int(counts[row])
            yield row, record

    def _variants(self, record: dict[str, Any]) -> list[list[Any]]:
        """The samples of a row, each a list of alternative conversations (captions to draw from)."""
        count = len(record_images(record, self.columns))
        if self._by_question:
            pairs = question_pairs(record, self.columns)
            step = self.max_turns or len(pairs)
            return [[from_pairs(pairs[at : at + step], count)] for at in range(0, len(pairs), step)]
        if not {"messages", "conversations"} & set(self.columns) and "caption" in self.columns:
            return [[from_caption(caption, count) for caption in caption_texts(record, self.columns)]]
        messages = to_messages(record, self.columns)
        mentioned = image_parts(messages)
        if mentioned > count:
            raise BadConversation("more <image> tokens than images", f"{mentioned} in the text, {count} in the record")
        if mentioned < count:
            raise BadConversation(
                "more images than <image> tokens",
                f"{count} in the record, {mentioned} in the text; put <image> where each one belongs",
            )
        return [[messages]]

    def _checked(self, tokens: np.ndarray, mask: np.ndarray, images: int) -> tuple[np.ndarray, np.ndarray]:
        """Unexpanded ids and mask within `max_length`, or BadConversation."""
        is_image = tokens == self.chat.image_token_id
        if int(is_image.sum()) != images:
            raise BadConversation(
                "more <image> tokens than images" if is_image.sum() > images else "more images than <image> tokens",
                f"{int(is_image.sum())} image tokens after the chat template, {images} pictures",
            )
        if not mask.any():
            raise BadConversation("no supervised token", "the assistant says nothing")
        ends = np.cumsum(np.where(is_image, self.num_image_tokens, 1))
        if ends[-1] <= self.max_length:
            return tokens, mask
        if self.on_truncation == "refuse":
            raise BadConversation(
                "longer than max_length",
                f"{ends[-1]} tokens, max_length={self.max_length}; raise it, or set max_turns or on_truncation",
            )
        keep = int((ends <= self.max_length).sum())
        if is_image[keep:].any():
            raise BadConversation(
                "truncation would cut image tokens", f"{ends[-1]} tokens, max_length={self.max_length}"
            )
        if not mask[:keep].any():
            raise BadConversation("truncation leaves no supervised token", f"max_length={self.max_length}")
        return tokens[:keep], mask[:keep]

    # -- reading ----------------------------------------------------------------------------------------------

    def record_of(self, index: int) -> int:
        """The row of the records that a sample comes from."""
        return int(self._samples[index, 0])

    def tokens_of(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A sample's first wording: ids `[T]`, one image token a picture, and the mask of the assistant's words."""
        first = int(self._samples[index, 2])
        span = slice(self._offsets[first], self._offsets[first + 1])
        return self._ids[span], self._masks[span]

    def __len__(self) -> int:
        return len(self._samples)

    def _read(self, index: int, key: int) -> dict[str, Any]:
        row, part, first, variants = (int(value) for value in self._samples[index])
        if row in self._turns:
            # The order is the row's, so that the parts of a row share out its questions in every epoch.
            rng = np.random.default_rng(draw_key(self.seed, self.epoch, row, 2))
            count = len(self._turns[row][1])
            step = self.max_turns or count
            order = rng.permutation(count)[part * step : (part + 1) * step]
            tokens, mask = self._reordered(row, order, self._turns) if self._reorders else self._anew(row, order)
            tokens, mask = self._checked(tokens, mask, int((tokens == self.chat.image_token_id).sum()))
        else:
            chosen = first + key % variants
            span = slice(self._offsets[chosen], self._offsets[chosen + 1])
            tokens, mask = self._ids[span], self._masks[span]
        # A text-only conversation has no picture to read.
        record = self._pictures[row] if (tokens == self.chat.image_token_id).any() else {}
        return self._sample(record, tokens, mask, key, row)

    def read_record(self, record: dict[str, Any], key: int, index: int) -> dict[str, Any]:
        """A record that is met for the first time (of a stream) as a row; ValueError when it cannot be used.

        One record gives one row: of a record that makes several (`max_turns`), `key` draws one; the questions come
        in an order drawn by `key` where `shuffle_turns` says so, and with `max_turns` so many of them.
        """
        if self.shuffle_turns:
            pairs = question_pairs(record, self.columns)
            drawn = np.random.default_rng(key).permutation(len(pairs))[: self.max_turns]
            messages = from_pairs([pairs[turn] for turn in drawn], len(record_images(record, self.columns)))
        else:
            parts = self._variants(record)
            variants = parts[key % len(parts)]
            messages = variants[key // len(parts) % len(variants)]
        [(tokens, mask)] = self.chat([messages])
        return self._sample(record, *self._checked(tokens, mask, image_parts(messages)), key, index)

    def _sample(
        self, record: dict[str, Any], tokens: np.ndarray, mask: np.ndarray, key: int, index: int
    ) -> dict[str, Any]:
        """Unexpanded ids with their mask, and the record's pictures, as a row."""
        values = record_images(record, self.columns) if record else []
        load = self.transform.load if self.transform is not None else load_image
        images = [load(value) for value in values]
        repeat = np.where(tokens == self.chat.image_token_id, self.num_image_tokens, 1)
        ids = np.repeat(tokens, repeat).astype(np.int64)
        return {
            "input_ids": ids,
            "labels": np.where(np.repeat(mask, repeat), ids, IGNORED),
            "images": images,
            "keys": [draw_key(key, 1, number) for number in range(len(images))],
            "index": index,
        }


def _chunks(rows: Iterator[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def image_counts(records: Any, column: str) -> np.ndarray:
    """How many pictures each row's image column holds, without reading them where Arrow can tell."""
    if not hasattr(records, "with_format"):
        return np.asarray([len(record_images(record, {"image": column})) for record in records])
    import pyarrow as pa
    import pyarrow.compute as pc

    counts: list[np.ndarray] = []
    for table in only_columns(records, [column]).with_format("arrow").iter(batch_size=1000):
        values = table[column]
        values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            number = pc.fill_null(pc.list_value_length(values), 0)
        elif pa.types.is_struct(values.type):
            known = [pc.is_valid(pc.struct_field(values, field.name)) for field in values.type]
            number = pc.and_(pc.is_valid(values), known[0] if len(known) == 1 else pc.or_(*known[:2]))
        elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            number = pc.fill_null(pc.not_equal(values, ""), False)
        else:
            number = pc.is_valid(values)
        counts.append(np.asarray(number.to_pylist(), dtype=np.int64))
    return np.concatenate(counts)
