"""What keeps the methods from collapsing, taken away: the cases of scripts/benchmark/collapse.py, small."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def scripts():
    """collapse.py and its parts, imported as they import one another."""
    folder, names = str(ROOT / "scripts" / "benchmark"), ("timing", "collapse_theory", "collapse_cases", "collapse")
    sys.path.insert(0, folder)
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(folder)
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def data(scripts):
    """Images of 16 pixels, each a few smooth colours of its own."""
    cases = scripts["collapse_cases"]

    def images(count, seed):
        colours = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 255
        pixels = torch.nn.functional.interpolate(colours, size=(16, 16), mode="bilinear").to(torch.uint8)
        return cases.Images(pixels, torch.full((count, 2), 16), torch.arange(count) % 4)

    return cases.Data(images(256, 0), images(64, 1))


@pytest.fixture(scope="module")
def at_the_end(scripts, data):
    """`at_the_end(claim, variant, metric)`: mean of a metric over the last steps of a short training."""
    cases, trained = scripts["collapse_cases"], {}

    def measure(claim, variant, metric):
        if (claim, variant) not in trained:
            case = next(case for case in cases.cases() if (case.claim, case.variant) == (claim, variant))
            rate = None if claim == "DINO" else 2e-3  # DINO has a rate of its own
            _, history = cases.train(case, data, steps=40, batch_size=64, learning_rate=rate, **SIZES)
            trained[claim, variant] = {"history": history}
        return scripts["collapse"].last(trained[claim, variant], metric)

    return measure


@pytest.mark.parametrize("broken", ["without predictor", "without stop-gradient"])
def test_byol_collapses_without_predictor_or_stop_gradient(at_the_end, broken):
    assert at_the_end("BYOL", "as published", "z_spread") > 0.3
    assert at_the_end("BYOL", broken, "z_spread") < 0.1
    assert at_the_end("BYOL", broken, "loss") < 0.02  # the loss says that all is well


def test_vicreg_collapses_without_its_variance_term(at_the_end):
    assert at_the_end("VICReg", "as published", "variance") < 0.8
    assert at_the_end("VICReg", "without variance", "variance") > 0.95  # of the 0.99 of constant outputs
    assert at_the_end("VICReg", "without variance", "loss") < 0.1


def test_moco_fails_with_a_teacher_that_has_no_momentum(at_the_end):
    assert at_the_end("MoCo", "m = 0.99", "query_spread") > 0.1
    assert at_the_end("MoCo", "m = 0", "query_spread") < 0.02


def test_dino_collapses_to_one_prototype_or_to_none(at_the_end):
    """Sharpening alone and centring alone, each to its own side; together they keep what tells images apart."""
    assert at_the_end("DINO", "as published", "information") > 0.03
    assert at_the_end("DINO", "without centring", "prototype_entropy") < 0.1
    assert at_the_end("DINO", "without sharpening", "teacher_entropy") > 0.99 * math.log(256)


def test_the_bound_passes_neither_the_information_nor_the_logarithm(scripts):
    """With the best critic there is: at a rich batch the bound is tight, at a poor one it stands at ln N."""
    records = scripts["collapse_theory"].bounds([1.0, 3.0, 12.0], [4, 64, 512], samples=2048, batches=20)
    by_setting = {(record["information"], record["candidates"]): record for record in records}
    for (information, count), record in by_setting.items():
        assert record["highest"] <= math.log(count) + 1e-9
        assert record["bound"] < information + 0.2  # of the mean over batches; a single one may be luckier
    assert by_setting[1.0, 512]["bound"] == pytest.approx(1.0, abs=0.2)
    assert by_setting[3.0, 512]["bound"] > 2.6 and by_setting[3.0, 4]["bound"] < math.log(4)
    assert by_setting[12.0, 64]["bound"] == pytest.approx(math.log(64), abs=0.15)


def test_the_gaussians_have_the_information_they_claim(scripts):
    """The squared correlation of each dimension is 1 - exp(-2 I / d), and the best critic's mean over pairs is 0."""
    dimensions, information = 6, 2.0
    x, y = scripts["collapse_theory"].gaussian_pairs(40000, information, dimensions, torch.Generator().manual_seed(0))
    expected = (1 - math.exp(-2 * information / dimensions)) ** 0.5
    for dimension in range(dimensions):
        scaled = torch.stack([x[:, dimension], y[:, dimension]])  # the critic's scale is none of a correlation's
        assert torch.corrcoef(scaled)[0, 1].item() == pytest.approx(expected, abs=0.02)
    assert (x * y).sum(1).mean().item() == pytest.approx(0.0, abs=0.05)


def test_a_low_temperature_looks_at_hard_negatives_alone(scripts):
    torch.manual_seed(0)
    shares = scripts["collapse_theory"].hard_shares(torch.randn(200, 8), (0.05, 0.2, 1.0, 100.0))
    for name, ordered in (("hardest_hundredth", 1), ("hardest_tenth", 1), ("negatives_that_count", -1)):
        values = [ordered * each[name] for each in shares]
        assert values == sorted(values, reverse=True)
    assert shares[-1]["negatives_that_count"] == pytest.approx(199, rel=0.01)
    assert shares[-1]["hardest_tenth"] == pytest.approx(20 / 199, rel=0.02)


def test_the_script_measures_draws_and_reads_what_it_left(scripts, tmp_path, capsys, monkeypatch):
    from datasets import Dataset
    from tiny import image_bytes, random_image

    for seed, name in ((0, "train"), (1000, "test")):
        rows = [
            {"image": {"bytes": image_bytes(random_image(seed + row)), "path": None}, "label": row % 3}
            for row in range(48)
        ]
        Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet")
    monkeypatch.setattr(scripts["collapse_cases"], "SIZES", SIZES | {"patch_size": 8})
    given = ["--train", str(tmp_path / "train.parquet"), "--test", str(tmp_path / "test.parquet")]
    short = ["--steps", "2", "--batch_size", "8", "--claims", "VICReg", "Head", "Temperature", "Bound"]
    short += ["--output_dir", str(tmp_path)]
    report = scripts["collapse"].main([*given, *short])
    assert [record["claim"] for record in report["results"]] == ["VICReg"] * 2 + ["Views"] * 3 + ["Head"]
    assert all(0 <= record["knn"] <= 1 and len(record["history"]) == 2 for record in report["results"])
    printed = capsys.readouterr().out
    assert "without variance" in printed and "Linear probe of SimCLR's h" in printed and "| 16 nats" in printed
    names = [f"collapse_{name}.png" for name in ("training", "temperature", "bound")]
    assert all((tmp_path / "images" / name).stat().st_size > 1000 for name in names)
    scripts["collapse"].main(["--from_json", str(tmp_path / "collapse.json")])
    assert capsys.readouterr().out == printed
