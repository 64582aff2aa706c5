"""Pair and triplet losses against oracles by nested loops, the inequalities of mining, finite gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import numeric
from oracles import pairs as oracle

from mllm_vision.functional import pairs
from mllm_vision.functional.pairs import batch_triplet, contrastive, mine_triplets, triplet, triplet_masks

cases = st.fixed_dictionaries(
    {
        "n": st.integers(2, 9),
        "d": st.integers(2, 4),
        "classes": st.integers(1, 4),
        "margin": st.floats(0.05, 3.0),
        "seed": st.integers(0, 2**16),
        "normalize": st.booleans(),
    }
)


def batch_of(case):
    rng = np.random.default_rng(case["seed"])
    return rng.normal(size=(case["n"], case["d"])), rng.integers(0, case["classes"], size=case["n"])


def leaves(arrays):
    return [torch.tensor(array, requires_grad=True) for array in arrays]


@settings(max_examples=40, deadline=None)
@given(cases)
def test_contrastive_is_the_oracle(case):
    rng = np.random.default_rng(case["seed"])
    arrays = rng.normal(size=(2, case["n"], case["d"]))
    y = rng.choice([0.0, 0.3, 1.0], size=case["n"])
    rows = leaves(arrays)
    loss = contrastive(*rows, torch.tensor(y), margin=case["margin"], scale=0.5)
    loss.backward()

    def reference(a, b):
        return 0.5 * oracle.contrastive(a, b, y, case["margin"])

    assert loss.item() == pytest.approx(reference(*arrays))
    numeric.check_gradients(rows, reference, arrays, rtol=1e-4, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(cases)
def test_triplet_is_the_oracle(case):
    arrays = np.random.default_rng(case["seed"]).normal(size=(3, case["n"], case["d"]))
    rows, options = leaves(arrays), {"margin": case["margin"], "normalize": case["normalize"]}
    loss = triplet(*rows, **options)
    loss.backward()
    assert loss.item() == pytest.approx(oracle.triplet(*arrays, **options))
    numeric.check_gradients(rows, lambda *x: oracle.triplet(*x, **options), arrays, rtol=1e-4, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(cases, st.sampled_from(pairs.STRATEGIES), st.sampled_from([1, 17, 2**22]))
def test_mined_triplets_and_their_loss_are_the_oracles(case, strategy, strip):
    x, labels = batch_of(case)
    options = {"margin": case["margin"], "strategy": strategy, "normalize": case["normalize"]}
    (rows,) = leaves([x])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "STRIP", strip)  # anchors in strips of one, of a few, or all at once
        mined = mine_triplets(torch.tensor(x), torch.tensor(labels), **options)
        loss, active = batch_triplet(rows, torch.tensor(labels), **options)
    assert list(zip(*(part.tolist() for part in mined), strict=True)) == sorted(oracle.mine(x, labels, **options)[0])
    loss.backward()
    value, fraction = oracle.batch(x, labels, **options)
    assert loss.item() == pytest.approx(value, abs=1e-12) and active.item() == pytest.approx(fraction)
    # the second path: the triplets listed, and differentiated by autograd
    if len(mined.anchor):
        again = leaves([x])[0]
        triplet(*(again[part] for part in mined), margin=case["margin"], normalize=case["normalize"]).backward()
        torch.testing.assert_close(rows.grad, again.grad)
    else:
        assert rows.grad.count_nonzero() == 0


def test_masks_are_these_inequalities_and_borders_belong_to_none():
    to_negative = torch.tensor([0.5, 1.0, 1.25, 1.5, 2.0])  # exact in binary
    masks = triplet_masks(torch.tensor(1.0), to_negative, margin=0.5)
    assert masks.hard.tolist() == [True, False, False, False, False]
    assert masks.semi_hard.tolist() == [False, False, True, False, False]
    assert masks.easy.tolist() == [False, False, False, False, True]
    grid = triplet_masks(torch.rand(30, 1), torch.rand(1, 40), margin=0.3)
    assert grid.easy.shape == (30, 40) and (sum(mask.int() for mask in grid) == 1).all()


def test_what_each_strategy_takes_is_of_its_kind():
    torch.manual_seed(0)
    x, labels = torch.randn(40, 8, dtype=torch.float64), torch.arange(40) % 5
    unit = torch.nn.functional.normalize(x, dim=1)
    kinds = {}
    for strategy in pairs.STRATEGIES:
        a, p, n = mine_triplets(x, labels, strategy=strategy)
        assert (labels[a] == labels[p]).all() and (labels[a] != labels[n]).all() and (a != p).all()
        to = [(unit[a] - unit[other]).square().sum(1) for other in (p, n)]
        kinds[strategy] = triplet_masks(*to)
    assert kinds["batch_semi_hard"].semi_hard.all()
    assert not kinds["batch_all"].easy.any()
    assert kinds["batch_all"].hard.any() and kinds["batch_all"].semi_hard.any()
    assert kinds["batch_hard"].hard.float().mean() > 0.9  # random features


@pytest.mark.parametrize("strategy", ["batch_all", "batch_hard"])
def test_collapsed_features_cost_the_margin(strategy):
    same = torch.ones(6, 4, requires_grad=True)
    loss, active = batch_triplet(same, torch.arange(6) % 2, margin=0.3, strategy=strategy)
    loss.backward()
    assert loss.item() == pytest.approx(0.3) and active.item() == 1
    assert same.grad.abs().max() < 1e-6


@pytest.mark.parametrize("strategy", pairs.STRATEGIES)
def test_order_and_length_of_rows_do_not_matter(strategy):
    torch.manual_seed(0)
    x, labels = torch.randn(24, 6, dtype=torch.float64), torch.arange(24) % 4
    loss, active = batch_triplet(x, labels, strategy=strategy)
    order = torch.randperm(24)
    for other, names in ((x[order], labels[order]), (5 * x, labels), (x, 7 - 3 * labels)):
        again = batch_triplet(other, names, strategy=strategy)
        torch.testing.assert_close(again[0], loss)
        assert again[1] == active


@pytest.mark.parametrize("strategy", pairs.STRATEGIES)
def test_an_offset_that_all_rows_share_costs_no_digits(strategy):
    """Distances of a tenth between rows of length 300: in fp32 the squares alone would leave two digits."""
    torch.manual_seed(0)
    x, labels = 0.1 * torch.randn(30, 9, dtype=torch.float64), torch.arange(30) % 5
    how = {"strategy": strategy, "normalize": False}
    value, active = batch_triplet(x, labels, **how)
    far = (x + 100).float().requires_grad_()
    loss, again = batch_triplet(far, labels, **how)
    assert loss.item() == pytest.approx(value.item(), rel=1e-4) and again.item() == pytest.approx(active.item())
    for ours, theirs in zip(mine_triplets(far, labels, **how), mine_triplets(x, labels, **how), strict=True):
        assert torch.equal(ours, theirs)
    loss.backward()
    near = x.requires_grad_()
    batch_triplet(near, labels, **how)[0].backward()
    torch.testing.assert_close(far.grad.double(), near.grad, rtol=1e-3, atol=1e-5)


def test_without_any_triplet_the_loss_is_zero():
    x = torch.randn(4, 3, requires_grad=True)
    for labels in (torch.zeros(4, dtype=torch.int64), torch.arange(4)):
        for strategy in pairs.STRATEGIES:
            loss, active = batch_triplet(x, labels, strategy=strategy)
            loss.backward()
            assert loss.item() == 0 and active.item() == 0 and x.grad.count_nonzero() == 0
            assert len(mine_triplets(x, labels, strategy=strategy).anchor) == 0


def test_gradients_stay_finite_where_rows_coincide():
    x = torch.ones(3, 2, requires_grad=True)
    loss = contrastive(x, torch.ones(3, 2), torch.tensor([True, False, True]), margin=2.0)
    loss.backward()
    assert loss.item() == pytest.approx(2 / 3 * 4) and x.grad.count_nonzero() == 0
    zero = torch.zeros(2, 3, requires_grad=True)  # no direction to normalise
    triplet(zero, zero, zero).backward()
    assert zero.grad.isfinite().all()


def test_half_precision_is_computed_in_fp32():
    x, labels = torch.randn(16, 4).bfloat16(), torch.arange(16) % 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [
            batch_triplet(x, labels)[0],
            triplet(x, x.flip(0), x.roll(1, 0)),
            contrastive(x, x.flip(0), labels > 0),
        ]
    x = x.float()
    alone = [batch_triplet(x, labels)[0], triplet(x, x.flip(0), x.roll(1, 0)), contrastive(x, x.flip(0), labels > 0)]
    torch.testing.assert_close(found, alone)


def test_what_is_refused():
    x, labels = torch.randn(4, 3), torch.arange(4) % 2
    with pytest.raises(ValueError, match=r"x1 and x2 must all be \[N, D\] .*\[4, 3\] and \[4, 2\]"):
        contrastive(x, torch.randn(4, 2), labels)
    with pytest.raises(ValueError, match=r"different must be \[4\]"):
        contrastive(x, x, labels[:3])
    with pytest.raises(ValueError, match="N > 0"):
        triplet(x[:0], x[:0], x[:0])
    for call in (lambda: triplet(x, x, x, margin=0), lambda: batch_triplet(x, labels, margin=0)):
        with pytest.raises(ValueError, match="margin=0 must be positive"):
            call()
    with pytest.raises(ValueError, match="strategy='hardest' must be one of 'batch_all'"):
        mine_triplets(x, labels, strategy="hardest")
    with pytest.raises(ValueError, match="labels integers"):
        batch_triplet(x, labels.float())
    loss, _ = batch_triplet(x.requires_grad_(), labels)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)
