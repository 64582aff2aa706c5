"""Conversations about images as token ids with labels on the assistant's tokens only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from mllm_vision.data.chat.collate import IGNORED
from mllm_vision.data.chat.messages import BadConversation, image_parts
from mllm_vision.data.chat.templates import ChatTokenizer
from mllm_vision.data.chat.token_cache import tokenised
from mllm_vision.data.chat.tokenise import Sizes, Tokeniser
from mllm_vision.data.images.layouts import ImageLayout
from mllm_vision.data.records.forms import ConversationForm
from mllm_vision.data.records.sampling import BadSamples, EpochDataset, draw_key, only_columns, rows_of

logger = logging.getLogger(__name__)


class ConversationDataset(EpochDataset):
    """Conversations, tokenised before training, so that what is refused is known then.

    A `datasets.Dataset` of many rows is tokenised once, by one process of a machine, into the cache of `datasets`;
    every process maps that file (see `token_cache.tokenised`).

    Args:
        records: a `datasets.Dataset` (or a list of dicts) with undecoded images, see `load_records`.
        columns: role -> column, as `bind_conversations` gives it (or bind_columns); None binds by name and type.
        tokenizer: the language model's; holds the image token.
        layout: the model's tokens and tensors of an image, as its system gives them (`task.system.layout(task.model,
            processor)`). Unless it is fixed, the sizes of all images are read from their headers beforehand; a
            conversation with an image that has none is refused.
        image_token: represents an image in the chat template's output.
        max_length: in tokens, image tokens included.
        on_truncation: "refuse" leaves out a longer conversation; "truncate" cuts it at the end, but refuses it
            where image tokens or all supervised tokens would be cut.
        chat_template: a name in CHAT_TEMPLATES, a Jinja text with generation marks, or None for the tokenizer's.
        max_turns: rows with more questions than this become several samples that share the image.
        shuffle_turns: several questions on an image come in an order drawn from (seed, epoch, row), since they
            are asked one by one in use. Conversations proper keep theirs.
        seed, bad_samples: as for `PairDataset`.
        progress: show a bar while tokenising.
        streamed: `records` are the first rows of a stream and only say what its rows are like: they are not tokenised,
            and `read_record` is what reads.

    A row is {"input_ids", "labels" (int64 arrays [T], -100 outside the assistant's text), "images": [PIL],
    "keys", "index"}, which `ConversationCollator` takes. `refused` counts what was left out by reason, `lengths` holds
    the samples' tokens, `has_images` is False where no sample has an image.

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
        layout: ImageLayout,
        image_token: str = "<image>",
        max_length: int = 1024,
        on_truncation: str = "refuse",
        chat_template: str | None = None,
        max_turns: int | None = None,
        shuffle_turns: bool = True,
        seed: int = 0,
        bad_samples: BadSamples | None = None,
        progress: bool = True,
        streamed: bool = False,
    ) -> None:
        total = rows_of(records)
        if on_truncation not in ("refuse", "truncate"):
            raise ValueError(f"on_truncation={on_truncation!r} is neither 'refuse' nor 'truncate'")
        if layout.fixed and max_length <= layout.longest:
            raise ValueError(
                f"max_length={max_length} leaves no room for text beside the {layout.longest} tokens of an image; "
                "raise --max_length"
            )
        if max_turns is not None and max_turns < 1:
            raise ValueError(f"max_turns={max_turns} must be at least 1")
        super().__init__(seed, total, bad_samples)
        self.form = ConversationForm(records, columns)
        self.columns = self.form.columns
        self.chat = ChatTokenizer(tokenizer, chat_template, image_token)
        if layout.image_token_id != self.chat.image_token_id:
            raise ValueError(
                f"the layout's image token has the id {layout.image_token_id}, but {image_token!r} is "
                f"{self.chat.image_token_id} in this tokenizer; build the layout with the model's tokenizer"
            )
        self.layout, self.max_length, self.max_turns = layout, int(max_length), max_turns
        self.shuffle_turns = shuffle_turns and self.form.by_question
        self.records = only_columns(records, list(self.columns.values()))
        self.tokeniser = Tokeniser(self.form, self.chat, layout, self.max_length, on_truncation, max_turns)
        if not streamed:
            self._images = only_columns(self.records, [self.columns["image"]] if "image" in self.columns else [])
            self._take(tokenised(self.records, self.tokeniser, progress), total)

    def _take(self, tokens: Any, total: int) -> None:
        """Counts refusals and keeps the samples' positions; their tokens stay in the (mapped) table."""
        columns = tokens.with_format("numpy")
        refused = np.asarray(tokens.data.column("reason").is_valid())
        self.bad_samples.examine(total)
        for row in tokens.select(np.flatnonzero(refused)):
            self.bad_samples.refuse(row["reason"], row["example"])
        self.left_out, self.without_image, self.truncated = (
            int(columns[name][:].sum()) for name in ("left_out", "without_image", "truncated")
        )
        self._warn(total)
        if refused.all():
            listed = "\n".join(f"  - {example}" for example in self.bad_samples.examples)
            raise ValueError(f"no conversation of {total} can be used:\n{listed}")
        self._tokens = tokens.data.table
        self._places = np.flatnonzero(~refused) if refused.any() else None
        self.lengths = columns["length"][:] if self._places is None else columns["length"][:][self._places]
        self.has_images = bool(columns["images"][:].any())
        self._reorders = self.shuffle_turns and self._reordering_is_exact(columns["free"][:])

    def _warn(self, total: int) -> None:
        """Reports what is refused, and what of the kept rows is not used."""
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
            logger.warning("%d of %d rows have no image and are trained as text only", self.without_image, total)

    # -- questions in another order ---------------------------------------------------------------------------

    def _questions(self, index: int) -> tuple[tuple[np.ndarray, np.ndarray], list[tuple[np.ndarray, np.ndarray]]]:
        """(what precedes the questions, each question with its answer) of a sample's record, as (ids, mask).

        Reordering these replaces tokenising again: a turn ends with the end token, across which tokenizers merge
        nothing.
        """
        part, parts = self._cells(index, "part", "parts")
        start: tuple[np.ndarray, np.ndarray] = (np.zeros(0, np.int32), np.zeros(0, bool))
        found = []
        for sample in range(index - part, index - part + parts):
            tokens, mask = self.tokens_of(sample)
            prefix, places = self.chat.turns(tokens, mask)
            start = tokens[:prefix], mask[:prefix]
            found += [(tokens[slice(*place)], mask[slice(*place)]) for place in places]
        return start, found

    def _reordering_is_exact(self, free: np.ndarray) -> bool:
        """Whether reordered tokens equal the template's own rendering, tried on eight rows.

        A template may render the first turn differently (Vicuna's has the image inside it); then every dialogue is
        tokenised when it is read.
        """
        kept = free if self._places is None else free[self._places]
        tried = 0
        for index in np.flatnonzero(kept).tolist():
            row, part = self._cells(index, "row", "part")
            if part or tried == 8:
                continue
            (start, _), found = self._questions(index)
            pairs = self.form(self.records[row]).pairs
            tried += len(found) > 1
            if 1 < len(found) == len(pairs):
                order = np.random.default_rng(row).permutation(len(pairs)).tolist()
                reordered = np.concatenate([start, *(found[turn][0] for turn in order)])
                if not np.array_equal(reordered, self._tokenise_again(row, order)[0]):
                    return False
        return True

    def _tokenise_again(self, row: int, order: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The row's questions in this order through the chat template."""
        dialogue = self.form(self.records[row])
        return self.chat([dialogue.asking([dialogue.pairs[turn] for turn in order])])[0]

    def _shuffled(self, index: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The sample's share of its row's questions in the order of this epoch; None where the order is fixed."""
        row, part, free = self._cells(index, "row", "part", "free")
        (start, found) = self._questions(index) if self.shuffle_turns and free else (None, [])
        if start is None or len(found) < 2:
            return None
        # The order is the row's, so that the parts of a row share out its questions in every epoch.
        rng = np.random.default_rng(draw_key(self.seed, self.epoch, row, 2))
        step = self.max_turns or len(found)
        order = rng.permutation(len(found))[part * step : (part + 1) * step].tolist()
        if not self._reorders:
            tokens, mask = self._tokenise_again(row, order)
        else:
            tokens, mask = (np.concatenate([start[each], *(found[turn][each] for turn in order)]) for each in (0, 1))
        images = int((tokens == self.chat.image_token_id).sum())
        return self.tokeniser.checked(tokens, mask, images, self.sizes_of(index))[:2]

    # -- reading ----------------------------------------------------------------------------------------------

    def _cells(self, index: int, *names: str) -> list[Any]:
        """Numbers of a sample, as the table of tokens holds them."""
        place = index if self._places is None else int(self._places[index])
        return [self._tokens.column(name)[place].as_py() for name in names]

    def _wording(self, index: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """One of a sample's alternative wordings: unexpanded ids and the mask of the assistant's tokens."""
        place = index if self._places is None else int(self._places[index])
        ids, mask, ends = (
            self._tokens.column(name)[place].values.to_numpy(zero_copy_only=False) for name in ("ids", "mask", "ends")
        )
        span = slice(ends[number - 1] if number else 0, ends[number])
        return ids[span], mask[span]

    def record_of(self, index: int) -> int:
        """The row of the records that a sample comes from."""
        return self._cells(index, "row")[0]

    def sizes_of(self, index: int) -> np.ndarray | None:
        """(height, width) of a sample's images `[images, 2]`; None for a fixed layout."""
        return None if self.layout.fixed else np.asarray(self._cells(index, "sizes")[0], dtype=np.int64).reshape(-1, 2)

    def tokens_of(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A sample's first wording: ids `[T]`, one image token an image, and the mask of the assistant's tokens."""
        return self._wording(index, 0)

    def longest_wordings(self) -> np.ndarray:
        """The tokens of every sample in the longest of its alternative wordings, int64 `[samples]`."""
        ends = self._tokens.column("ends").combine_chunks()
        offsets, flat = ends.offsets.to_numpy(), ends.values.to_numpy()
        kept = np.arange(len(ends)) if self._places is None else self._places
        first = flat[offsets[kept]]  # the tokens of the first wording, images unexpanded
        sizes = np.diff(flat, prepend=0)
        sizes[offsets[kept]] = first
        longest = np.maximum.reduceat(sizes, offsets[kept])
        return self.lengths + longest - first

    def supervised_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """(supervised tokens, share among its sample's wordings) of every alternative wording, `[wordings]`.

        The first token of a sample, which nothing predicts, does not count.
        """
        counts, shares = [], []
        for batch in self._tokens.select(["mask", "ends"]).to_batches():
            mask = batch.column("mask").flatten().to_numpy(zero_copy_only=False)
            wordings = batch.column("ends").value_lengths().to_numpy(zero_copy_only=False)
            lengths = batch.column("mask").value_lengths().to_numpy(zero_copy_only=False)
            ends = batch.column("ends").flatten().to_numpy() + np.repeat(np.cumsum(lengths) - lengths, wordings)
            starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(ends)]
            before = np.concatenate([np.zeros(1, np.int64), np.cumsum(mask)])
            counts.append(before[ends] - before[starts] - mask[starts])
            shares.append(1 / np.repeat(wordings, wordings))
        return np.concatenate(counts), np.concatenate(shares)

    def beginnings(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row of the records, tokens up to the end of its last image, a hash of them) of every sample, `[samples]`."""
        columns = [np.asarray(self._tokens.column(name)) for name in ("row", "prefix", "prefix_id")]
        row, prefix, mark = columns if self._places is None else [column[self._places] for column in columns]
        return row, prefix, mark

    def __len__(self) -> int:
        return len(self.lengths)

    def image_cells(self) -> RowImages:
        """The undecoded images of every row of the records that has a sample, row by row."""
        return RowImages(self)

    def images_of(self, index: int) -> list[Any]:
        """A sample's images, undecoded."""
        row, own_images = self._cells(index, "row", "own_images")
        return self.form(self.records[row]).images if own_images else self.form.images(self._images[row])

    def _read(self, index: int, key: int) -> dict[str, Any]:
        row, variants = self._cells(index, "row", "variants")
        tokens, mask = self._shuffled(index) or self._wording(index, key % variants)
        if not (tokens == self.chat.image_token_id).any():
            images = []  # a text-only conversation has no image to read
        else:
            images = self.images_of(index)
        return self._sample(images, self.sizes_of(index), tokens, mask, key, row)

    def read_record(self, record: dict[str, Any], key: int, index: int) -> dict[str, Any]:
        """A record that is met for the first time (of a stream) as a row; ValueError when it cannot be used.

        One record gives one row: of a record that makes several (`max_turns`), `key` draws one; the questions come
        in an order drawn by `key` where `shuffle_turns` says so, and with `max_turns` so many of them.
        """
        dialogue = self.tokeniser.dialogue(record)
        if self.shuffle_turns and dialogue.free:
            drawn = np.random.default_rng(key).permutation(len(dialogue.pairs))[: self.max_turns]
            messages = dialogue.asking([dialogue.pairs[turn] for turn in drawn])
        else:
            parts = dialogue.samples(self.max_turns)
            variants = parts[key % len(parts)]
            messages = variants[key // len(parts) % len(variants)]
        rendered = self.chat.render(messages, self.max_length)
        [encoded] = self.chat.encode([rendered])
        sizes = self.tokeniser.sizes(dialogue.images)
        tokens, mask, _ = self.tokeniser.fitting(encoded, rendered, len(image_parts(messages)), sizes)
        return self._sample(dialogue.images, sizes, tokens, mask, key, index)

    def _sample(
        self, values: Sequence[Any], sizes: Sizes, tokens: np.ndarray, mask: np.ndarray, key: int, index: int
    ) -> dict[str, Any]:
        """Unexpanded ids with their mask, and the images of their image tokens, as a row."""
        images = [self.layout.load(value) for value in values]
        for image, size in zip(images, [] if sizes is None else sizes, strict=sizes is not None):
            if (image.height, image.width) != tuple(size):
                raise BadConversation(
                    "an image is not the one whose size was read",
                    f"{image.height}x{image.width} pixels, {size[0]}x{size[1]} when the data was opened (height, "
                    "width); do not change images while they are trained on",
                )
        ids, repeat = self.layout.expand(tokens, sizes)
        return {
            "input_ids": ids,
            "labels": np.where(np.repeat(mask, repeat), ids, IGNORED),
            "images": images,
            "keys": [draw_key(key, 1, number) for number in range(len(images))],
            "index": index,
        }


class RowImages(Sequence):
    """The undecoded images of a data set's records, each record once, read when they are asked for."""

    def __init__(self, samples: ConversationDataset) -> None:
        self.samples = samples
        self._first = np.unique(samples.beginnings()[0], return_index=True)[1]  # the first sample of every row

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, number: Any) -> Any:
        return self.samples.images_of(int(self._first[number]))
