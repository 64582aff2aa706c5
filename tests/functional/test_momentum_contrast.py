"""The loss against momentum features and a queue: values and gradients against the oracle, tiles, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import momentum as oracle

from mllm_vision.functional.momentum_contrast import momentum_contrast


def case(seed, n, k, width, id_range, columns=2):
    rng = np.random.default_rng(seed)
    rows = {name: rng.normal(size=(n, width)) for name in ("image", "text", "image_momentum", "text_momentum")}
    queues = {name: oracle.unit(rng.normal(size=(k, width))) for name in ("image_queue", "text_queue")}
    ids = rng.integers(-1, id_range, size=(n, columns))
    queue_ids = rng.integers(-1, id_range, size=(k, columns))
    return rows, queues, ids, queue_ids


def tensors(values, dtype=torch.float64):
    return {name: torch.tensor(value, dtype=dtype) for name, value in values.items()}


def run(rows, queues, ids, queue_ids, scale, alpha, dtype=torch.float64, **settings):
    given = tensors(rows, dtype) | tensors(queues, dtype)
    for name in ("image", "text"):
        given[name].requires_grad_()
    scale = torch.tensor(scale, dtype=dtype, requires_grad=True)
    more = {} if ids is None else {"ids": torch.tensor(ids), "queue_ids": torch.tensor(queue_ids)}
    loss = momentum_contrast(logit_scale=scale, alpha=alpha, **given, **more, **settings)
    loss.backward()
    return {"loss": loss.detach(), "image": given["image"].grad, "text": given["text"].grad, "scale": scale.grad}


def expect(rows, queues, own, scale, alpha):
    return oracle.itc(
        rows["image"], rows["text"], rows["image_momentum"], rows["text_momentum"], scale, alpha,
        list(queues["image_queue"]), list(queues["text_queue"]), own,
    )  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6), n=st.integers(1, 7), k=st.integers(0, 9), width=st.integers(1, 6),
    id_range=st.integers(1, 12), scale=st.floats(0.5, 100), alpha=st.sampled_from([0.0, 0.4, 1.0]),
    tile=st.sampled_from([None, 1, 2, 5]), columns=st.integers(1, 3),
)  # fmt: skip
def test_value_and_gradients_are_the_oracles(seed, n, k, width, id_range, scale, alpha, tile, columns):
    rows, queues, ids, queue_ids = case(seed, n, k, width, id_range, columns)
    found = run(rows, queues, ids, queue_ids, scale, alpha, tile_size=tile)
    own = oracle.positives(ids.tolist(), queue_ids.tolist())
    expected = expect(rows, queues, own, scale, alpha)
    for name, value in found.items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-7, atol=1e-9, err_msg=name)


def test_the_papers_kl_differs_by_a_constant_only():
    """Equation 6 is a divergence, the code's form a cross-entropy: equal up to the targets' entropy."""
    rows, queues, ids, queue_ids = case(3, 5, 4, 4, 6)
    own = oracle.positives(ids.tolist(), queue_ids.tolist())
    one = expect(rows, queues, own, 5.0, 0.4)
    rows["image"] = rows["image"] + 0.1 * np.random.default_rng(0).normal(size=rows["image"].shape)
    two = expect(rows, queues, own, 5.0, 0.4)
    assert one["loss"] != pytest.approx(one["paper"])
    assert two["loss"] - one["loss"] == pytest.approx(two["paper"] - one["paper"])


def test_the_oracles_gradients_are_numerical_gradients():
    rows, queues, ids, queue_ids = case(5, 3, 4, 3, 4)
    own = oracle.positives(ids.tolist(), queue_ids.tolist())
    base, step = expect(rows, queues, own, 3.0, 0.4), 1e-6
    for name in ("image", "text"):
        moved = {key: value.copy() for key, value in rows.items()}
        moved[name][1, 2] += step
        difference = (expect(moved, queues, own, 3.0, 0.4)["loss"] - base["loss"]) / step
        # the momentum features stay where they are: only the student's logits move
        assert difference == pytest.approx(base[name][1, 2], rel=1e-4)


def test_the_scale_of_the_targets_takes_no_gradient():
    rows, queues, ids, queue_ids = case(5, 3, 4, 3, 4)
    own = oracle.positives(ids.tolist(), queue_ids.tolist())
    found = run(rows, queues, ids, queue_ids, 3.0, 0.4)
    step = 1e-5
    both = [expect(rows, queues, own, 3.0 + sign * step, 0.4)["loss"] for sign in (1, -1)]
    total = (both[0] - both[1]) / (2 * step)  # targets move too
    assert found["scale"].item() == pytest.approx(expect(rows, queues, own, 3.0, 0.4)["scale"])
    assert abs(found["scale"].item() - total) > 1e-3


def test_without_ids_only_the_own_column_is_positive():
    rows, queues, _, _ = case(1, 4, 3, 5, 2)
    found = run(rows, queues, None, None, 10.0, 0.4)
    assert found["loss"].item() == pytest.approx(expect(rows, queues, [[i] for i in range(4)], 10.0, 0.4)["loss"])


def test_half_precision_is_computed_in_fp32_and_extremes_stay_finite():
    rows, queues, ids, queue_ids = case(2, 6, 8, 16, 5)
    own = oracle.positives(ids.tolist(), queue_ids.tolist())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = run(rows, queues, ids, queue_ids, 100.0, 0.4, dtype=torch.float32)
    assert single["loss"].item() == pytest.approx(expect(rows, queues, own, 100.0, 0.4)["loss"], rel=1e-5)
    for dtype, factor in ((torch.bfloat16, 1e30), (torch.float16, 1e4), (torch.bfloat16, 1e-30)):
        scaled = {name: value * factor for name, value in rows.items()}
        found = run(scaled, queues, ids, queue_ids, 1000.0, 0.4, dtype=dtype)
        assert found["loss"].dtype == torch.float32
        assert all(torch.isfinite(value).all() for value in found.values())


def test_no_tile_grows_with_the_batch(monkeypatch):
    """The logits of a tile are the largest tensors, and they are bounded whatever N is."""
    from mllm_vision.functional import momentum_contrast as module

    seen = []
    original = module._logits
    monkeypatch.setattr(module, "_TILE_ELEMENTS", 4096)
    monkeypatch.setattr(module, "_logits", lambda *given: seen.append(original(*given)) or seen[-1])
    rows, queues, ids, queue_ids = case(2, 96, 160, 4, 5)
    run(rows, queues, ids, queue_ids, 10.0, 0.4)
    assert len(seen) == 4 * 6 and max(value.numel() for value in seen) <= 4096


def test_no_gradient_is_computed_where_none_is_asked_and_none_of_the_gradient_is_offered():
    rows = tensors(case(0, 3, 0, 4, 3)[0])
    assert not momentum_contrast(**rows, logit_scale=2.0).requires_grad
    rows["image"].requires_grad_()
    loss = momentum_contrast(**rows, logit_scale=2.0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, rows["image"], create_graph=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text": torch.ones(2, 4)}, r"must all be \[N, D\]"),
        ({"alpha": 1.5}, "alpha=1.5 is not between"),
        ({"tile_size": 0}, "tile_size=0 must be at least 1"),
        ({"image_queue": torch.ones(2, 4)}, "given together"),
        ({"image_queue": torch.ones(2, 4), "text_queue": torch.ones(3, 4)}, r"both queues must be \[K, 4\]"),
        ({"ids": torch.ones(3, 1)}, r"ids must be integers \[3\]"),
        ({"queue_ids": torch.ones(3, dtype=torch.int64)}, "requires ids and queues"),
        (
            {
                "image_queue": torch.ones(2, 4), "text_queue": torch.ones(2, 4),
                "ids": torch.ones(3, 2, dtype=torch.int64), "queue_ids": torch.ones(2, dtype=torch.int64),
            },
            r"queue_ids must be \[2, 2\]",
        ),
    ],
)  # fmt: skip
def test_errors_name_the_values(changed, message):
    given = {name: torch.ones(3, 4) for name in ("image", "text", "image_momentum", "text_momentum")} | changed
    with pytest.raises(ValueError, match=message):
        momentum_contrast(logit_scale=2.0, **given)
