"""Rows and tasks that scripts/lmms_eval writes for lmms-eval."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import tiny
import yaml
from datasets import Dataset, load_dataset

ROOT = Path(__file__).resolve().parents[2]


def test_rows_are_one_a_question_and_tasks_name_them(tmp_path) -> None:
    spec = importlib.util.spec_from_file_location("lmms_rows", ROOT / "scripts" / "lmms_eval" / "rows.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    cells = [{"bytes": tiny.image_bytes(tiny.random_image(number)), "path": None} for number in range(2)]
    questions = [["is it red?", "what is it?"], ["is it big?"]]
    answers = [["yes", "a star"], ["no"]]
    data = {"image": cells, "questions": questions, "answers": answers}
    Dataset.from_dict(data).to_parquet(str(tmp_path / "test.parquet"))
    out = tmp_path / "out"
    script.main(["--dataset_name", str(tmp_path / "test.parquet"), "--output_dir", str(out)])
    found = {}
    for name in ("vqa", "yes_no"):
        text = (out / f"local_{name}.yaml").read_text().replace("!function ", "")
        task = yaml.safe_load(text)
        assert task["task"] == f"local_{name}" and (out / "utils.py").is_file()
        rows = load_dataset("parquet", data_files=task["dataset_kwargs"]["data_files"], split="test")
        found[name] = [(row["question_id"], row["question"], row["answer"], row["image"].size) for row in rows]
    size = (32, 32)
    assert found["vqa"] == [
        ("0-0", "is it red?", "yes", size), ("0-1", "what is it?", "a star", size), ("1-2", "is it big?", "no", size),
    ]  # fmt: skip
    assert [row[1:3] for row in found["yes_no"]] == [("is it red?", "yes"), ("is it big?", "no")]
