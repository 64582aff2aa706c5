"""Conversations tokenised once for all processes of a machine, into an Arrow file that each of them maps."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mllm_vision.data.chat.messages import BadConversation, image_parts
from mllm_vision.data.chat.templates import CHAT_TEMPLATES, ChatTokenizer, Rendered
from mllm_vision.data.records.cache import cached
from mllm_vision.data.records.columns import image_counts
from mllm_vision.data.records.forms import ConversationForm, Dialogue
from mllm_vision.data.records.sampling import BadRow, bytes_id, judge, only_columns

_IN_MEMORY = 2000  # rows; fewer are tokenised in every process, which takes a second or two
_BATCH = 256  # rows that are tokenised at once
_WORKERS = 16  # processes, at most
_NUMBERS = ("row", "part", "parts", "variants", "length", "images", "prefix", "prefix_id", "truncated", "left_out")
_MARKS = ("own_images", "free", "without_image")
_MODULES = ("chat", "records", "text_length.py")  # of mllm_vision.data: what the tokens depend on


@dataclass
class _Part:
    """One sample of a row while it is tokenised: alternatives with their number of images."""

    texts: list[tuple[Rendered, int]] = field(default_factory=list)
    refused: BadRow | None = None
    own_images: bool = False
    free: bool = False


@dataclass
class Tokeniser:
    """Rows to tokens, and to refusals.

    Args:
        form: reads a row. chat: messages to ids.
        num_image_tokens, max_length, on_truncation, max_turns: see `ConversationDataset`.
    """

    form: ConversationForm
    chat: ChatTokenizer
    num_image_tokens: int
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
        parts = []
        for variants in dialogue.samples(self.max_turns):
            part = _Part(own_images=own, free=dialogue.free)
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
            found = judge(f"row {row}", self.fitting, next(encoded), rendered, count)
            if isinstance(found, BadRow):
                last = found
            else:
                good.append(found)
        entry: dict[str, Any] = {"row": row, "reason": None, "example": None, "ids": [], "mask": [], "ends": []}
        if not good:
            assert last is not None
            return entry | {"reason": last.reason, "example": str(last)}
        first, mask = good[0][:2]
        prefix, _ = self.chat.turns(first, mask)
        ids = np.concatenate([tokens for tokens, *_ in good])
        images = [int((tokens == self.chat.image_token_id).sum()) for tokens, *_ in good]
        return entry | {
            "ids": ids,
            "mask": np.concatenate([mask for _, mask, _ in good]),
            "ends": np.cumsum([len(tokens) for tokens, *_ in good]),
            "variants": len(good),
            "own_images": part.own_images,
            "free": part.free,
            "length": len(first) + images[0] * (self.num_image_tokens - 1),
            "images": sum(images),
            "prefix": prefix + images[0] * (self.num_image_tokens - 1),
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

    def fitting(
        self, encoded: tuple[np.ndarray, np.ndarray] | BadConversation, rendered: Rendered, images: int
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
        return self.checked(tokens, mask, images)

    def checked(self, tokens: np.ndarray, mask: np.ndarray, images: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """(unexpanded ids, mask, whether they were cut) within `max_length`, or BadConversation."""
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
            return tokens, mask, False
        if self.on_truncation == "refuse":
            raise self._too_long(f"{ends[-1]} tokens")
        keep = int((ends <= self.max_length).sum())
        if is_image[keep:].any():
            raise BadConversation(
                "truncation would cut image tokens", f"{ends[-1]} tokens, max_length={self.max_length}"
            )
        if not mask[:keep].any():
            raise BadConversation("truncation leaves no supervised token", f"max_length={self.max_length}")
        return tokens[:keep], mask[:keep], True

    def _too_long(self, size: str) -> BadConversation:
        return BadConversation(
            "longer than max_length",
            f"{size}, max_length={self.max_length}; raise --max_length, or cut it with --on_truncation truncate",
        )


def features() -> Any:
    """The columns of tokenised data: a sample, or the `reason` and `example` of a refusal.

    `ids`, `mask` and `ends` hold all alternative wordings, one behind the other; `part` and `parts` number the kept
    samples of a row; `length` and `prefix` (up to the last image) count the first wording's tokens with its images'.
    """
    from datasets import Features, List, Value

    kinds = {name: Value("int64") for name in _NUMBERS} | {name: Value("bool") for name in _MARKS}
    kinds |= {"reason": Value("string"), "example": Value("string")}
    lists = {"ids": List(Value("int32")), "mask": List(Value("bool")), "ends": List(Value("int32"))}
    return Features(kinds | lists)


def tokenised(records: Any, tokeniser: Tokeniser, progress: bool = True) -> Any:
    """The table of `features()` of all rows.

    A `datasets.Dataset` of more than 2,000 rows is tokenised once by several processes and kept in the folder
    `mllm_vision` of the cache of `datasets`, under a hash of the texts, the tokenizer, the template, the settings and
    this code; other processes of the machine wait and then map the file.

    Raises:
        OSError: the cache cannot be written.
    """
    import pyarrow as pa
    from datasets import Dataset

    image = tokeniser.form.columns.get("image")
    names = [name for role, name in tokeniser.form.columns.items() if role != "image"]
    counts = image_counts(records, image).astype(np.int32) if image is not None else None
    texts = only_columns(records, names)

    schema = features().arrow_schema

    def batch(columns: Any, rows: list[int]) -> pa.Table:
        found = [{name: columns[name][place] for name in names} for place in range(len(rows))]
        if image is not None and counts is not None:  # as many placeholders as there are images
            for row, record in zip(rows, found, strict=True):
                record[image] = list(range(int(counts[row])))
        return pa.table(tokeniser(found, rows[0]), schema=schema)

    total = len(texts)
    if not isinstance(texts, Dataset) or total <= _IN_MEMORY:
        pieces = []
        for start in range(0, total, _BATCH):
            rows = list(range(start, min(start + _BATCH, total)))
            if isinstance(texts, Dataset):
                columns = texts[start : rows[-1] + 1]
            else:
                columns = {name: [texts[row][name] for row in rows] for name in names}
            pieces.append(batch(columns, rows))
        return Dataset(pa.concat_tables(pieces).combine_chunks())

    return cached(
        f"tokens-{_key(texts, counts, tokeniser)}",
        lambda stem: _map(texts, batch, stem, progress),
        "the tokens of the conversations",
    )


def _map(texts: Any, batch: Callable[..., Any], stem: Path, progress: bool) -> Any:
    """`texts.map`, which finds what it or another process wrote before."""
    import datasets

    workers = min(_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, len(texts) // 5000)
    quiet = not progress and not datasets.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    aside = stem.with_name(f"texts-{stem.name}.arrow")
    options: dict[str, Any] = {"batched": True, "load_from_cache_file": True}
    try:
        if workers > 1 and not any(stem.parent.glob(f"{stem.name}*.arrow")):
            # Workers map a file; of a table in memory each of them would receive a copy.
            texts = texts.with_format("arrow").map(
                _unchanged, batch_size=10_000, cache_file_name=str(aside), new_fingerprint=aside.stem, **options
            )
            texts = texts.with_format(None)
        return texts.map(
            batch,
            with_indices=True,
            batch_size=_BATCH,
            writer_batch_size=10_000,
            remove_columns=texts.column_names,
            features=features(),
            num_proc=workers if workers > 1 else None,
            cache_file_name=f"{stem}.arrow",
            new_fingerprint=stem.name,
            desc="tokenising conversations",
            **options,
        )
    finally:
        aside.unlink(missing_ok=True)
        if quiet:
            datasets.enable_progress_bars()


def _unchanged(table: Any) -> Any:
    return table


def _key(texts: Any, counts: np.ndarray | None, tokeniser: Tokeniser) -> str:
    """A hash of everything the tokens depend on: the texts themselves, not their file's name, size or time."""
    import pyarrow as pa

    mark = hashlib.blake2b(digest_size=16)
    chat, tokenizer = tokeniser.chat, tokeniser.chat.tokenizer
    settings = (tokeniser.num_image_tokens, tokeniser.max_length, tokeniser.on_truncation, tokeniser.max_turns)
    said = (tokeniser.form.columns, texts.features, settings, chat.template, chat.image_token)
    vocabulary = (type(tokenizer), tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map)
    releases = [version(name) for name in ("transformers", "tokenizers", "jinja2", "datasets")]
    mark.update(repr((said, vocabulary, releases)).encode())
    data = Path(__file__).parents[1]
    for name in _MODULES:
        for file in [data / name] if (data / name).is_file() else sorted((data / name).glob("*.py")):
            mark.update(file.read_bytes())
    mark.update(b"" if counts is None else counts.tobytes())
    plain = texts.with_format("arrow")
    with pa.ipc.new_stream(pa.PythonFile(_Hashing(mark), "w"), plain[:1].schema) as stream:
        for table in plain.iter(batch_size=10_000):
            stream.write_table(table)
    return mark.hexdigest()


class _Hashing(io.RawIOBase):
    """A file whose bytes are hashed and kept nowhere."""

    def __init__(self, mark: Any) -> None:
        self.mark = mark

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.mark.update(data)
        return len(data)
