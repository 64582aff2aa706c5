"""A short run of every method on CIFAR-10 beats the untrained encoder in kNN."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dry import _load
from methods_for_tests import IMAGE_METHODS

ROOT = Path(__file__).resolve().parents[2]
SMALL = "hidden_size=96,num_hidden_layers=3,num_attention_heads=3,intermediate_size=192,patch_size=8"
LOCAL = {"local_size": 16}  # two patches of 8 pixels


@pytest.mark.slow
@pytest.mark.timeout(1800)  # beside other work on the machine
@pytest.mark.parametrize("name", IMAGE_METHODS)
def test_a_short_run_beats_the_untrained_encoder(name, data_dir, tmp_path):
    """The settings of recipes/configs/cifar10 with a smaller encoder of larger patches: a few minutes on one core."""
    given = {
        "config": ROOT / "recipes" / "configs" / "cifar10" / f"{name}.yaml",
        "dataset_name": data_dir / "cifar10_train.parquet",
        "eval_dataset_name": data_dir / "cifar10_test.parquet",
        "encoder_overrides": SMALL,
        "max_train_samples": 20000,
        "max_eval_samples": 5000,
        "eval_strategy": "no",
        "final_evaluators": "knn",
        "output_dir": tmp_path / "run",
        "use_cpu": "true",
        "disable_tqdm": "true",
        **(LOCAL if name.startswith("dino") else {}),
    }
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    _load("recipes/pretrain_images.py").main(words)
    knn = json.loads((tmp_path / "run" / "run.json").read_text())["evaluations"]["knn"]
    assert knn["accuracy"] > knn["baselines"]["untrained"]
