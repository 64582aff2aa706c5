"""`mllm_vision.train`: a recipe as one call, and the notebook that shows it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny
from transformers import TrainerCallback

import mllm_vision
from mllm_vision import api

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}


class Steps(TrainerCallback):
    def __init__(self) -> None:
        self.count = 0

    def on_step_end(self, *args, **kwargs) -> None:
        self.count += 1


def test_a_recipe_as_one_call(tmp_path):
    data, steps, words = tiny.write_pairs_parquet(tmp_path / "train.parquet", 32), Steps(), list(sys.argv)
    given = {"encoder": "vit_tiny", "encoder_overrides": SMALL, "image_size": 32, "max_steps": 2, "use_cpu": True}
    given |= {"per_device_train_batch_size": 8, "eval_dataset_name": data, "knn_k": 5, "final_evaluators": ["knn"]}
    run = mllm_vision.train("simclr", data, output_dir=tmp_path / "run", callbacks=[steps], **given)
    assert steps.count == 2 and sys.argv == words
    assert run.folder == tmp_path / "run" and run.artifact == tmp_path / "run" / "encoder"
    assert run.metrics["eval_knn_accuracy"] == run.record["evaluations"]["knn"]["accuracy"]
    assert run.record["command"].startswith("mllm-vision pretrain-images --objective simclr --encoder vit_tiny")
    assert mllm_vision.VisionEncoder.from_pretrained(run.artifact).hidden_size == 32
    with pytest.raises(FileExistsError, match="--overwrite"):
        mllm_vision.train("simclr", data, output_dir=tmp_path / "run", **given)
    with pytest.raises(ValueError, match="max_steps"):
        mllm_vision.train("simclr", data, output_dir=tmp_path / "other", max_step=2)
    with pytest.raises(ValueError, match="did you mean 'simclr'|simclr"):
        mllm_vision.train("simcrl", data, output_dir=tmp_path / "other")


def test_methods_find_their_recipe():
    assert api._recipe_of("siglip") == ("pretrain", {"objective": "siglip"})
    assert api._recipe_of("dino") == ("pretrain-images", {"objective": "dino"})
    assert api._recipe_of("language_model") == ("language-model", {})
    assert api._recipe_of("align") == ("align", {})
    method = mllm_vision.load_objective("mae")
    assert api._recipe_of(method) == ("pretrain-images", {"objective": "mllm_vision.objectives.mae:MAE"})
    with pytest.raises(ValueError, match="other recipes are align, instruct"):
        api._recipe_of("aling")


def test_flags_become_words():
    flags = {
        "bf16": False,
        "max_steps": 3,
        "crop_scale": [0.5, 1.0],
        "encoder_overrides": {"patch_size": 8},
        "llm": None,
    }
    # argparse takes "-1e-05" for a flag unless it is joined
    assert api._words({"initial_logit_bias": -1e-5}) == ["--initial_logit_bias=-1e-05"]
    words = ["--bf16", "false", "--max_steps", "3", "--crop_scale", "0.5", "1.0"]
    assert api._words(flags) == [*words, "--encoder_overrides", '{"patch_size": 8}']


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_notebook_runs_cell_by_cell(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    namespace: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        assert cell["outputs"] == [] and cell["execution_count"] is None  # saved without results
        exec(compile("".join(cell["source"]), f"{path.name}, code cell {number}", "exec"), namespace)
    assert len(namespace["losses"].values) == 4
    assert namespace["pair"].metrics.keys() >= {"eval_retrieval_r1"}


def test_there_is_a_notebook():
    assert NOTEBOOKS
