"""Several ranks agree with one: collectives, losses with gradients, objectives trained under DDP."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import work
from oracles import image_text as oracle

from mllm_vision import distributed


def test_one_process_is_the_identity():
    rows = torch.randn(3, 2, requires_grad=True)
    assert distributed.all_gather_with_grad(rows) is rows
    assert not distributed.all_gather(rows).requires_grad
    assert (distributed.world_size(), distributed.rank(), distributed.row_counts(rows)) == (1, 0, [3])
    assert distributed.mean_over_ranks({"a": torch.tensor(2.0)})["a"].item() == 2.0


@pytest.mark.parametrize("sizes", [[2, 2], [1, 3, 2]])
def test_collectives(gloo, sizes):
    world = len(sizes)
    results = gloo.run(world, work.collectives, sizes)
    expected = torch.cat([torch.full((n, 2), float(r + 1)) for r, n in enumerate(sizes)])
    weights = torch.arange(expected.numel(), dtype=torch.float32).view_as(expected)
    for rank, found in enumerate(results):
        assert torch.equal(found["gathered"], expected)
        # every rank's loss weighs the rows by rank + 1: the owner receives the sum over the ranks' losses
        start = sum(sizes[:rank])
        total = sum(range(1, world + 1))
        torch.testing.assert_close(found["gradient"], weights[start : start + sizes[rank]] * total)
        assert found["ids"].tolist() == [r for r, n in enumerate(sizes) for _ in range(n)]
        assert found["counts"] == sizes and found["world"] == world
        assert found["mean"] == {"a": 1.0, "b": (world - 1) / 2}
        assert found["deprecated"] == []


def test_a_torch_without_the_new_names_is_asked_by_the_old_ones(monkeypatch):
    monkeypatch.delattr(torch.distributed, "all_gather_single", raising=False)
    found = distributed._collective("all_gather_single", "all_gather_into_tensor")
    assert found is torch.distributed.all_gather_into_tensor


@pytest.mark.parametrize("sizes", [[4, 4], [2, 5, 1]])
def test_losses_over_ranks_are_the_oracles_of_the_whole_batch(gloo, sizes):
    rng = np.random.default_rng(1)
    image, text = rng.normal(size=(8, 5)), rng.normal(size=(8, 5))
    ids = rng.integers(0, 5, size=(8, 2))
    dense = np.clip(rng.random((8, 8)), 0.05, 1)
    scale, bias = 14.3, -3.0
    arguments = [torch.tensor(value) for value in (image, text, ids, dense)]
    results = gloo.run(len(sizes), work.losses, *arguments, sizes, scale, bias)
    matrices = {"none": None, "ids": oracle.positives_from_ids(ids.tolist()), "dense": dense}
    for found in results:
        for (name, kind), (loss, by_image, by_text, parameters) in found.items():
            if kind == "clip":
                value, d_image, d_text, d_scale = oracle.clip(image, text, scale, matrices[name])
            else:
                value, d_image, d_text, d_scale, d_bias = oracle.siglip(image, text, scale, bias, matrices[name])
                assert parameters["bias"].item() == pytest.approx(d_bias, rel=1e-8)
            assert loss == pytest.approx(value, rel=1e-9)
            np.testing.assert_allclose(by_image, d_image, rtol=1e-7, atol=1e-10)
            np.testing.assert_allclose(by_text, d_text, rtol=1e-7, atol=1e-10)
            assert parameters["scale"].item() == pytest.approx(d_scale, rel=1e-8)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_an_objective_under_ddp_trains_as_on_one_rank(gloo, kind):
    alone, parameters = work.objective_steps(kind, 1)
    for seen, found in gloo.run(2, work.objective_steps, kind, 2):
        for (loss, metrics), (expected, expected_metrics) in zip(seen, alone, strict=True):
            assert loss == pytest.approx(expected, rel=1e-5)
            # diagnostics of a rank's own rows (how they spread, what the sigmoid predicts among them) have no such law
            rows = {name for name in metrics if name.endswith(("_spread", "_rank", "positives"))}
            assert metrics.keys() == expected_metrics.keys() >= rows | {"logit_scale", "positive_similarity"}
            for name in metrics.keys() - rows:
                assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-4, abs=1e-6), name
        for name, value in parameters.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
