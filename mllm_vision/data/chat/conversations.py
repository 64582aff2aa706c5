"""Conversations about images as token ids with labels on the assistant's words only."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mllm_vision.data.chat.collate import IGNORED, ConversationCollator, preview_labels
from mllm_vision.data.chat.messages import BadConversation, image_parts
from mllm_vision.data.chat.templates import CHAT_TEMPLATES, ChatTokenizer, Rendered
from mllm_vision.data.images.transforms import ImageTransform, load_image
from mllm_vision.data.records.forms import ConversationForm, Dialogue, bind_conversations, image_counts, to_messages
from mllm_vision.data.records.sampling import BadRow, BadSamples, EpochDataset, draw_key, judge, only_columns, rows_of

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


@dataclass
class _Part:
    """One sample of a row while it is tokenised: alternatives with their number of images."""

    row: int
    texts: list[tuple[Rendered, int]]
    refused: BadRow | None
    own_images: bool
    fixed: bool


class ConversationDataset(EpochDataset):
    """Conversations, tokenised when the data set is built, so that what is refused is known before training.

    Args:
        records: a `datasets.Dataset` (or a list of dicts) with undecoded images, see `load_records`.
        columns: role -> column, as `bind_conversations` gives it (or bind_columns); None binds by name and type.
        tokenizer: the language model's; holds the image token.
        num_image_tokens: how many tokens an image takes; the image token is repeated as often.
        image_token: stands for an image in the chat template's output.
        max_length: in tokens, image tokens included.
        on_truncation: "refuse" leaves out a longer conversation; "truncate" cuts it at the end, but refuses it
            where image tokens or all supervised words would be cut.
        chat_template: a name in CHAT_TEMPLATES, a Jinja text with generation marks, or None for the tokenizer's.
        max_turns: rows with more questions than this become several samples that share the image.
        shuffle_turns: several questions on an image come in an order drawn from (seed, epoch, row), since they
            are asked one by one in use. Conversations proper keep theirs.
        transform: decodes images with its own settings; optional.
        seed, bad_samples: as for `PairDataset`.
        progress: show a bar while tokenising.
        streamed: `records` are the first rows of a stream and only say what its rows are like: they are not tokenised,
            and `read_record` is what reads.

    A row is {"input_ids", "labels" (int64 arrays [T], -100 outside the assistant's words), "images": [PIL],
    "keys", "index"}. `refused` counts what was left out by reason, `lengths` holds the samples' tokens, `has_images`
    is False where no sample has an image.

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
        streamed: bool = False,
    ) -> None:
        total = rows_of(records)
        if num_image_tokens < 1:
            raise ValueError(f"num_image_tokens={num_image_tokens} must be at least 1")
        if on_truncation not in ("refuse", "truncate"):
            raise ValueError(f"on_truncation={on_truncation!r} is neither 'refuse' nor 'truncate'")
        if max_length <= num_image_tokens:
            raise ValueError(
                f"max_length={max_length} has no room for words beside num_image_tokens={num_image_tokens} an image; "
                "raise --max_length"
            )
        if max_turns is not None and max_turns < 1:
            raise ValueError(f"max_turns={max_turns} must be at least 1")
        super().__init__(seed, total, bad_samples)
        self.form = ConversationForm(records, columns)
        self.columns = self.form.columns
        self.chat = ChatTokenizer(tokenizer, chat_template, image_token)
        self.num_image_tokens, self.max_length = int(num_image_tokens), int(max_length)
        self.on_truncation, self.max_turns, self.transform = on_truncation, max_turns, transform
        self.shuffle_turns = shuffle_turns and self.form.by_question
        self.records = only_columns(records, list(self.columns.values()))
        self.left_out = self.without_image = self.truncated = 0
        if not streamed:
            self._images = only_columns(self.records, [self.columns["image"]] if "image" in self.columns else [])
            self._tokenise(progress)

    # -- building ---------------------------------------------------------------------------------------------

    def _tokenise(self, progress: bool) -> None:
        """Every conversation once: kept as flat arrays, which worker processes share without copies."""
        from tqdm.auto import tqdm

        samples: list[tuple[int, ...]] = []  # row, part of it, first variant, number of variants, flags
        ids: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        total = rows_of(self.records)
        self.bad_samples.examine(total)
        with tqdm(
            total=total, desc="tokenising conversations", unit="row", disable=not progress or total < 2000
        ) as bar:
            for chunk in _chunks(self._text_rows(), 256):
                wanted = [parts for row, record in chunk for parts in self._beforehand(row, record)]
                encoded = iter(self.chat.encode([text for part in wanted for text, _ in part.texts]))
                for part in wanted:
                    good, last = [], part.refused
                    for rendered, images in part.texts:
                        found = judge(f"row {part.row}", self._fitting, next(encoded), rendered, images)
                        if isinstance(found, BadRow):
                            last = found
                        else:
                            good.append(found)
                    if not good:
                        assert last is not None
                        self.bad_samples.refuse(last.reason, str(last))
                        continue
                    number = samples[-1][1] + 1 if samples and samples[-1][0] == part.row else 0  # among those kept
                    samples.append((part.row, number, len(ids), len(good), part.own_images, part.fixed))
                    ids += [tokens for tokens, _ in good]
                    masks += [mask for _, mask in good]
                bar.update(len(chunk))
        self._tell(total)
        if not samples:
            listed = "\n".join(f"  - {example}" for example in self.bad_samples.examples)
            raise ValueError(f"no conversation of {total} can be used:\n{listed}")
        self._samples = np.asarray(samples, dtype=np.int64)
        self._ids, self._masks = np.concatenate(ids), np.concatenate(masks)
        self._offsets = np.concatenate([[0], np.cumsum([len(tokens) for tokens in ids])])
        images = np.add.reduceat(self._ids == self.chat.image_token_id, self._offsets[:-1])
        long = np.diff(self._offsets) + images * (self.num_image_tokens - 1)
        self.lengths, self.has_images = long[self._samples[:, 2]], bool(images.any())
        self._turns = self._find_turns() if self.shuffle_turns else {}

    def _beforehand(self, row: int, record: dict[str, Any]) -> list[_Part]:
        """The samples of a row in the template's words; its alternatives that the template refuses left out."""
        dialogue = self.bad_samples.judge_beforehand(f"row {row}", self._dialogue, record)
        if isinstance(dialogue, BadRow):
            return []
        self.left_out += dialogue.left
        self.without_image += not dialogue.images
        own = dialogue.images != self.form.images(record)  # inside the messages, or in an order of their own
        parts = []
        for variants in dialogue.samples(self.max_turns):
            part = _Part(row, [], None, own, not dialogue.free)
            for messages in variants:
                rendered = judge(f"row {row}", self.chat.render, messages, self.max_length)
                if isinstance(rendered, BadRow):
                    part.refused = rendered
                else:
                    part.texts.append((rendered, len(image_parts(messages))))
            parts.append(part)
        return parts

    def _dialogue(self, record: dict[str, Any]) -> Dialogue:
        """What a row says, where the template has a place for all of it."""
        dialogue = self.form(record)
        if self.chat.template == CHAT_TEMPLATES["plain"] and not dialogue.captions:
            answers = sum(message["role"] == "assistant" for message in dialogue.messages)
            if answers > 1 or dialogue.pairs:
                raise BadConversation(
                    "the template 'plain' writes captions only",
                    f"the words of {answers or len(dialogue.pairs)} questions would be lost; choose another "
                    "--chat_template",
                )
        return dialogue

    def _tell(self, total: int) -> None:
        """What is refused, and what of the rows that are kept is not used."""
        self.refused = self.bad_samples.reasons
        if self.bad_samples.refused:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in self.refused.most_common())
            logger.warning("%d of %d conversations are refused: %s", self.bad_samples.refused, total, reasons)
        if self.truncated:
            logger.warning("%d conversations are cut at max_length=%d tokens", self.truncated, self.max_length)
        if self.left_out:
            logger.warning(
                "%d images of the column %r are not used: the messages of their rows name images of their own",
                self.left_out,
                self.columns.get("image"),
            )
        if 0 < self.without_image < total and "image" in self.columns:
            logger.warning("%d of %d rows have no image and are trained as text alone", self.without_image, total)

    def _find_turns(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """row -> (what precedes its questions, (start, end) of each of them), for rows with several questions.

        Reordering the cached turns then replaces tokenising anew: a turn ends with the end token, across which
        tokenizers merge nothing. A template may still render the first turn differently (Vicuna's has the image
        inside it), so this is tried out first; where it fails, every dialogue is tokenised as it is read.
        """
        turns: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for row, _, first, _, _, fixed in self._samples:
            if fixed:
                continue
            start, stop = self._offsets[first], self._offsets[first + 1]
            prefix, places = self.chat.turns(self._ids[start:stop], self._masks[start:stop])
            found = np.asarray(places, dtype=np.int64).reshape(-1, 2) + start
            if row in turns:
                found = np.concatenate([turns[row][1], found])
            turns[int(row)] = (np.arange(start, start + prefix), found)
        turns = {row: (prefix, found) for row, (prefix, found) in turns.items() if len(found) > 1}
        self._reorders = True
        for row in list(turns)[:8]:
            pairs = self.form(self.records[row]).pairs
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
        dialogue = self.form(self.records[row])
        return self.chat([dialogue.asking([dialogue.pairs[turn] for turn in order])])[0]

    def _text_rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows without their images; the image column holds as many placeholders as there are images."""
        image = self.columns.get("image")
        texts = [name for role, name in self.columns.items() if role != "image"]
        counts = image_counts(self.records, image) if image else None
        rows = only_columns(self.records, texts)
        for row, record in enumerate(rows):
            record = {name: record.get(name) for name in texts}
            if image is not None and counts is not None:
                record[image] = list(range(int(counts[row])))
            yield row, record

    def _fitting(
        self, encoded: tuple[np.ndarray, np.ndarray] | BadConversation, rendered: Rendered, images: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Unexpanded ids and mask within `max_length`, or BadConversation."""
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
        return self._checked(tokens, mask, images)

    def _too_long(self, size: str) -> BadConversation:
        return BadConversation(
            "longer than max_length",
            f"{size}, max_length={self.max_length}; raise --max_length, or cut it with --on_truncation truncate",
        )

    def _checked(self, tokens: np.ndarray, mask: np.ndarray, images: int) -> tuple[np.ndarray, np.ndarray]:
        """Unexpanded ids and mask within `max_length`, or BadConversation."""
        is_image = tokens == self.chat.image_token_id
        if int(is_image.sum()) != images:
            raise BadConversation(
                "more <image> tokens than images" if is_image.sum() > images else "more images than <image> tokens",
                f"{int(is_image.sum())} image tokens after the chat template, {images} images",
            )
        if not mask.any():
            raise BadConversation("no supervised token", "the assistant says nothing")
        ends = np.cumsum(np.where(is_image, self.num_image_tokens, 1))
        if ends[-1] <= self.max_length:
            return tokens, mask
        if self.on_truncation == "refuse":
            raise self._too_long(f"{ends[-1]} tokens")
        keep = int((ends <= self.max_length).sum())
        if is_image[keep:].any():
            raise BadConversation(
                "truncation would cut image tokens", f"{ends[-1]} tokens, max_length={self.max_length}"
            )
        if not mask[:keep].any():
            raise BadConversation("truncation leaves no supervised token", f"max_length={self.max_length}")
        self.truncated += 1
        return tokens[:keep], mask[:keep]

    # -- reading ----------------------------------------------------------------------------------------------

    def record_of(self, index: int) -> int:
        """The row of the records that a sample comes from."""
        return int(self._samples[index, 0])

    def tokens_of(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A sample's first wording: ids `[T]`, one image token an image, and the mask of the assistant's words."""
        first = int(self._samples[index, 2])
        span = slice(self._offsets[first], self._offsets[first + 1])
        return self._ids[span], self._masks[span]

    def __len__(self) -> int:
        return len(self._samples)

    def _read(self, index: int, key: int) -> dict[str, Any]:
        row, part, first, variants, own_images, _ = (int(value) for value in self._samples[index])
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
        if not (tokens == self.chat.image_token_id).any():
            images = []  # a text-only conversation has no image to read
        elif own_images:
            images = self.form(self.records[row]).images
        else:
            images = self.form.images(self._images[row])
        return self._sample(images, tokens, mask, key, row)

    def read_record(self, record: dict[str, Any], key: int, index: int) -> dict[str, Any]:
        """A record that is met for the first time (of a stream) as a row; ValueError when it cannot be used.

        One record gives one row: of a record that makes several (`max_turns`), `key` draws one; the questions come
        in an order drawn by `key` where `shuffle_turns` says so, and with `max_turns` so many of them.
        """
        dialogue = self._dialogue(record)
        if self.shuffle_turns and dialogue.free:
            drawn = np.random.default_rng(key).permutation(len(dialogue.pairs))[: self.max_turns]
            messages = dialogue.asking([dialogue.pairs[turn] for turn in drawn])
        else:
            parts = dialogue.samples(self.max_turns)
            variants = parts[key % len(parts)]
            messages = variants[key // len(parts) % len(variants)]
        rendered = self.chat.render(messages, self.max_length)
        [encoded] = self.chat.encode([rendered])
        tokens, mask = self._fitting(encoded, rendered, len(image_parts(messages)))
        return self._sample(dialogue.images, tokens, mask, key, index)

    def _sample(
        self, values: Sequence[Any], tokens: np.ndarray, mask: np.ndarray, key: int, index: int
    ) -> dict[str, Any]:
        """Unexpanded ids with their mask, and the images of their image tokens, as a row."""
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
