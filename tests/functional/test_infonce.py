"""NT-Xent and InfoNCE against float64 oracles written from the papers, and values known without computing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import infonce as oracle

from mllm_vision.functional.image_text import clip_loss
from mllm_vision.functional.infonce import info_nce, mutual_information_bound, nt_xent

cases = st.fixed_dictionaries(
    {
        "n": st.integers(1, 9),
        "d": st.integers(2, 6),
        # the low ones leave the window within which sums of exponentials are held as they are
        "temperature": st.one_of(st.floats(0.01, 2.0), st.just(0.0004)),
        "tile": st.one_of(st.none(), st.integers(1, 11)),
        "seed": st.integers(0, 2**16),
        "negatives": st.sampled_from(["batch", "bank", "own"]),
        "k": st.integers(1, 5),
    }
)


def leaves(*values):
    return [None if v is None else torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]


def close(ours, reference, size=1.0):
    np.testing.assert_allclose(ours.detach().numpy(), reference, rtol=1e-8, atol=1e-10 * max(1.0, size))


@settings(max_examples=150, deadline=None)
@given(cases)
def test_nt_xent_and_gradients_are_the_oracles(case):
    rng = np.random.default_rng(case["seed"])
    z1, z2 = rng.normal(size=(2, case["n"], case["d"]))
    a, b, t = leaves(z1, z2, case["temperature"])
    loss = nt_xent(a, b, temperature=t, tile_size=case["tile"])
    loss.backward()
    value, by_first, by_second, by_temperature = oracle.nt_xent(z1, z2, case["temperature"])
    steep = 1 / case["temperature"]
    close(loss, value, steep)
    close(a.grad, by_first, steep)
    close(b.grad, by_second, steep)
    close(t.grad, by_temperature, steep**2)


@settings(max_examples=600, deadline=None)
@given(cases)
def test_info_nce_and_gradients_are_the_oracles(case):
    rng = np.random.default_rng(case["seed"])
    query, positive = rng.normal(size=(2, case["n"], case["d"]))
    shape = {"batch": None, "bank": (case["k"], case["d"]), "own": (case["n"], case["k"], case["d"])}
    negatives = None if shape[case["negatives"]] is None else rng.normal(size=shape[case["negatives"]])
    q, p, bank, t = leaves(query, positive, negatives, case["temperature"])
    loss = info_nce(q, p, bank, temperature=t, tile_size=case["tile"])
    loss.backward()
    value, *gradients, by_temperature = oracle.info_nce(query, positive, negatives, case["temperature"])
    steep = 1 / case["temperature"]
    close(loss, value, steep)
    for ours, reference in zip([q, p] if bank is None else [q, p, bank], gradients, strict=True):
        close(ours.grad, reference, steep)
    close(t.grad, by_temperature, steep**2)


def test_values_known_without_computing():
    same = torch.ones(6, 4, dtype=torch.float64)
    assert nt_xent(same, same).item() == pytest.approx(math.log(11))
    assert info_nce(same, same).item() == pytest.approx(math.log(6))
    assert info_nce(same, same, torch.ones(40, 4)).item() == pytest.approx(math.log(41))
    assert info_nce(same, same, torch.ones(6, 7, 4)).item() == pytest.approx(math.log(8))
    assert nt_xent(same[:1], same[:1]).item() == pytest.approx(0.0, abs=1e-12)  # the other view is all there is
    eye = torch.eye(8, dtype=torch.float64)
    assert nt_xent(eye, eye, temperature=1e-3).item() == pytest.approx(0.0, abs=1e-12)
    assert info_nce(eye, 100 * eye, temperature=1e-2, normalize=False).item() == pytest.approx(0.0, abs=1e-12)


def test_both_directions_of_info_nce_are_clip_loss():
    torch.manual_seed(0)
    a, b = torch.randn(2, 13, 5, dtype=torch.float64)
    halves = info_nce(a, b, temperature=0.2, tile_size=4) + info_nce(b, a, temperature=0.2, tile_size=5)
    torch.testing.assert_close(halves / 2, clip_loss(a, b, 5.0))


def test_the_bound_never_exceeds_the_logarithm_of_the_candidates():
    eye = torch.eye(16, dtype=torch.float64)
    bound = mutual_information_bound(info_nce(eye, eye), 15)
    assert bound == pytest.approx(math.log(16), abs=1e-4) and bound <= math.log(16)
    assert mutual_information_bound(math.log(16), 15) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="negatives=0"):
        mutual_information_bound(1.0, 0)


def test_a_bank_that_learns_and_one_that_does_not():
    torch.manual_seed(0)
    query, positive, bank = torch.randn(4, 3), torch.randn(4, 3), torch.randn(9, 3)
    info_nce(query.requires_grad_(), positive, bank, tile_size=2).backward()
    alone = query.grad.clone()
    query.grad = None
    info_nce(query, positive, bank.requires_grad_(), tile_size=2).backward()
    torch.testing.assert_close(query.grad, alone)
    assert bank.grad.abs().sum() > 0


def test_what_is_refused():
    a = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"z1 and z2 .*\[4, 3\] and \[4, 2\]"):
        nt_xent(a, torch.randn(4, 2))
    with pytest.raises(ValueError, match="N > 0"):
        info_nce(a[:0], a[:0])
    for shape in ((5, 2), (3, 5, 3), (0, 3), (4,)):
        with pytest.raises(ValueError, match=r"negatives must be \[K, D\]"):
            info_nce(a, a, torch.randn(shape))
    with pytest.raises(ValueError, match="temperature=0"):
        nt_xent(a, a, temperature=0)
    with pytest.raises(ValueError, match="tile_size=0"):
        nt_xent(a, a, tile_size=0)
    with pytest.raises(ValueError, match="exchange='star'"):
        info_nce(a, a, exchange="star")
    for loss in (nt_xent, info_nce):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss(a.requires_grad_(), a), a, create_graph=True)
