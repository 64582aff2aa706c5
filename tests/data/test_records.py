"""Loading records of every form, and binding their columns."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
from tiny import image_bytes, random_image, write_conversations_jsonl, write_pairs_parquet

from mllm_vision.data import bind_columns, load_image, load_records
from mllm_vision.data.records.records import UsualSplit


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is written to the user's cache of data sets."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def image(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    random_image(seed).save(path)
    return path


def test_parquet_keeps_images_undecoded(tmp_path):
    path = write_pairs_parquet(tmp_path / "train.parquet", 6, captions_each=2)
    records = load_records(str(path))
    assert len(records) == 6
    assert set(records[0]["image"]) == {"bytes", "path"} and isinstance(records[0]["image"]["bytes"], bytes)
    assert load_image(records[0]["image"]).size == (32, 32)
    assert len(load_records(path, max_rows=4)) == 4
    assert len(load_records(path, split="train[:50%]")) == 3
    assert len(load_records(path, split="test[2:4]")) == 2, "a file is whatever split is asked for"


def test_globs_and_folders_of_splits(tmp_path):
    for name, rows in (("train", 5), ("val", 3), ("single_test", 2), ("test", 4)):
        write_pairs_parquet(tmp_path / "set" / f"{name}.parquet", rows)
    folder = str(tmp_path / "set")
    assert len(load_records(folder)) == 5
    assert len(load_records(folder, split="validation")) == 3
    assert len(load_records(folder, split="test")) == 4, "not single_test"
    assert len(load_records(folder + "/*.parquet")) == 14
    with pytest.raises(FileNotFoundError, match=r"no file matches"):
        load_records(folder + "/*.csv")


def test_jsonl_paths_are_relative_to_the_file_or_the_root(tmp_path):
    image(tmp_path / "a" / "images" / "0.png")
    lines = [{"image": "images/0.png", "caption": "a dog"}, {"image": None, "caption": "nothing"}]
    file = tmp_path / "a" / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    records = load_records(file)
    assert records[0]["image"] == str(tmp_path / "a" / "images" / "0.png") and records[1]["image"] is None
    moved = tmp_path / "b" / "data.jsonl"
    moved.parent.mkdir()
    moved.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"'images/0.png'.*--image_root"):
        load_records(moved)
    assert load_image(load_records(moved, image_root=tmp_path / "a")[0]["image"]).size == (32, 32)
    with pytest.raises(FileNotFoundError, match="image_root=.* is not a directory"):
        load_records(moved, image_root=tmp_path / "nowhere")


def test_llava_json_with_mixed_rows(tmp_path):
    image(tmp_path / "coco" / "1.png")
    rows = [
        {
            "id": 1,
            "image": "coco/1.png",
            "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a dog"}],
        },
        {"id": "text", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    ]
    (tmp_path / "llava.json").write_text(json.dumps(rows), encoding="utf-8")
    records = load_records(tmp_path / "llava.json")
    assert records[0]["image"] == str(tmp_path / "coco" / "1.png") and records[1]["image"] is None
    assert bind_columns(records, ["image", "conversations"]) == {"image": "image", "conversations": "conversations"}


def test_csv_and_tsv(tmp_path):
    image(tmp_path / "x.png")
    for suffix, comma in ((".csv", ","), (".tsv", "\t")):
        file = tmp_path / f"data{suffix}"
        file.write_text(f"image{comma}caption\nx.png{comma}a red square\n", encoding="utf-8")
        records = load_records(file)
        assert records[0] == {"image": str(tmp_path / "x.png"), "caption": "a red square"}


def test_image_folders(tmp_path):
    for label in ("cat", "dog"):
        for number in range(2):
            image(tmp_path / "classes" / label / f"{number}.png")
    records = load_records(tmp_path / "classes")
    assert records.features["label"].names == ["cat", "dog"] and len(records) == 4
    assert records[0]["image"]["bytes"] is None and load_image(records[0]["image"]).size == (32, 32)
    with pytest.raises(ValueError, match=r"no split 'test'; it has 'train'.*Name it with the flag that ends in _split"):
        load_records(tmp_path / "classes", split="test")
    image(tmp_path / "captioned" / "0.png")
    line = {"file_name": "0.png", "text": "a smooth image"}
    (tmp_path / "captioned" / "metadata.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    captioned = load_records(tmp_path / "captioned")
    assert bind_columns(captioned, ["image", "caption"]) == {"image": "image", "caption": "text"}


def test_webdataset_tars(tmp_path):
    def write(path, first, rows):
        with tarfile.open(path, "w") as tar:
            for number in range(first, first + rows):
                members = {
                    "png": image_bytes(random_image(number)),
                    "txt": f"image {number}".encode(),
                    "json": json.dumps({"width": 32, "source": "web"}).encode(),
                }
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))

    (tmp_path / "tars").mkdir()
    write(tmp_path / "tars" / "000.tar", 0, 3)
    write(tmp_path / "tars" / "001.tar", 3, 2)
    records = load_records(tmp_path / "tars")
    assert len(records) == 5 and "source" in records.column_names
    columns = bind_columns(records, ["image", "caption"])
    assert columns == {"image": "image", "caption": "txt"}
    assert records[4]["txt"] == "image 4" and load_image(records[4]["image"]).size == (32, 32)
    assert len(load_records(tmp_path / "tars" / "001.tar")) == 2


def test_saved_to_disk(tmp_path):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_dict({"image": [image_bytes(random_image())], "caption": ["a"]})
    data.save_to_disk(tmp_path / "one")
    DatasetDict({"train": data}).save_to_disk(tmp_path / "dict")
    assert load_records(tmp_path / "one")[0]["caption"] == "a"
    assert load_records(tmp_path / "dict")[0]["caption"] == "a"
    with pytest.raises(ValueError, match=r"no split 'test'; it has 'train'"):
        load_records(tmp_path / "dict", split="test")


USUAL = UsualSplit("test", "--eval_split")


def test_a_split_that_nobody_named_gives_way_to_the_only_one(tmp_path, caplog):
    """The test split where there is one; of local data with one split, that one, which is told."""
    from datasets import Dataset, DatasetDict

    for label in ("cat", "dog"):
        image(tmp_path / "images" / label / "0.png")
    write_pairs_parquet(tmp_path / "table" / "train.parquet", 3)
    data = Dataset.from_dict({"caption": ["a"]})
    DatasetDict({"train": data}).save_to_disk(tmp_path / "saved")
    data.save_to_disk(tmp_path / "one")
    for name, rows in (("images", 2), ("table", 3), ("saved", 1)):
        caplog.clear()
        assert len(load_records(tmp_path / name, split=USUAL)) == rows
        assert f"{name} has no split 'test'; its only split, 'train', is used" in caplog.text
        with pytest.raises(ValueError, match="split"):  # but not in place of one that was named
            load_records(tmp_path / name, split="test")
    caplog.clear()
    assert len(load_records(tmp_path / "one", split=USUAL)) == 1
    assert len(load_records(tmp_path / "table" / "train.parquet", split=USUAL)) == 3
    write_pairs_parquet(tmp_path / "table" / "test.parquet", 4)
    DatasetDict({"train": data, "test": Dataset.from_dict({"caption": ["b"]})}).save_to_disk(tmp_path / "both")
    assert len(load_records(tmp_path / "table", split=USUAL)) == 4
    assert load_records(tmp_path / "both", split=USUAL)["caption"] == ["b"]
    assert not caplog.text


def test_several_splits_of_which_none_is_the_usual_one(tmp_path):
    from datasets import Dataset, DatasetDict

    for name in ("train", "validation"):
        for label in ("cat", "dog"):
            image(tmp_path / "images" / name / label / "0.png")
        write_pairs_parquet(tmp_path / "table" / f"{name}.parquet", 3)
        tar = tmp_path / "tars" / f"{name}-000.tar"
        tar.parent.mkdir(exist_ok=True)
        with tarfile.open(tar, "w") as archive:
            content = image_bytes(random_image())
            member = tarfile.TarInfo("0.png")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    data = Dataset.from_dict({"caption": ["a"]})
    DatasetDict({"train": data, "validation": data}).save_to_disk(tmp_path / "saved")
    for name in ("images", "table", "saved", "tars"):
        told = rf"{name} has no split 'test'; it has 'train', 'validation': name one with --eval_split"
        with pytest.raises(ValueError, match=told):
            load_records(tmp_path / name, split=USUAL)


def test_what_cannot_be_loaded_says_so(tmp_path):
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": 2\n', encoding="utf-8")
    (tmp_path / "not.parquet").write_bytes(b"no parquet at all")
    (tmp_path / "notes.docx").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    for name, error, message in (
        ("empty.jsonl", ValueError, "empty"),
        ("bad.jsonl", ValueError, "bad.jsonl cannot be read as JSON lines: 1 of 2 are not; line 2: Expecting"),
        ("not.parquet", ValueError, "not.parquet cannot be read"),
        ("notes.docx", ValueError, r"\.docx.*\.parquet"),
        ("folder", FileNotFoundError, "is empty"),
        ("none.parquet", FileNotFoundError, "does not exist"),
        ("none/at/all", FileNotFoundError, "does not exist"),
    ):
        with pytest.raises(error, match=message):
            load_records(str(tmp_path / name))
    with pytest.raises(ValueError, match="max_rows=0"):
        load_records(tmp_path / "bad.jsonl", max_rows=0)
    with pytest.raises(ValueError, match="no data set was named"):
        load_records("")


def test_an_empty_data_set(tmp_path):
    from datasets import Dataset, Features, Value

    file = tmp_path / "none.parquet"
    Dataset.from_dict({"caption": []}, features=Features({"caption": Value("string")})).to_parquet(str(file))
    with pytest.raises(ValueError, match=r"none.parquet is empty: it has no rows"):
        load_records(file)
    with pytest.raises(ValueError, match="0 rows"):
        bind_columns([], ["image"])


def test_the_hub_out_of_reach():
    with pytest.raises((ConnectionError, FileNotFoundError), match=r"'nobody/no-such-data'.*Check the name"):
        load_records("nobody/no-such-data")


def test_columns_by_name_then_by_type(tmp_path):
    records = load_records(write_pairs_parquet(tmp_path / "pairs.parquet", 4))
    assert bind_columns(records, ["image", "caption"]) == {"image": "image", "caption": "captions"}
    assert bind_columns(records, ["question", "answer"]) == {"question": "questions", "answer": "answers"}
    assert bind_columns(records, ["image", "label", "messages?"]) == {"image": "image", "label": "label"}
    odd = records.rename_columns({"image": "photograph", "captions": "words", "label": "kind"}).select_columns(
        ["photograph", "words", "kind"]
    )
    assert bind_columns(odd, ["image", "caption", "label"]) == {
        "image": "photograph",
        "caption": "words",
        "label": "kind",
    }
    turned = load_records(write_conversations_jsonl(tmp_path / "talk.jsonl", 4, "llava")).rename_column(
        "conversations", "dialog_turns"
    )
    assert bind_columns(turned, ["conversations"]) == {"conversations": "dialog_turns"}


def test_columns_are_never_bound_by_order():
    rows = [{"image": random_image(), "one": "a cat", "two": "a dog"}]
    with pytest.raises(ValueError, match=r"no column found for caption: several columns could be it \(one, two\)"):
        bind_columns(rows, ["image", "caption"])
    assert bind_columns(rows, ["image", "caption"], {"caption": "two"})["caption"] == "two"


def test_missing_and_wrong_columns(tmp_path):
    records = load_records(write_pairs_parquet(tmp_path / "pairs.parquet", 4))
    with pytest.raises(
        ValueError, match=r"no column found for messages: none fits.*captions \(texts\).*--messages_column"
    ):
        bind_columns(records, ["messages"])
    with pytest.raises(ValueError, match=r"column 'caption' \(for caption\) does not exist; did you mean 'captions'\?"):
        bind_columns(records, ["caption"], {"caption": "caption"})
    with pytest.raises(ValueError, match=r"column 'label' \(class\) cannot serve as image"):
        bind_columns(records, ["image"], {"image": "label"})
    with pytest.raises(ValueError, match=r"column 'image' \(image\) cannot serve as caption"):
        bind_columns(records, ["caption"], {"caption": "image"})
    with pytest.raises(ValueError, match="unknown role 'photograph'"):
        bind_columns(records, ["photograph"])
    with pytest.raises(ValueError, match="no column found for image"):
        bind_columns(records.select_columns(["label"]), ["image"])


def test_a_column_of_names_does_not_hide_the_images():
    rows = [{"file_name": "x.png", "thumbnail": random_image(), "text": "a"}]
    assert bind_columns(rows, ["image"]) == {"image": "thumbnail"}


def test_real_sets(data_dir):
    flickr = load_records(data_dir / "flickr8k_test.parquet", max_rows=50)
    assert bind_columns(flickr, ["image", "caption"]) == {"image": "image", "caption": "captions"}
    easy = load_records(data_dir / "easyvqa_test.parquet", max_rows=50)
    assert bind_columns(easy, ["image", "question", "answer"]) == {
        "image": "image",
        "question": "questions",
        "answer": "answers",
    }
    cifar = load_records(data_dir / "cifar10_test.parquet", max_rows=10)
    assert bind_columns(cifar, ["image", "label"]) == {"image": "image", "label": "label"}
