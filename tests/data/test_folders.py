"""Folders, splits and classes are found by the names of folders alone, and every file that is not read is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import image_bytes, random_image, write_pairs_parquet

from mllm_vision.data import load_image, load_records
from mllm_vision.data.records.readers.files import LeftOut, braces, find, image_splits, table_splits
from mllm_vision.data.records.records import UsualSplit
from mllm_vision.data.streams.shards import find_shards

PNG = image_bytes(random_image(1, 8))


def tree(root: Path, *files: str) -> Path:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)
    return root


def labels(records: object) -> list[str | None]:
    names = records.features["label"].names
    return [None if number is None else names[number] for number in records["label"][:]]


@pytest.mark.parametrize(
    ("files", "rows", "classes"),
    [
        (("eval.png", "1.png", "dev.png"), 3, None),
        (("dev/a.png", "ship/b.png", "truck/c.png"), 3, ["dev", "ship", "truck"]),
        (("training_shoe/a.png", "test_tube/b.png", "validation_stamp/c.png"), 3, 3),
        (("ape/train_1.png", "ape/test.png", "bee/val.png", "bee/eval/x.png"), 4, ["ape", "ape", "bee", "bee"]),
        (("images/ape/1.png", "images/bee/2.png"), 2, ["ape", "bee"]),
        (("a/1.png", "a/2.png"), 2, None),
        (("1.png", "a/2.png", "b/3.png"), 3, [None, "a", "b"]),
        (("A/1.JPG", "A/2.Jpeg", "B/3.TIFF", "B/4.webp"), 4, ["A", "A", "B", "B"]),
        (("a[0]/1.png", "b {x}/2*.png"), 2, ["a[0]", "b {x}"]),
    ],
)
def test_no_image_and_no_class_is_lost_by_its_name(tmp_path, files, rows, classes) -> None:
    records = load_records(tree(tmp_path, *files))
    assert len(records) == rows
    assert {value["path"] for value in records["image"][:]} == {str(tmp_path / name) for name in files}
    if isinstance(classes, list):
        assert labels(records) == classes
    elif classes is None:
        assert "label" not in records.features
    else:
        assert len(set(labels(records))) == classes


def test_real_splits_at_the_top(tmp_path, caplog) -> None:
    root = tree(tmp_path, "Train/ant/1.png", "Train/bee/2.png", "val2017/bee/3.png", "test/x/4.png", "notes/5.png")
    assert labels(load_records(root)) == ["ant", "bee"]
    assert labels(load_records(root, split="validation")) == ["bee"], "numbered as in the training split"
    assert labels(load_records(root, split="train+validation")) == ["ant", "bee", "bee"]
    assert labels(load_records(root, split="train[1:]+validation[:50%]")) == ["bee"]
    assert "1 images in folders of no split (notes/5.png)" in caplog.text
    with pytest.raises(ValueError, match=r"has no split 'nothing'; it has 'train', 'validation', 'test'"):
        load_records(root, split="nothing")


def test_splits_without_classes(tmp_path) -> None:
    root = tree(tmp_path, "train/1.png", "train/2.png", "test/3.png")
    assert [len(load_records(root, split=split)) for split in ("train", "test")] == [2, 1]
    assert load_records(root).column_names == ["image"]


def test_what_lies_beside_images_is_counted(tmp_path, caplog) -> None:
    root = tree(tmp_path, "a/1.png", "a/.DS_Store", "a/._1.png", "b/2.png", "b/Thumbs.db", ".cache/x.png", "b/d/3.png")
    (root / "README.md").write_text("a set")
    (root / "sizes.csv").write_text("width,height\n1,2\n")
    (root / "b" / "zero.png").write_bytes(b"")
    (root / "a" / "linked.png").symlink_to(root / "b" / "2.png")
    (root / "a" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "b" / "back").symlink_to(root)
    records = load_records(root)
    assert len(records) == 6, "an empty file and a broken link are rows, refused and counted as corrupt images are"
    assert records.left_out == {
        "hidden files": 3,
        "hidden folders": 1,
        "folders that are linked in twice": 1,
        "files of another type (.md)": 1,
        "tables without a known column": 1,
    }
    assert "the classes are the 2 folders of the first level" in caplog.text and "3 hidden files" in caplog.text


def test_a_table_among_its_images_is_what_is_read(tmp_path, caplog) -> None:
    root = tree(tmp_path, "shots/1.png", "shots/2.png", "shots/3.png")
    rows = [{"image": f"shots/{n}.png", "caption": str(n)} for n in (1, 2)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_records(root)["caption"][:] == ["1", "2"]
    assert "1 images that no row names (shots/3.png)" in caplog.text
    for split in ("train", "test"):
        tree(root / "meta", f"{split}/1.png")
        (root / "meta" / split / "metadata.csv").write_text(f"file_name,text\n1.png,of {split}\n")
    for split in ("train", "test"):
        [row] = load_records(root / "meta", split=split)
        assert row["text"] == f"of {split}" and load_image(row["image"]).size == (8, 8)


def test_tables_that_are_meant(tmp_path, caplog) -> None:
    """A column that only a flag names, files that describe a set, and descriptions of single images."""
    root = tree(tmp_path / "named", "shots/1.png", "shots/2.png")
    (root / "list.csv").write_text("which,what\nshots/1.png,one\nshots/2.png,two\n")
    (root / "classes.json").write_text('{"0": "ant"}')
    records = load_records(root)
    assert records["what"][:] == ["one", "two"] and load_image(records["which"][1]).size == (8, 8)
    (root / "list.csv").write_text("")
    assert load_records(root).column_names == ["image"]
    assert "1 empty files (0 bytes) (list.csv)" in caplog.text and "classes.json: its columns are 0" in caplog.text
    write_pairs_parquet(tmp_path / "clone" / "data" / "train-00000-of-00001.parquet", 3)
    (tmp_path / "clone" / "dataset_infos.json").write_text('{"default": {"description": "x"}}')
    assert len(load_records(tmp_path / "clone")) == 3
    root = tree(tmp_path / "dump", *(f"{n}.jpg" for n in range(3)))
    for number in range(3):
        (root / f"{number}.json").write_text('{"caption": "x", "url": "y"}')
        (root / f"{number}.txt").write_text("x")
    assert load_records(root).left_out == {
        ".json files that are called like the image beside them": 3,
        "files of another type (.txt)": 3,
    }


def test_tables_of_splits(tmp_path, caplog) -> None:
    def names(*files: str, asked: str = "train") -> list[str] | None:
        return table_splits(files, asked)[0].get(asked)

    assert names("train.csv", "val.csv", "more.csv") == ["train.csv"]
    assert names("data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet") == [
        "data/train-00000-of-00002.parquet"
    ]
    assert names("coco_train.jsonl", "coco_val.jsonl", asked="validation") == ["coco_val.jsonl"]
    for odd in (
        ["test_tube.jsonl", "beaker.jsonl"],
        ["bullet_train.jsonl", "test_tube.jsonl"],
        ["a_train.csv", "b_val.csv"],
    ):
        assert table_splits(odd) == ({}, odd), "words count where names differ in them alone"
    assert names("x-train-0001-of-2.tar", "x-val-0001-of-1.tar", "y.tar") == ["x-train-0001-of-2.tar"]
    assert names("coco_test.jsonl", asked="test") == ["coco_test.jsonl"]
    assert names("train_set/a.csv", "test_set/b.csv", asked="test") == ["test_set/b.csv"]
    assert names("train/a.parquet", "valid/a.parquet", asked="validation") == ["valid/a.parquet"]
    assert names("mine.parquet", "train.parquet", asked="mine") == ["mine.parquet"]
    for name in ("test_tube", "beaker"):
        write_pairs_parquet(tmp_path / f"{name}.parquet", 2)
    assert len(load_records(tmp_path)) == 4 and len(find_shards(tmp_path)) == 2
    with pytest.raises(ValueError, match=r"no split 'test'; it has 'train'"):
        load_records(tmp_path, split="test")
    assert len(load_records(tmp_path, split=UsualSplit("test", "--eval_split"))) == 4
    assert "has no split 'test'; its only split, 'train', is used" in caplog.text


def test_image_splits_by_the_folders_at_the_top() -> None:
    def splits(*files: str) -> dict[str, list[str]]:
        return image_splits(files)[0]

    assert splits("train/1.png", "bus/2.png", "car/3.png") == {}
    assert splits("test/1.png", "train/2.png", "a/3.png", "b/4.png", "c/5.png") == {}, "five classes, two of odd names"
    assert set(splits("train/1.png", "val/2.png", "extra/3.png")) == {"train", "validation"}
    assert splits("x/train/1.png") == {"train": ["x/train/1.png"]}
    assert splits("1.png", "train/1.png") == {}


def test_names_that_are_no_text_and_versions(tmp_path, caplog) -> None:
    import os

    root = tree(tmp_path / "images", "a/1.png", "b/ü.png")
    with open(os.path.join(os.fsencode(root), b"a", b"\xff.png"), "wb") as file:
        file.write(PNG)
    assert len(load_records(root)) == 2 and "1 files whose names are not UTF-8 ('a/\\udcff.png')" in caplog.text
    for name in ("v1.0", "v1.1"):
        (tmp_path / "v").mkdir(exist_ok=True)
        (tmp_path / "v" / f"{name}.csv").write_text(f"caption\n{name}\n")
    assert load_records(tmp_path / "v")["caption"][:] == ["v1.0", "v1.1"]
    for split in ("train", "val"):
        write_pairs_parquet(tmp_path / "s" / f"{split}.parquet", 2 if split == "val" else 3)
    assert [len(load_records(tmp_path / "s", split=split)) for split in ("val", "dev", "validation[:1]")] == [2, 2, 1]
    assert len(find_shards(tmp_path / "s", "val")) == 1


def test_a_pattern_below_a_folder_with_brackets(tmp_path) -> None:
    tree(tmp_path, "data [2023]/a/1.png", "data [2023]/b {c}/2.png", "data [2023]/c/x[1].png")
    assert len(load_records(f"{tmp_path}/data [2023]/*/*.png")) == 3
    assert len(load_records(f"{tmp_path}/data [2023]/{{a,c}}/*.png")) == 2
    assert len(load_records(f"{tmp_path}/data [2023]/c/x[1].png")) == 1
    with pytest.raises(FileNotFoundError, match=r"1 are missing: .*/data \[2023\]/d$"):
        find(f"{tmp_path}/data [2023]/{{a,d}}", LeftOut())


def test_names_that_are_not_there(tmp_path) -> None:
    tree(tmp_path, "set/part-000.tar", "set/part-002.tar", "pairs.parquet")
    left_out = LeftOut()
    with pytest.raises(FileNotFoundError, match=r"names 3 files, and 1 are missing: .*part-001\.tar$"):
        find(tmp_path / "set" / "part-{000..002}.tar", left_out)
    with pytest.raises(FileNotFoundError, match=r"does not exist.*; the nearest there is '.*/pairs.parquet'"):
        find(tmp_path / "pair.parquet", left_out)
    with pytest.raises(FileNotFoundError, match="neither does the folder"):
        find(tmp_path / "nowhere" / "pair.parquet", left_out)
    with pytest.raises(FileNotFoundError, match="no file matches"):
        find(tmp_path / "*.csv", left_out)
    with pytest.raises(ValueError, match=r"cannot read files of type \.zip \(1\)"):
        load_records(tree(tmp_path, "a.zip") / "a.zip")
    assert find("someone/set", left_out) is None
    assert braces("{0..2}{a,b}") == ["0a", "0b", "1a", "1b", "2a", "2b"] and braces("{08..10}") == ["08", "09", "10"]
