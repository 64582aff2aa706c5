"""WebDataset tars: whole or refused, by whatever reader; nothing reaches outside; every sample has its image."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from tiny import image_bytes, random_image

from mllm_vision.data import PairDataset, StreamDataset, StreamLoader, bind_columns, load_image, load_records
from mllm_vision.data.streams.shards import Shard
from mllm_vision.data.streams.streams import Stream

PNG = image_bytes(random_image(2, 8))


def tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return path


def samples(count: int, **more: bytes) -> list[tuple[str, bytes]]:
    return [(f"{n:03d}.{end}", data) for n in range(count) for end, data in ({"png": PNG} | more).items()]


def rows(path: Path) -> list[dict]:
    """The rows by both readers, which must be the same."""
    whole = load_records(path).to_list()
    shard = Shard(path)
    streamed = [row for group in range(len(shard.groups)) for row in shard.read(group)]
    names = list(dict.fromkeys(name for row in streamed for name in row))
    assert whole == [{name: row.get(name) for name in names} for row in streamed]
    return whole


def test_the_image_of_a_sample_is_of_any_type(tmp_path) -> None:
    kinds = ["png", "jpg", "webp", "JPEG", "bmp"]
    files = [(f"{n}.{kind}", image_bytes(random_image(n, 8))) for n, kind in enumerate(kinds)]
    path = tar(tmp_path / "a.tar", *(each for n, file in enumerate(files) for each in (file, (f"{n}.txt", b"%d" % n))))
    found = rows(path)
    assert [load_image(row["image"]).size for row in found] == [(8, 8)] * 5
    head = Stream.open(path).head()
    assert bind_columns(head, ("image", "caption")) == {"image": "image", "caption": "txt"}
    both = rows(tar(tmp_path / "b.tar", ("1.jpg", PNG), ("1.png", b"mask"), ("2.jpg", PNG), ("2.seg.png", b"mask")))
    assert [row["image"] for row in both] == [PNG, PNG] and (both[0]["png"], both[1]["seg.png"]) == (b"mask", b"mask")


def test_members_apart_keys_with_dots_and_repeated_keys(tmp_path, caplog) -> None:
    apart = [("a/1.png", PNG), ("a/2.png", PNG), ("a/2.txt", b"two"), ("a/1.txt", b"one"), ("b/1.png", PNG)]
    assert [(row["__key__"], row["txt"]) for row in rows(tar(tmp_path / "apart.tar", *apart))] == [
        ("a/1", "one"),
        ("a/2", "two"),
        ("b/1", None),
    ]
    dotted = [(f"x.v0.{n}.{end}", data) for n in range(3) for end, data in (("png", PNG), ("txt", b"%d" % n))]
    assert [row["txt"] for row in rows(tar(tmp_path / "dots.tar", *dotted))] == ["0", "1", "2"]
    assert "keys of dots.tar hold dots" in caplog.text
    assert len(rows(tar(tmp_path / "alone.tar", *((f"v1.{n}.png", PNG) for n in range(5))))) == 5
    views = [(f"{n}.{side}.png", PNG) for n in range(4) for side in ("left", "right")]
    assert set(rows(tar(tmp_path / "views.tar", *views))[0]) == {"__key__", "left.png", "right.png"}
    first, second = (tar(tmp_path / name, *samples(count)) for name, count in (("f.tar", 2), ("s.tar", 3)))
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    assert len(rows(joined)) == 5
    assert "several tars" in caplog.text and "2 keys of joined.tar occur again" in caplog.text


def test_nothing_in_a_tar_leads_outside(tmp_path, caplog) -> None:
    links = []
    for name, kind in (("5.png", tarfile.SYMTYPE), ("6.png", tarfile.LNKTYPE), ("7.png", tarfile.FIFOTYPE)):
        links.append(tarfile.TarInfo(name))
        links[-1].type, links[-1].linkname = kind, "/etc/hostname"
    outside = [("../1.png", PNG), ("/2.png", PNG), ("a/../../3.png", PNG), ("C:\\4.png", PNG)]
    junk = [("._000.png", b"x"), ("__MACOSX/000.png", b"x"), ("LICENSE", b"x")]
    path = tar(tmp_path / "in" / "t.tar", *samples(2), *links, *outside, *junk)
    assert [row["__key__"] for row in rows(path)] == ["000", "001"]
    assert load_records(path).left_out == {
        "links in t.tar": 2,
        "members that are not regular files in t.tar": 1,
        "members of t.tar whose names lead outside": 4,
        "hidden members of t.tar": 2,
        "members of t.tar that are not named like a sample (<key>.<extension>)": 1,
    }
    assert [each.name for each in tmp_path.rglob("*")] == ["in", "t.tar"], "nothing was written"


@pytest.mark.parametrize("reader", [load_records, lambda path: Shard(path).groups])
def test_a_tar_that_is_not_whole_is_refused(tmp_path, reader) -> None:
    whole = tar(tmp_path / "whole.tar", *samples(6, txt=b"words")).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        starts = [member.offset for member in archive]
    third, last = starts[3], starts[-1]
    flipped = bytearray(whole)
    flipped[last + 20] ^= 4
    damaged = {
        "between": whole[:third],
        "in_a_header": whole[: third + 100],
        "in_the_data": whole[: third + 512 + 20],
        "at_the_end": whole[: last + 1024],
        "flipped": bytes(flipped),
        "no_tar": b"no tar at all" * 99,
        "packed": gzip.compress(whole),
        "empty": whole[-1024:],
    }
    for name, content in damaged.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.tar (is cut off or damaged|cannot be read|contains no sample)"):
            reader(path)
    (tmp_path / "short.tar").write_bytes(whole[: last + 1024 + 512])  # one block of the end's mark is enough
    reader(tmp_path / "short.tar")


def test_values_that_cannot_be_read_are_refused_with_their_reason(tmp_path, caplog) -> None:
    members = [(f"{n}.png", PNG) for n in range(8)]
    members += [(f"{n}.json", json.dumps({"caption": f"c{n}"}).encode()) for n in range(8)]
    members[8 + 3] = ("3.json", b'{"caption": "cut o')
    members[8 + 5] = ("5.json", b'{"caption": "caf\xe9"}')
    path = tar(tmp_path / "j.tar", *members)
    stream = Stream.open(path, shuffle_buffer=0, readers=1)
    head = stream.head(2)
    dataset = StreamDataset(stream, PairDataset(head, bind_columns(head, ("image", "caption"))))
    captions = [each["caption"] for batch in StreamLoader(dataset, 8, collate_fn=list) for each in batch]
    assert captions == ["c0", "c1", "c2", "c4", "c4", "c6", "c6", "c7"]
    assert dict(dataset.bad_samples.reasons) == {".json cannot be parsed": 1, ".json is not UTF-8": 1}
    assert load_records(path)["caption"][:] == [None if n in (3, 5) else f"c{n}" for n in range(8)]
    assert "2 members that cannot be read (.json cannot be parsed: j.tar: 3.json" in caplog.text
    classes = tar(tmp_path / "c.tar", *samples(2), ("000.cls", b"4\n"), ("001.cls", b"cat"))
    assert [row["cls"] for row in rows(classes)] == [4, "cat"]


def test_a_bad_group_or_shard_is_passed_over(tmp_path, caplog) -> None:
    """The rows of a whole shard lack what is needed: others are taken in their place, each counted."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [PNG] * 4, "caption": ["a", "b", "c", "d"]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"image": [PNG] * 2}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "2.parquet")
    stream = Stream.open(tmp_path, shuffle_buffer=0, readers=1)
    head = stream.head()
    dataset = StreamDataset(stream, PairDataset(head, bind_columns(head, ("image", "caption"))))
    captions = [each["caption"] for batch in StreamLoader(dataset, 6, collate_fn=list) for each in batch]
    assert captions[:4] == ["a", "b", "c", "d"] and set(captions[4:]) <= set("abcd") and len(captions) == 6
    assert dataset.bad_samples.count >= 2 and set(dataset.bad_samples.reasons) == {"the caption is empty"}
    assert caplog.text.count("1.parquet: its 2 rows have no column 'caption'") == 1
