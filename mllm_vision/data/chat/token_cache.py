"""Conversations tokenised once for all processes of a machine, into an Arrow file that each of them maps."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mllm_vision.data.chat.tokenise import Placed, Tokeniser, features
from mllm_vision.data.images.sizes import column_sizes, of_row
from mllm_vision.data.records.cache import cached
from mllm_vision.data.records.columns import image_counts
from mllm_vision.data.records.sampling import only_columns

_IN_MEMORY = 2000  # rows; fewer are tokenised in every process, which takes a second or two
_BATCH = 256  # rows that are tokenised at once
_WORKERS = 16  # processes, at most
# of mllm_vision.data: what the tokens depend on
_MODULES = ("chat", "records", "text_length.py", "images/layouts.py")


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
    sizes = column_sizes(records, image, progress) if image is not None and not tokeniser.layout.fixed else None
    texts = only_columns(records, names)

    schema = features().arrow_schema

    def batch(columns: Any, rows: list[int]) -> pa.Table:
        found = [{name: columns[name][place] for name in names} for place in range(len(rows))]
        if image is not None and counts is not None:  # as many placeholders as there are images
            placed = _placed(rows, counts, sizes)
            for record, images in zip(found, placed, strict=True):
                record[image] = images
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
        f"tokens-{_key(texts, counts, sizes, tokeniser)}",
        lambda stem: _map(texts, batch, stem, progress),
        "the tokens of the conversations",
    )


def _placed(rows: Sequence[int], counts: np.ndarray, sizes: Any) -> list[list[Placed]]:
    """The images of the image column of successive rows, with their sizes where they are known."""
    if sizes is None:
        return [[Placed(number) for number in range(int(counts[row]))] for row in rows]
    found = [of_row(row) for row in sizes.slice(rows[0], len(rows)).to_pylist()]
    return [
        [
            Placed(number, int(height), int(width), bad if height < 0 else None)
            for number, (height, width) in enumerate(each)
        ]
        for each, bad in found
    ]


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


def _key(texts: Any, counts: np.ndarray | None, sizes: Any, tokeniser: Tokeniser) -> str:
    """A hash of everything the tokens depend on: the texts themselves, not their file's name, size or time."""
    mark = hashlib.blake2b(digest_size=16)
    chat, tokenizer = tokeniser.chat, tokeniser.chat.tokenizer
    settings = (tokeniser.layout.identity(), tokeniser.max_length, tokeniser.on_truncation, tokeniser.max_turns)
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
    _hash(mark, plain[:1].schema, plain.iter(batch_size=10_000))
    if sizes is not None:
        _hash(mark, sizes.schema, [sizes])
    return mark.hexdigest()


def _hash(mark: Any, schema: Any, tables: Iterable[Any]) -> None:
    import pyarrow as pa

    with pa.ipc.new_stream(pa.PythonFile(_Hashing(mark), "w"), schema) as stream:
        for table in tables:
            stream.write_table(table)


class _Hashing(io.RawIOBase):
    """A file whose bytes are hashed and kept nowhere."""

    def __init__(self, mark: Any) -> None:
        self.mark = mark

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.mark.update(data)
        return len(data)
