"""Tables as they come: every row, column and word of CSV, JSON, Parquet and mixtures of them, and what is told."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import image_bytes, random_image

from mllm_vision.data import bind_columns, load_image, load_records
from mllm_vision.data.records.readers.arrow import array_of, values_of
from mllm_vision.data.streams.streams import Stream

PNG = image_bytes(random_image(3, 8))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with four images."""
    (tmp_path / "shots").mkdir()
    for number in range(4):
        (tmp_path / "shots" / f"{number}.PNG").write_bytes(PNG)
    return tmp_path


def file(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# ---- CSV ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "captions", "told"),
    [
        (b"\xef\xbb\xbfimage,caption\r\nshots/0.PNG,une rue\r\nshots/1.PNG,\r\n", ["une rue", None], ""),
        ("image,caption\nshots/0.PNG,une forêt\nshots/1.PNG,x\n".encode("cp1252"), ["une forêt", "x"], "1 lines of"),
        ("image\tcaption\nshots/0.PNG\tüber\n".encode("utf-16"), ["über"], r"separated by '\t'"),
        (b"image;caption\nshots/0.PNG;left, right\n", ["left, right"], "separated by ';', not ','"),
        (b'image, caption\nshots/0.PNG, "a, b"\nshots/1.PNG, c\n', ["a, b", "c"], ""),
        (b"image,caption\nshots/0.PNG, a b \n", [" a b "], ""),
        (b"shots/0.PNG,a first line\nshots/1.PNG,b\n", ["a first line", "b"], "has no header"),
        (b"image,caption\rshots/0.PNG,a\rshots/1.PNG,b", ["a", "b"], ""),
        (b'image,caption\nshots/0.PNG,a "b" c\nshots/1.PNG,"d"', ['a "b" c', "d"], ""),
        (b"image|caption\nshots/0.PNG|a;b\n", ["a;b"], "separated by '|'"),
        (b'image,caption\nshots/0.PNG,"two\r\nlines, one ""row"""\n', ['two\r\nlines, one "row"'], ""),
        (b'image,caption\nshots/0.PNG,"6 feet\nshots/1.PNG,b\n"shots/2.PNG",c\n', ["6 feet", "b", "c"], "never closed"),
        (b"image,caption\nshots/0.PNG,a\nshots/1.PNG\nshots/2.PNG,c,d\n", ["a", None, None], "2 rows of"),
        (b"image,caption\nshots/0.PNG,007\n\nshots/1.PNG,1e3\n", ["007", "1e3"], ""),
        (b"image,caption,caption\nshots/0.PNG,one,two\n", ["one"], "has two columns 'caption'"),
        (b"image,caption\nshots/0.PNG,Null\nshots/1.PNG,#N/A\nshots/2.PNG,-nan\n", ["Null", "#N/A", "-nan"], ""),
    ],
)
def test_csv_texts_stay_what_they_are(place, caplog, content, captions, told) -> None:
    records = load_records(file(place / "rows.csv", content))
    assert records[bind_columns(records, ("image", "caption"))["caption"]][:] == captions
    assert load_image(records[0]["image"]).size == (8, 8)
    assert told in caplog.text and bool(told) == bool(caplog.text)


def test_a_csv_column_is_of_numbers_only_where_every_cell_is(place) -> None:
    header = "image,label,score,code,class\n"
    rows = "shots/0.PNG,3,0.5,01,7\nshots/1.PNG,,-2,2,NA\nshots/2.PNG,11,1e-3,3,2\n"
    records = load_records(file(place / "a.csv", header + rows))
    assert records["label"][:] == [3, None, 11] and records["score"][:] == [0.5, -2.0, 0.001]
    assert records["code"][:] == ["01", "2", "3"] and records["class"][:] == ["7", "NA", "2"]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_packed_texts(place, suffix, pack) -> None:
    table = b"image,caption\nshots/0.PNG,a\n"
    assert load_records(file(place / f"t.csv{suffix}", pack(table)))["caption"][:] == ["a"]
    objects = lines({"image": "shots/1.PNG", "caption": "b"}).encode()
    assert load_records(file(place / f"t.jsonl{suffix}", pack(objects)))["caption"][:] == ["b"]
    assert len(load_records(str(place / f"t.*{suffix}"))) == 2
    cut = file(place / f"cut.jsonl{suffix}", pack(objects * 9)[:30])
    with pytest.raises(ValueError, match=rf"cut\.jsonl\{suffix} cannot be read"):
        load_records(cut)


