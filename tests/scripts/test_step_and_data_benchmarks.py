"""The benchmarks of the step and the data, small: they run, compare before they time, and give whole figures."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import random_image

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--width", "64", "--layers", "1", "--image_size", "32", "--patch_size", "8", "--batch_size", "4"]


@pytest.fixture(scope="module")
def scripts():
    """step.py and data.py, imported as they import one another."""
    folder = str(ROOT / "scripts" / "benchmark")
    sys.path.insert(0, folder)
    names = ("timing", "step", "data")
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(folder)
        for name in names:
            sys.modules.pop(name, None)


def test_the_step(scripts, data_dir, tmp_path, capsys):
    scripts["step"].main([*SMALL, "--data", str(data_dir), "--rounds", "2", "--json", str(tmp_path / "step.json")])
    figures = json.loads((tmp_path / "step.json").read_text())
    assert figures["agreement"]["loss"] < 1e-4 and figures["agreement"]["gradient"] < 1e-3
    contenders = figures["contenders"]
    assert list(contenders) == ["plain", "ours", "ours, patch_dropout 0.5"]
    for each in contenders.values():
        assert set(each["parts"]) == set(scripts["step"].PARTS) and min(each["parts"].values()) > 0
        assert len(each["seconds"]) == 2
    assert contenders["plain"]["speedup"]["median"] == 1
    printed = capsys.readouterr().out
    assert "| ours, patch_dropout 0.5 |" in printed and "gradients by" in printed


def test_the_optimizer_it_times_is_the_default(tmp_path):
    from mllm_vision.training.recipe.arguments import RecipeArguments

    assert RecipeArguments(output_dir=str(tmp_path), use_cpu=True).optim == "adamw_torch_fused"


def test_other_mathematics_are_not_timed(scripts, data_dir, monkeypatch):
    step = scripts["step"]
    monkeypatch.setattr(step.CLIP, "loss", lambda self, e: type("O", (), {"loss": e["image"].pow(2).mean()})())
    with pytest.raises(ValueError, match="not the same mathematics"):
        step.main([*SMALL, "--data", str(data_dir), "--rounds", "1"])


def test_the_data(scripts, data_dir, tmp_path, capsys):
    threads = torch.get_num_threads()
    common = [*SMALL, "--data", str(data_dir), "--count", "4", "--rounds", "2", "--steps", "2", "--workers", "0"]
    scripts["data"].main([*common, "--json", str(tmp_path / "data.json")])
    figures = json.loads((tmp_path / "data.json").read_text())
    ways = ["stock", "PIL", "ours, training", "ours, evaluation"]
    assert [each["name"] for each in figures["decoding"]] == ways * 2
    assert {each["size"] for each in figures["decoding"]} == {"640x480", "320x240"}
    assert all(each["images_per_second"] > 0 for each in figures["decoding"])
    (waited,) = figures["waiting"]
    assert 0 < waited["low"] <= waited["share"] <= waited["high"] < 1 and waited["wait"] < waited["step"]
    assert "share of a step waiting for data" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def test_jpegs_have_their_size_and_texture(scripts):
    from mllm_vision.data import load_image

    made = scripts["data"].jpegs([random_image(number, 50) for number in range(5)], (120, 70), 3, 90)
    assert {load_image(data).size for data in made} == {(120, 70)} and len(set(made)) == 3
