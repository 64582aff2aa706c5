"""Tables of odd columns, values, files and archives, as Hypothesis strategies: what users bring, on a bad day."""

from __future__ import annotations

import base64
import csv
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image
from tiny import image_bytes, random_image

KINDS = ("list", "jsonl", "json", "csv", "parquet", "tar", "shards")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _claims(width: int, height: int) -> bytes:
    """A PNG that says it is so large and holds nothing."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(b"")) + _chunk(b"IEND", b"")


def _animated() -> bytes:
    stream = io.BytesIO()
    random_image(0, 8, "L").save(stream, "GIF", save_all=True, append_images=[random_image(1, 8, "L")])
    return stream.getvalue()


GOOD = {
    "a.png": image_bytes(random_image(0, 24)),
    "b.jpg": image_bytes(random_image(1, (40, 20)), "JPEG"),
    "c.webp": image_bytes(random_image(2, 16), "WEBP"),
    "grey.png": image_bytes(random_image(3, 16, "L")),
    "clear.png": image_bytes(random_image(4, 16, "RGBA")),
    "sixteen.png": image_bytes(Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)),
    "palette.gif": image_bytes(random_image(5, 16, "P"), "GIF"),
    "moving.gif": _animated(),
    "print.tif": image_bytes(random_image(6, 16, "CMYK"), "TIFF"),
    "thin.png": image_bytes(random_image(7, (300, 1))),
    "dot.png": image_bytes(random_image(8, 1)),
}
BROKEN = {
    "cut.jpg": GOOD["b.jpg"][:150],
    "cut.png": GOOD["a.png"][:60],
    "empty.png": b"",
    "text.png": b"not an image",
    "huge.png": _claims(60_000, 60_000),
    "large.png": _claims(12_000, 12_000),
    "flat.png": _claims(0, 10),
    "post.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n",
    "page.jpg": b"<html><body>404</body></html>",
}

_good_bytes = st.sampled_from(list(GOOD.values()))
_paths = st.sampled_from(
    [*GOOD, *GOOD, *BROKEN, "not_there.png", "", " ", "https://example.org/a.png", "/", "..", "a\0b"]
)
images: dict[str, st.SearchStrategy] = {
    "bytes": st.one_of(_good_bytes, _good_bytes, st.sampled_from([*BROKEN.values(), None])),
    "paths": st.one_of(_paths, st.none()),
    "structs": st.one_of(
        st.builds(lambda data: {"bytes": data, "path": "x.png"}, _good_bytes),
        st.builds(lambda name: {"bytes": None, "path": name}, _paths),
        st.sampled_from([None, {"bytes": None, "path": None}, {"bytes": b"", "path": None}]),
    ),
    "lists": st.one_of(st.none(), st.lists(st.one_of(_good_bytes, st.sampled_from([None, b"?"])), max_size=3)),
    "uris": st.builds(lambda data: "data:image/png;base64," + base64.b64encode(data).decode(), _good_bytes),
}
images["mixed"] = st.one_of(*images.values(), st.sampled_from([3, 2.5, float("nan"), [], {}, [[None]], True, "data:,"]))

_GOOD_WORDS = [
    "a dog runs",
    "two cats",
    "ein Bär",
    "猫",
    "🦊 in the snow",
    "e\u0301 a\tb\nc",
    "None",
    "NA",
    "null",
    "1",
]
_ODD_WORDS = ["<image>", "<image> what?", "a <image> b", "x" * 3000, "<|im_end|>", "</s>", "\u202eabc", "\x00\x01"]
words = st.sampled_from([*_GOOD_WORDS, *_GOOD_WORDS, *_ODD_WORDS, "", "  ", "\n"])
_text = st.one_of(words, words, words, st.none())
texts: dict[str, st.SearchStrategy] = {
    "one": _text,
    "several": st.one_of(st.none(), st.lists(_text, max_size=3)),
    "mixed": st.one_of(
        _text, st.sampled_from([3, 0.5, float("nan"), [], ["a", None], {"text": "b"}, True, "\ud800 x"])
    ),
}
labels: dict[str, st.SearchStrategy] = {
    "integers": st.one_of(st.integers(0, 3), st.sampled_from([None, -1, -7])),
    "words": st.one_of(st.sampled_from(["cat", "dog", " cat", "", "-1"]), st.none()),
    "floats": st.one_of(st.sampled_from([0.0, 1.0, 2.0, 0.5, float("nan"), float("inf"), -1.0]), st.none()),
    "booleans": st.one_of(st.booleans(), st.none()),
    "mixed": st.sampled_from([0, 1, "cat", None, True, 2.0, 0.5, [1], [1, 2], {}, b"dog", b"\xff", 2**70, ""]),
}
_role = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", None, "USER"])
_part = st.sampled_from(
    [{"type": "text", "text": "hi"}, {"type": "image"}, {"type": "image", "text": None}, {"type": "video"}, "hi", None]
)
_content = st.one_of(words, st.none(), st.lists(_part, max_size=3))
_turn = st.one_of(
    st.builds(lambda role, content: {"role": role, "content": content}, _role, _content),
    st.sampled_from([None, "hi", {}, {"role": "user"}, {"content": "x"}, ["user", "x"]]),
)
_dialogue = st.builds(
    lambda pairs, image: [
        {"role": role, "content": ("<image>" if image and not number and role == "user" else "") + text}
        for number, (question, answer) in enumerate(pairs)
        for role, text in (("user", question), ("assistant", answer))
    ],
    st.lists(st.tuples(st.sampled_from(["what?", "and now?"]), words), min_size=1, max_size=3),
    st.booleans(),
)
dialogues: dict[str, st.SearchStrategy] = {
    "messages": _dialogue,
    "odd": st.one_of(_dialogue, st.lists(_turn, max_size=4), st.none(), words),
    "json": st.one_of(st.builds(json.dumps, _dialogue), words),
}


@st.composite
def tables(draw: Any, *roles: str) -> tuple[str, list[dict[str, Any]]]:
    """(how it is stored, its rows): columns for some roles among image, caption, label, messages and question.

    The values of a column are of one kind or of several; now and then a row lacks a column.
    """
    named = {
        "image": images,
        "caption": texts,
        "label": labels,
        "messages": dialogues,
        "question": texts,
        "answer": texts,
    }
    columns = {role: draw(st.sampled_from(list(named[role]))) for role in roles}
    values = st.fixed_dictionaries({role: named[role][kind] for role, kind in columns.items()})
    rows = draw(st.lists(values, min_size=1, max_size=7))
    if draw(st.integers(0, 7)) == 0:
        rows[draw(st.integers(0, len(rows) - 1))].pop(draw(st.sampled_from(roles)))
    return draw(st.sampled_from(KINDS)), rows


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Any:
    """The table as a list of rows or as the path of what was written; a list where the format cannot hold it."""
    for name, data in {**GOOD, **BROKEN}.items():
        (folder / name).write_bytes(data)
    in_memory = [{name: _rooted(value, folder) for name, value in row.items()} for row in rows]
    if kind == "list":
        return in_memory
    try:
        return {"jsonl": _jsonl, "json": _json, "csv": _csv, "parquet": _parquet, "tar": _tar, "shards": _shards}[kind](
            folder, rows
        )
    except Unsuited:
        return in_memory


def _rooted(value: Any, folder: Path) -> Any:
    """With absolute paths: rows in memory have no folder of their own."""
    if isinstance(value, dict) and isinstance(value.get("path"), str) and value["path"] in {**GOOD, **BROKEN}:
        return {**value, "path": str(folder / value["path"])}
    if isinstance(value, list):
        return [_rooted(each, folder) for each in value]
    return str(folder / value) if isinstance(value, str) and value in {**GOOD, **BROKEN} else value


class Unsuited(Exception):
    """The format has no way to say this."""


def _plain(value: Any) -> Any:
    """For JSON: bytes as a data URI."""
    if isinstance(value, bytes):
        return "data:image/png;base64," + base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _jsonl(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(_plain(row)) + "\n" for row in rows))
    return path


def _json(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "train.json"
    path.write_text(json.dumps(_plain(rows)))
    return path


def _csv(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "train.csv"
    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            for row in rows:
                values = [_plain(row.get(name)) for name in names]
                writer.writerow(["" if value is None else str(value) for value in values])
    except (UnicodeEncodeError, csv.Error) as error:
        raise Unsuited from error
    return path


def _table(rows: list[dict[str, Any]]) -> Any:
    import pyarrow as pa

    try:
        return pa.Table.from_pylist(rows)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError) as error:
        raise Unsuited from error


def _parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "train.parquet"
    try:
        pq.write_table(_table(rows), path, row_group_size=3)
    except pa.ArrowException as error:
        raise Unsuited from error
    return path


def _shards(folder: Path, rows: list[dict[str, Any]]) -> str:
    import pyarrow.parquet as pq

    table = _table(rows)
    half = len(rows) // 2
    for number, part in enumerate((table.slice(0, half), table.slice(half)) if half else (table,)):
        try:
            pq.write_table(part, folder / f"part-{number}.parquet")
        except Exception as error:
            raise Unsuited from error
    return str(folder / "part-*.parquet")


def _tar(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "train.tar"
    with tarfile.open(path, "w") as archive:
        for number, row in enumerate(rows):
            members = {"json": json.dumps(_plain({k: v for k, v in row.items() if k != "image"})).encode()}
            value = row.get("image")
            if isinstance(value, bytes):
                members["png"] = value
            elif isinstance(value, str) and value in GOOD:
                members[value.rsplit(".", 1)[1]] = GOOD[value]
            for name, data in members.items():
                info = tarfile.TarInfo(f"{number:05d}.{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


# -- files ---------------------------------------------------------------------------------------------------------

_names = st.sampled_from(
    [
        *("a.png", "b.jpg", "c.webp", "UPPER.PNG", "with space.png", "é猫.png", "[1].png", "train.png", "no_ending"),
        *(
            ".hidden.png",
            "cut.jpg",
            "text.png",
            "post.png",
            "empty.png",
            "movie.mp4",
            "a.png.part",
            "data.csv.bak",
            "x.txt",
        ),
    ]
)
_folders = st.sampled_from(["", "cat", "dog", "cat/deep", "test_tube", "none", "[x]", "a b", "val"])
folders = st.dictionaries(
    st.tuples(_folders, _names), st.sampled_from([*GOOD.values(), *GOOD.values(), b"?", b""]), min_size=1, max_size=8
)


def write_folder(folder: Path, files: dict[tuple[str, str], bytes]) -> Path:
    """The files, by (folder, name)."""
    for (place, name), data in files.items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / name).write_bytes(data)
    return folder


@st.composite
def damaged_images(draw: Any) -> bytes:
    """The bytes of an image with some changed, cut off or repeated."""
    data = bytearray(draw(st.sampled_from(list(GOOD.values()))))
    for _ in range(draw(st.integers(0, 6))):
        data[draw(st.integers(0, min(len(data), draw(st.sampled_from([30, 10_000]))) - 1))] = draw(st.integers(0, 255))
    start, stop = draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))
    how = draw(st.sampled_from(["whole", "whole", "cut", "twice", "without"]))
    whole = bytes(data)
    return {
        "whole": whole,
        "cut": whole[:stop],
        "twice": whole[:start] * 2 + whole[start:],
        "without": whole[:start] + whole[stop:],
    }[how]