# ---- JSON --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "captions", "told"),
    [
        (
            {"info": "x", "rows": [{"image": "shots/0.PNG", "caption": "a"}]},
            ["a"],
            "list 'rows' is read, and not 'info'",
        ),
        ({"image": ["shots/0.PNG", None], "caption": ["a", "b"]}, ["a", "b"], ""),
        ({"image": {"0": "shots/0.PNG"}, "caption": {"0": "a"}}, ["a"], ""),
        ({"image": "shots/0.PNG", "caption": "alone"}, ["alone"], ""),
        ([{"image": "shots/0.PNG", "caption": "a"}, 5], ["a", None], "1 entries of set.json that are not JSON objects"),
    ],
)
def test_whole_json_files(place, caplog, content, captions, told) -> None:
    records = load_records(file(place / "set.json", json.dumps(content, indent=1)))
    assert records["caption"][:] == captions
    assert told in caplog.text and bool(told) == bool(caplog.text)


def test_objects_by_line_under_the_name_of_json(place) -> None:
    rows = [{"image": f"shots/{n}.PNG", "caption": str(n)} for n in range(3)]
    assert load_records(file(place / "l.json", lines(*rows)))["caption"][:] == ["0", "1", "2"]
    assert load_records(file(place / "w.jsonl", json.dumps(rows)))["caption"][:] == ["0", "1", "2"]


def test_lines_that_are_no_row_are_told_and_hold_their_place(place, caplog) -> None:
    good = [{"image": f"shots/{n}.PNG", "caption": f"c{n}"} for n in range(4)]
    text = lines(*good[:2]) + '{"image": "shots/2.P\n["no", "object"]\n' + lines(*good[2:])
    records = load_records(file(place / "some.jsonl", "\ufeff" + text))
    assert records["caption"][:] == ["c0", "c1", None, None, "c2", "c3"]
    assert records.left_out == {"lines of some.jsonl that are not JSON objects": 2}
    assert "not read: 2 lines of some.jsonl that are not JSON objects (line 3: " in caplog.text


def test_values_of_any_mixture_come_back_as_they_were(place) -> None:
    rows = [
        {"image": "shots/0.PNG", "label": 1, "note": {"a": 1}},
        {"image": ["shots/1.PNG", "shots/2.PNG"], "label": "cat", "note": "text"},
        {"image": {"path": "shots/3.PNG"}, "label": 2.5, "note": [1, "x"]},
        {"image": None, "label": True, "extra": 2**70},
    ]
    found = load_records(file(place / "m.jsonl", lines(*rows)))
    at = [str(place / f"shots/{n}.PNG") for n in range(4)]
    assert found["image"][:] == [at[0], [at[1], at[2]], {"path": at[3]}, None]
    assert found["label"][:] == [1, "cat", 2.5, True]
    assert found["note"][:] == [{"a": 1}, "text", [1, "x"], None] and found[0]["extra"] is None


def test_json_of_any_value_goes_through_arrow() -> None:
    for values in ([1, "a", None], [[1], 2], [{"a": 1}, {"a": "b"}], [True, 0], [[], [None], ["x"]]):
        assert values_of(array_of(values)) == values
    odd = [2**70, [float("nan"), "\ud83d"], float("-inf"), {"a": b"x"}]
    assert values_of(array_of(odd)) == [str(2**70), [None, "?"], "-inf", {"a": "x"}]
    assert values_of(array_of(["\ud83d half", "whole"])) == ["? half", "whole"]


def test_coco_captions(place, caplog) -> None:
    images = [{"id": 7, "file_name": "shots/0.PNG"}, {"id": 8, "file_name": "shots/1.PNG"}]
    notes = [{"image_id": 7, "caption": "a"}, {"image_id": 7, "caption": "b"}, {"image_id": 9, "caption": "lost"}]
    records = load_records(file(place / "captions.json", json.dumps({"images": images, "annotations": notes})))
    assert records["captions"][:] == [["a", "b"], []] and load_image(records[1]["image"]).size == (8, 8)
    assert "1 captions of captions.json whose image is not listed (9)" in caplog.text
    boxes = {"images": images, "annotations": [{"image_id": 7, "bbox": [0, 0, 1, 1]}]}
    with pytest.raises(ValueError, match=r"boxes\.json holds COCO annotations without captions"):
        load_records(file(place / "boxes.json", json.dumps(boxes)))


# ---- Parquet and mixtures ----------------------------------------------------------------------------------------


