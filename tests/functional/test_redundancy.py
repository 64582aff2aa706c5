"""Barlow Twins and VICReg against float64 oracles written from the papers, and identities known without computing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import numeric
from oracles import redundancy as oracle

from mllm_vision.functional import redundancy
from mllm_vision.functional.redundancy import (
    barlow_twins,
    covariance_term,
    invariance_term,
    variance_term,
    vicreg,
)

LOSSES = {"barlow_twins": barlow_twins, "vicreg": vicreg}

# few rows by many dimensions is the other route to the same number: by rows instead of by dimensions
cases = st.fixed_dictionaries(
    {"n": st.integers(2, 7), "d": st.sampled_from([1, 2, 3, 5, 14]), "seed": st.integers(0, 2**16)}
)


def views(n, d, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, n, d)) * spread + rng.normal(size=d)


def compare(loss, reference, pair):
    leaves = [torch.tensor(z, requires_grad=True) for z in pair]
    value = loss(*leaves)
    value.backward()
    expected = reference(*pair)
    assert value.item() == pytest.approx(expected, rel=1e-9)
    numeric.check_gradients(leaves, reference, pair, rtol=1e-5, atol=1e-5 * max(1.0, abs(expected)))


@settings(max_examples=30, deadline=None)
@given(cases)
def test_barlow_twins_and_gradients_are_the_oracles(case):
    pair = views(**case)
    compare(
        lambda a, b: barlow_twins(a, b, lambd=0.03, eps=1e-3), lambda a, b: oracle.barlow_twins(a, b, 0.03, 1e-3), pair
    )


@settings(max_examples=30, deadline=None)
@given(cases)
def test_vicreg_and_gradients_are_the_oracles(case):
    pair = views(**case, spread=0.7)
    _, terms = vicreg(*map(torch.tensor, pair), return_terms=True)
    for ours, theirs in zip(terms, oracle.vicreg(*pair, 1e-4), strict=True):
        assert ours.item() == pytest.approx(theirs, rel=1e-9, abs=1e-12)

    def weighted(a, b):
        invariance, variance, covariance = oracle.vicreg(a, b, 1e-4)
        return 25 * invariance + 25 * variance + covariance

    compare(vicreg, weighted, pair)


def test_both_routes_to_the_squares_agree_where_either_may_be_taken():
    """The same rows, padded with dimensions that add nothing: the route changes, the number does not."""
    torch.manual_seed(0)
    z = torch.randn(6, 5, dtype=torch.float64)
    wide = torch.cat([z, torch.zeros(6, 10, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(covariance_term(wide) * 15, covariance_term(z) * 5)
    other = torch.cat([z.flip(0), torch.zeros(6, 10, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(barlow_twins(wide, other) - 10, barlow_twins(z, z.flip(0)))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(9, 6), (5, 14)])  # by dimensions, by rows
def test_strips_of_any_height_give_the_same(name, shape, monkeypatch):
    loss, pair, found = LOSSES[name], views(*shape), []
    for strip in (1, 30, 10**6):
        monkeypatch.setattr(redundancy, "STRIP", strip)
        rows = [torch.tensor(z, requires_grad=True) for z in pair]
        value = loss(*rows)
        value.backward()
        found.append([value.detach(), *(row.grad for row in rows)])
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])
    assert not loss(*map(torch.tensor, pair)).requires_grad


def test_barlow_twins_does_not_see_scale_and_shift():
    x, y = torch.tensor(views(40, 6))
    same = barlow_twins(x, x, eps=0.0)
    torch.testing.assert_close(same, barlow_twins(x, 2 * x + 4, eps=0.0))
    torch.testing.assert_close(barlow_twins(x, y, eps=0.0), barlow_twins(-3 * x + 1, -0.1 * y, eps=0.0))
    torch.testing.assert_close(barlow_twins(x, y), barlow_twins(x, 2 * y + 4), rtol=1e-4, atol=1e-4)
    # independent dimensions that agree over the views: nothing left to lose
    orthogonal = torch.linalg.qr(x - x.mean(0)).Q
    assert barlow_twins(orthogonal, orthogonal, eps=0.0).item() == pytest.approx(0, abs=1e-20)


def test_collapse_is_worth_what_the_docstrings_say():
    same = torch.ones(8, 4, requires_grad=True)
    for loss, value in ((barlow_twins, 4.0), (vicreg, 25 * 0.99)):
        result = loss(same, same)
        assert result.item() == pytest.approx(value, rel=1e-6)
        result.backward()
        assert same.grad.isfinite().all()
    assert variance_term(same).item() == pytest.approx(0.99) and covariance_term(same).item() == 0
    assert invariance_term(same, same + 3).item() == pytest.approx(9)
    # one direction only, wide: variance is content, covariance is not
    line = torch.linspace(-10, 10, 8)[:, None].expand(8, 4)
    assert variance_term(line).item() == 0 and covariance_term(line).item() > 1


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(9, 4), (3, 12)])
def test_order_of_rows_dimensions_and_views_does_not_matter(name, shape):
    loss = LOSSES[name]
    a, b = torch.tensor(views(*shape))
    value = loss(a, b)
    rows, columns = torch.randperm(shape[0]), torch.randperm(shape[1])
    torch.testing.assert_close(loss(a[rows], b[rows]), value)
    torch.testing.assert_close(loss(a[:, columns], b[:, columns]), value)
    torch.testing.assert_close(loss(b, a), value)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_fp32(name):
    loss = LOSSES[name]
    a, b = torch.tensor(views(16, 6)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(a, b)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(a.float(), b.float()))


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_refused(name):
    loss, z = LOSSES[name], torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"\[4, 3\] and \[4, 2\]"):
        loss(z, torch.randn(4, 2))
    with pytest.raises(ValueError, match="N > 0"):
        loss(z[:0], z[:0])
    with pytest.raises(ValueError, match="a batch of 1 row"):
        loss(z[:1], z[:1])
    with pytest.raises(ValueError, match="eps=-1"):
        loss(z, z, eps=-1)
    with pytest.raises(ValueError, match="lambd=-1"):
        barlow_twins(z, z, lambd=-1)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss(z.requires_grad_(), z), z, create_graph=True)
