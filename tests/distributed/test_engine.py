"""The tiled losses over two and three ranks, even and uneven, by gather and by ring, equal one process's oracle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import engine_work
import numpy as np
import pytest
import torch
from oracles import image_text as oracle
from oracles import infonce

N, D, SCALE, BIAS = 9, 5, 14.3, -3.0


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    image, text = rng.normal(size=(2, N, D))
    bank = rng.normal(size=(4, D))
    ids = rng.integers(0, 5, size=(N, 2))
    dense = np.clip(rng.random((N, N)), 0.05, 1) * ((rng.random((N, N)) < 0.5) | np.eye(N, dtype=bool))
    return image, text, bank, ids, dense


@pytest.fixture(scope="module")
def expected(batch):
    """{name: (value, gradients of rows, gradients of parameters)} of the whole batch on one process."""
    image, text, bank, ids, dense = batch
    matrices = {"none": None, "ids": oracle.positives_from_ids(ids.tolist())}
    found = {}
    for name in ("none", "ids", "dense", "callable", "sparse"):
        matrix = matrices.get(name, dense)
        value, *rest = oracle.clip(image, text, SCALE, matrix)
        found["clip", name] = value, rest[:2], rest[2:]
        value, *rest = oracle.siglip(image, text, SCALE, BIAS, matrix)
        found["siglip", name] = value, rest[:2], rest[2:]
    value, *rest = infonce.nt_xent(image, text, 1 / SCALE)
    found["nt_xent", ""] = value, rest[:2], rest[2:]
    value, *rest = infonce.info_nce(image, text, None, 1 / SCALE)
    found["info_nce", ""] = value, rest[:2], rest[2:]
    value, by_query, by_positive, by_bank, by_temperature = infonce.info_nce(image, text, bank, 1 / SCALE)
    found["info_nce", "bank"] = value, (by_query, by_positive), (by_temperature, by_bank)
    return found


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize(("sizes", "tile"), [([5, 4], 2), ([3, 3, 3], 16), ([2, 6, 1], 3)])
def test_ranks_are_one_process(gloo, batch, expected, sizes, tile, exchange):
    arguments = [torch.tensor(value) for value in batch]
    results = gloo.run(len(sizes), engine_work.every_loss, *arguments, sizes, SCALE, BIAS, tile, exchange)
    for found in results:
        assert found.keys() == expected.keys()
        for name, (value, rows, averaged, own) in found.items():
            reference, by_rows, by_parameters = expected[name]
            assert value == pytest.approx(reference, rel=1e-10), name
            for ours, theirs in zip(rows, by_rows, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-11, err_msg=str(name))
            for ours, here, theirs in zip(averaged, own, by_parameters, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-11, err_msg=str(name))
                # whole on each rank already: clipping or a scale outside of DDP sees the same number everywhere
                np.testing.assert_allclose(here, theirs, rtol=1e-8, atol=1e-11, err_msg=str(name))


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_ranks_agree_where_no_shift_holds_all_scores(gloo, batch, exchange):
    """One rank's rows fit the window, another's do not: the choice is made together, or the sums would be nonsense."""
    image = batch[0]
    text = image.copy()
    text[5:] *= -1
    value, by_image, by_text, by_scale = oracle.clip(image, text, 100.0)
    for found, rows, (ours_scale,), _ in gloo.run(2, engine_work.steep, *map(torch.tensor, (image, text)),
                                                  [5, 4], 100.0, exchange):  # fmt: skip
        assert found == pytest.approx(value, rel=1e-5)
        for ours, theirs in zip(rows, (by_image, by_text), strict=True):
            np.testing.assert_allclose(ours / 1024, theirs, rtol=1e-3, atol=1e-5 * np.abs(theirs).max())
        assert ours_scale.item() / 1024 == pytest.approx(by_scale, rel=1e-5)


@pytest.mark.parametrize("sizes", [[2, 2], [1, 4, 2]])
def test_blocks_travel_the_ring_once_and_gradients_come_home(gloo, sizes):
    world = len(sizes)
    starts = [sum(sizes[:index]) for index in range(world)]
    for rank, (met, gradient) in enumerate(gloo.run(world, engine_work.ring, sizes)):
        assert [start for start, _ in met] == [starts[(rank - step) % world] for step in range(world)]
        for start, block in met:
            owner = starts.index(start)
            assert torch.equal(block, torch.full((sizes[owner], 2), float(owner)))
        assert torch.equal(gradient, torch.full((sizes[rank], 2), float(sum(range(1, world + 1)))))


def test_a_group_of_some_ranks(gloo, batch):
    image, text = (value[:8] for value in batch[:2])
    value, by_image, *_ = oracle.clip(image, text, SCALE)
    for results in gloo.run(3, engine_work.subgroups, torch.tensor(image), torch.tensor(text), SCALE):
        for found, gradient, first, last in results:
            assert found == pytest.approx(value, rel=1e-10)
            np.testing.assert_allclose(gradient, by_image[first:last], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("world", [2, 3])
def test_torchrun_with_uneven_ranks_is_one_process(world, tmp_path):
    """Under DDP every parameter, scale and bias too, has the oracle's gradient of the whole batch."""
    rng = np.random.default_rng(3)
    image, text = rng.normal(size=(2, N, D))
    into_image, into_text = rng.normal(size=(2, D, 4))
    ids = rng.integers(0, 6, size=(N, 1))
    weights = {"image": into_image, "text": into_text, "scale": np.array(SCALE), "bias": np.array(BIAS)}
    given = {"weights": {name: torch.tensor(value) for name, value in weights.items()}}
    given |= {"image": torch.tensor(image), "text": torch.tensor(text), "ids": torch.tensor(ids)}
    torch.save(given | {"sizes": {2: [6, 3], 3: [2, 6, 1]}}, tmp_path / "batch.pt")
    program = Path(__file__).with_name("engine_torchrun.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    done = subprocess.run(
        [*launch, program, tmp_path / "batch.pt", tmp_path / "found.pt"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    positives = oracle.positives_from_ids(ids.tolist())
    features = image @ into_image, text @ into_text
    clip, by_image, by_text, by_scale = oracle.clip(*features, SCALE, positives)
    siglip, also_image, also_text, also_scale, by_bias = oracle.siglip(*features, SCALE, BIAS, positives)
    expected = {
        "loss": clip + siglip,
        "image": image.T @ (by_image + also_image),
        "text": text.T @ (by_text + also_text),
        "scale": by_scale + also_scale,
        "bias": by_bias,
    }
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found.keys() == {"gather", "ring"}
    for exchange, values in found.items():
        assert values.keys() == expected.keys()
        for name, value in values.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-8, atol=1e-11, err_msg=f"{exchange} {name}")