def parquet(path: Path, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def test_types_of_parquet(place) -> None:
    many = parquet(
        place / "types.parquet",
        image=pa.array([{"path": "shots/0.PNG", "bytes": None}, {"path": "name only", "bytes": PNG}]),
        caption=pa.array(["a", "b"]).dictionary_encode(),
        raw=pa.array(["x", "y"], pa.large_string()),
        images=pa.array([["shots/1.PNG"], []], pa.list_(pa.string())),
        label=pa.array([1, None], pa.int8()),
    )
    records = load_records(many)
    assert records["image"][0]["path"] == str(place / "shots/0.PNG") and records["image"][1]["path"] == "name only"
    assert records["caption"][:] == ["a", "b"] and records["images"][:] == [[str(place / "shots/1.PNG")], []]
    assert bind_columns(records, ("image", "caption", "label")) == {n: n for n in ("image", "caption", "label")}
    for value in records["image"][:]:
        assert load_image(value).size == (8, 8)
    group = Stream.open(many).read(0, 0, 0, ["image", "caption", "nothing"])
    assert group == [{"image": row, "caption": text, "nothing": None} for row, text in zip(records["image"][:], "ab")]


def test_parts_with_other_columns_types_and_no_rows(place, caplog) -> None:
    parquet(place / "p" / "a.parquet", image=[PNG, None], caption=["a", "b"], label=[1, 2])
    parquet(place / "p" / "b.parquet", image=["../shots/0.PNG"], caption=["c"], label=["cat"], width=[3])
    parquet(place / "p" / "c.parquet", image=pa.array([{"path": "../shots/1.PNG"}]), label=[None])
    parquet(place / "p" / "d.parquet", image=pa.array([], pa.string()))
    file(place / "p" / "e.parquet", "")
    file(place / "p" / "f.csv", "image,caption\n../shots/2.PNG,d\n")
    records = load_records(place / "p")
    assert records["caption"][:] == ["a", "b", "c", None, "d"] and records["label"][:] == ["1", "2", "cat", None, None]
    assert [value and load_image(value).size[0] for value in records["image"][:]] == [8, None, 8, 8, 8]
    for told in (
        "1 rows have no column 'caption': c.parquet lacks it",
        "column 'label' holds numbers in some files and text in others",
        "1 empty files (0 bytes) (e.parquet), 1 files without rows (d.parquet)",
    ):
        assert told in caplog.text
    head = Stream.open(str(place / "p" / "[abcd].parquet")).head()
    assert head["caption"][:] == ["a", "b", "c"] and "width" in head.column_names  # b has another column


def test_texts_that_are_no_utf8_and_json_that_is_broken_are_single_cells(place, caplog) -> None:
    from mllm_vision.data.records.sampling import BadRow

    texts = pa.array([b"fine", b"caf\xe9", None], pa.binary()).view(pa.string())
    path = parquet(place / "odd.parquet", image=["shots/0.PNG"] * 3, caption=texts)
    assert load_records(path)["caption"][:] == ["fine", None, None]
    assert "1 texts of odd.parquet that are not UTF-8" in caplog.text
    rows = Stream.open(path).read(0, 0, 0, ["caption"])
    assert rows[0] == {"caption": "fine"} and isinstance(rows[1]["caption"], BadRow) and rows[2] == {"caption": None}
    meta = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"x": [1]}', '{"x": [']))
    parquet(place / "json.parquet", caption=["a", "b"], meta=meta)
    rows = Stream.open(place / "json.parquet").read(0, 0, 0, ["caption", "meta"])
    assert rows[0]["meta"] == {"x": [1]} and isinstance(rows[1]["meta"], BadRow) and rows[1]["caption"] == "b"


def test_an_arrow_file_that_is_cut_off_is_refused(place) -> None:
    from datasets import Dataset

    data = Dataset.from_dict({"caption": [str(n) for n in range(3000)]})
    data.save_to_disk(place / "saved")
    [file] = (place / "saved").glob("*.arrow")
    assert len(load_records(place / "saved")) == len(load_records(file)) == 3000
    content = file.read_bytes()
    file.write_bytes(content[: len(content) - 8])
    for path in (file, place / "saved"):
        with pytest.raises(ValueError, match="is cut off: its end has no mark"):
            load_records(path)


def test_classes_that_differ_between_parts_are_read_as_words(place) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    for name, classes in (("x", ["cat", "dog"]), ("y", ["ant", "cat"])):
        features = Features({"caption": Value("string"), "label": ClassLabel(names=classes)})
        Dataset.from_dict({"caption": ["t"] * 2, "label": [0, 1]}, features=features).to_parquet(
            place / f"{name}.parquet"
        )
    assert load_records(str(place / "[xy].parquet"))["label"][:] == ["cat", "dog", "ant", "cat"]
    assert load_records(place / "x.parquet").features["label"].names == ["cat", "dog"]


def test_large_parts_are_mapped_from_the_disk_and_give_the_same(place, monkeypatch) -> None:
    import datasets

    from mllm_vision.data.records.readers import table_cache

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(place / "cache"))
    parquet(place / "q" / "a.parquet", image=["../shots/0.PNG"] * 3, label=[1, 2, None])
    parquet(place / "q" / "b.parquet", image=[PNG], caption=["x"])
    plain = load_records(place / "q")
    monkeypatch.setattr(table_cache, "IN_MEMORY", 0)
    for _ in range(2):  # written, then found
        mapped = load_records(place / "q")
        assert mapped[:] == plain[:] and mapped.features == plain.features
        assert mapped._fingerprint == plain._fingerprint
    written = sorted((place / "cache" / "mllm_vision").glob("*.arrow"))
    assert len(written) == 2
    parquet(place / "q" / "b.parquet", image=[PNG, PNG], caption=["x", "y"])
    changed = load_records(place / "q")
    assert len(changed) == 5 and changed._fingerprint != plain._fingerprint


def test_what_is_left_out_of_a_mapped_file_is_known_again(place, monkeypatch, caplog) -> None:
    import datasets

    from mllm_vision.data.records.readers import table_cache

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(place / "cache"))
    torn = file(place / "torn.jsonl", lines(*[{"image": "shots/0.PNG", "caption": str(n)} for n in range(4)]) + "{torn")
    plain = load_records(torn)
    monkeypatch.setattr(table_cache, "IN_MEMORY", 0)
    for _ in range(2):  # written, then found
        caplog.clear()
        mapped = load_records(torn)
        assert mapped[:] == plain[:] and mapped.left_out == plain.left_out and sum(plain.left_out.values()) == 1
        assert "not JSON objects" in caplog.text
    assert len(list((place / "cache" / "mllm_vision").glob("*.arrow"))) == 1


