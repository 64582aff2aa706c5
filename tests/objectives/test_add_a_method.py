"""The method of docs/add_a_method.md, taken from the page: its loss, what it prevents, its flags, a run."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from views_for_tests import make_encoder, make_method, view_batch

from mllm_vision.encoder import VisionEncoder
from mllm_vision.objectives import load_objective

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"slices": 16, "head_hidden": 24, "head_out": 8}


@pytest.fixture
def method(tmp_path, monkeypatch):
    """The class, loaded by name from the page's file."""
    page = (ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8")
    name, code = re.search(r"```python\n# file: (\w+\.py)\n(.*?)```", page, re.S).groups()
    (tmp_path / name).write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lejepa", raising=False)
    return load_objective("lejepa:LeJepa")


def epps_pulley(x, directions):
    """Equation of the paper with complex numbers: N times the weighted distance of characteristic functions."""
    t = np.linspace(-5, 5, 17)
    weight = np.exp(-(t**2) / 2)
    found = []
    for direction in directions.T:
        empirical = np.exp(1j * np.outer(x @ (direction / np.linalg.norm(direction)), t)).mean(0)
        found.append(len(x) * np.trapezoid(np.abs(empirical - weight) ** 2 * weight, t))
    return np.mean(found)


def test_its_loss_is_the_papers(method):
    objective = make_method(method, **SMALL, sigreg_weight=0.3)
    objective.step += 5
    views = view_batch(views=3)
    z = objective.head(objective.embed(views)["h"]).detach().double().numpy()
    generator = torch.Generator().manual_seed(5)
    directions = torch.randn(8, 16, generator=generator).double().numpy()
    sigreg = np.mean([epps_pulley(z[:, view], directions) for view in range(3)])
    agreement = np.mean((z - z.mean(1, keepdims=True)) ** 2)
    assert objective(views=views).loss.item() == pytest.approx(0.7 * agreement + 0.3 * sigreg, rel=1e-4)


def test_a_gaussian_passes_and_a_collapse_does_not(method):
    objective = make_method(method, **SMALL)
    gaussian = objective.sigreg(torch.randn(512, 8), 512)
    assert gaussian < 0.05 * objective.sigreg(torch.zeros(512, 8), 512)
    assert gaussian < 0.05 * objective.sigreg(3 * torch.randn(512, 8), 512)
    uneven = torch.randn(512, 8) * torch.tensor([1.0] * 4 + [0.05] * 4)
    assert gaussian < 0.1 * objective.sigreg(uneven, 512)


def test_the_directions_follow_the_counter_and_the_counter_is_saved(method):
    objective, views = make_method(method, **SMALL), view_batch()
    first = objective(views=views).metrics["sigreg"].item()
    objective.after_step(0.5)
    again = make_method(method, **SMALL)
    again.load_state_dict(objective.state_dict())
    second = objective(views=views).metrics["sigreg"].item()
    assert second != first
    assert again(views=views).metrics["sigreg"].item() == second


def test_a_wrong_weight_is_refused(method):
    with pytest.raises(ValueError, match=r"sigreg_weight=1.5 must lie in \(0, 1\)"):
        method(make_encoder(), method.Config(sigreg_weight=1.5))


def test_the_recipe_takes_it_by_name(method, tmp_path):
    """A short run: its Config is flags, it learns, and it leaves an encoder as every method does."""
    spec = importlib.util.spec_from_file_location("recipe_pretrain_images", ROOT / "recipes" / "pretrain_images.py")
    recipe = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = recipe
    spec.loader.exec_module(recipe)
    tiny.write_pairs_parquet(tmp_path / "train.parquet", 48)
    out = tmp_path / "run"
    sizes = {name: value for name, value in tiny.SIZES.items() if name != "image_size"}
    given = {
        "objective": "lejepa:LeJepa", "dataset_name": tmp_path / "train.parquet", "output_dir": out,
        "encoder": "vit", "image_size": 32, "slices": 16, "head_hidden": 24, "head_out": 8,
        "encoder_overrides": ",".join(f"{name}={value}" for name, value in sizes.items()),
        "max_steps": 12, "per_device_train_batch_size": 16, "learning_rate": 3e-3, "logging_steps": 3,
        "save_strategy": "no", "use_cpu": True,
    }  # fmt: skip
    recipe.main([word for name, value in given.items() for word in (f"--{name}", str(value))])
    encoder = VisionEncoder.from_pretrained(out / "encoder")
    assert encoder.config.hidden_size == 32
    losses = [row["loss"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert losses[-1] < losses[0]
    assert (out / "run.json").is_file()
    assert "sigreg_weight" in (out / "recipe.yaml").read_text()