# ---- any table ---------------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r"), max_size=12)
CELLS = st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.integers(-99, 99).map(lambda n: n / 4) | WORDS
VALUES = st.recursive(
    CELLS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=2), max_leaves=6
)


def plain(value: object) -> object:
    """A value without what a column of structs adds and an empty object loses: the names that other rows have."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items() if each is not None}
    return [plain(each) for each in value] if isinstance(value, list) else value


@settings(deadline=None, max_examples=40)
@given(st.lists(st.dictionaries(st.sampled_from(["caption", "label", "a", "é b"]), VALUES), min_size=1, max_size=6))
def test_any_json_comes_back(rows) -> None:
    assume(any(rows))
    with tempfile.TemporaryDirectory() as folder:
        found = load_records(file(Path(folder) / "any.jsonl", lines(*rows))).to_list()
        assert len(found) == len(rows)
        for row, given_row in zip(found, rows, strict=True):
            assert plain(row) == plain(given_row)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_any_csv_comes_back(cells, comma, end) -> None:
    import csv

    written = io.StringIO(newline="")
    writer = csv.writer(written, delimiter=comma, lineterminator=end)
    writer.writerows([("caption", "title"), *cells])
    with tempfile.TemporaryDirectory() as folder:
        records = load_records(file(Path(folder) / "any.csv", written.getvalue()))
    found = list(zip(records["caption"][:], records["title"][:], strict=True))
    assert found == [(first or None, second or None) for first, second in cells]


# ---- paths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["image", "file_name", "foto", "img_left", "photo_file", "images"])
def test_paths_start_from_the_file_whatever_the_column(place, column) -> None:
    for suffix in ("jsonl", "csv", "parquet"):
        path = place / f"t.{suffix}"
        if suffix == "parquet":
            parquet(path, **{column: ["shots/0.PNG", "shots/gone.PNG"], "n": [1, 2]})
        else:
            rows = [{column: "shots/0.PNG", "n": 1}, {column: "shots/gone.PNG", "n": 2}]
            text = lines(*rows) if suffix == "jsonl" else f"{column},n\nshots/0.PNG,1\nshots/gone.PNG,2\n"
            file(path, text)
        assert load_records(path)[column][:] == [str(place / "shots/0.PNG"), str(place / "shots/gone.PNG")]


def test_a_missing_file_in_the_first_row_is_as_in_any_other(place) -> None:
    rows = [{"image": f"shots/{name}", "caption": "x"} for name in ("gone.PNG", "0.PNG", "gone too.PNG")]
    found = load_records(file(place / "t.jsonl", lines(*rows)))
    assert found["image"][:] == [str(place / row["image"]) for row in rows]
    with pytest.raises(FileNotFoundError, match=r"names the image 'shots/gone.PNG', but .*--image_root"):
        load_records(file(place / "u.jsonl", lines(rows[0], rows[2])))


def test_paths_inside_messages_and_addresses(place, caplog) -> None:
    parts = [{"type": "image", "image": "shots/0.PNG"}, {"type": "image_url", "image_url": {"url": "shots/1.PNG"}}]
    said = [
        {"role": "user", "content": [*parts, {"type": "text", "text": "0.PNG"}]},
        {"role": "assistant", "content": "a"},
    ]
    [row] = load_records(file(place / "m.jsonl", lines({"messages": said})))
    found = row["messages"][0]["content"]
    assert found[0]["image"] == str(place / "shots/0.PNG") and found[1]["image_url"]["url"] == str(
        place / "shots/1.PNG"
    )
    assert found[2]["text"] == "0.PNG"
    uri, web = "data:image/png;base64,AAAA", "https://example.org/a.png"
    values = [f"file://{place}/shots/0.PNG", uri, web, "../" + place.name + "/shots/1.PNG", None]
    records = load_records(file(place / "v.jsonl", lines(*({"image": value} for value in values))))
    outside = str(place / ".." / place.name / "shots/1.PNG")
    assert records["image"][:] == [str(place / "shots/0.PNG"), uri, web, outside, None]
    assert caplog.text.count("nothing is fetched") == 1


def test_paths_outside_are_read_as_asked_and_told_once(place, caplog) -> None:
    rows = [{"image": str(place / "shots/0.PNG"), "caption": "a"}, {"image": "../shots/1.PNG", "caption": "b"}]
    records = load_records(file(place / "in" / "t.jsonl", lines(*rows, *rows)))
    assert all(load_image(value).size == (8, 8) for value in records["image"][:])
    first, second = (str(place / f"shots/{number}.PNG") for number in range(2))
    assert caplog.text.count("outside of its folder") == 1 and f"as requested: {first}, {second}\n" in caplog.text


def test_a_pattern_of_folders_pairs_each_row_with_its_own_image(tmp_path) -> None:
    for name, size in (("a", 8), ("b {x}", 9), ("c [1]", 10)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "same.png").write_bytes(image_bytes(random_image(size, size)))
        file(folder / "t.csv", f"image,caption\nsame.png,{size}\n")
        parquet(folder / "t.parquet", image=pa.array([{"bytes": None, "path": "same.png"}]), caption=[str(size)])
        assert load_records(folder / "t.csv")["caption"][:] == [str(size)], "a path that exists is no pattern"
    for pattern in ("*/t.csv", "*/t.parquet", "*"):
        records = load_records(str(tmp_path / pattern))
        sizes = [str(load_image(image).size[0]) for image in records["image"][:]]
        assert sizes == records["caption"][:] and set(sizes) == {"8", "9", "10"}
    stream = Stream.open(str(tmp_path / "*" / "t.parquet"))
    for shard in range(3):
        [row] = stream.read(0, shard, 0, ["image", "caption"])
        assert str(load_image(row["image"]).size[0]) == row["caption"]


def test_captions_of_digits_and_lists_of_images(place) -> None:
    from mllm_vision.data import PairDataset
    from mllm_vision.data.records.columns import further_images

    rows = [{"image": ["shots/0.PNG", "shots/1.PNG"], "caption": 7}, {"image": ["shots/2.PNG"], "caption": 42}]
    records = load_records(file(place / "digits.jsonl", lines(*rows)))
    assert [PairDataset(records)[n]["caption"] for n in range(2)] == ["7", "42"]
    assert further_images(records, "image") == 1 and further_images(records.select([1]), "image") == 0
    mixed = load_records(file(place / "mixed.jsonl", lines(*rows, {"image": "shots/3.PNG", "caption": "words"})))
    assert [PairDataset(mixed)[n]["caption"] for n in range(3)] == ["7", "42", "words"]
    assert further_images(mixed, "image") == 1
