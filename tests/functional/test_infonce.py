"""NT-Xent and InfoNCE against float64 oracles written from the papers, and values known without computing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import infonce as oracle
from oracles import numeric

from mllm_vision.functional.image_text import clip_loss
from mllm_vision.functional.infonce import dcl, info_nce, mutual_information_bound, nt_xent, sup_con

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


def compare(loss, reference, arrays, temperature):
    """Value and gradients, the temperature's too, with those of an oracle by central differences."""
    *rows, t = leaves(*arrays, temperature)
    value = loss(*rows, t)
    value.backward()
    close(value, reference(*arrays, temperature), 1 / temperature)
    numeric.check_gradients([*rows, t], reference, [*arrays, temperature], rtol=1e-4, atol=1e-5 / temperature**2)


small = st.fixed_dictionaries(
    {
        "n": st.integers(2, 5),
        "d": st.integers(2, 4),
        # at the lower end scores leave the window within which sums of exponentials are held as they are
        "temperature": st.one_of(st.floats(0.05, 2.0), st.floats(0.005, 0.012)),
        "tile": st.one_of(st.none(), st.integers(1, 6)),
        "seed": st.integers(0, 2**16),
    }
)


@settings(max_examples=40, deadline=None)
@given(small, st.sampled_from([None, 0.5]))
def test_dcl_and_gradients_are_the_oracles(case, sigma):
    pair = np.random.default_rng(case["seed"]).normal(size=(2, case["n"], case["d"]))
    compare(
        lambda a, b, t: dcl(a, b, temperature=t, sigma=sigma, tile_size=case["tile"]),
        lambda a, b, t: oracle.dcl(a, b, t, sigma),
        pair,
        case["temperature"],
    )


@pytest.mark.parametrize(("length", "sigma"), [(1.0, 0.005), (30.0, 0.5)])
def test_weights_of_dcl_do_not_overflow(length, sigma):
    """Exponentials of 200 and of 1800 over the positives' scores, in fp32; their shares are all that counts."""
    pair = np.random.default_rng(0).normal(size=(2, 6, 4))
    pair[1] = pair[0] + 0.3 * pair[1]
    a, b = (length * F.normalize(torch.tensor(part), dim=1) for part in pair)
    exact = dcl(a, b, sigma=sigma, normalize=length == 1)
    scores = (a * b).sum(1)
    weights = 2 - 6 * (scores / sigma).softmax(0)
    expected = dcl(a, b, normalize=length == 1) + ((1 - weights) * scores / 0.1).mean()
    torch.testing.assert_close(exact, expected)
    single = [part.float().requires_grad_() for part in (a, b)]
    loss = dcl(*single, sigma=sigma, normalize=length == 1)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert all(part.grad.isfinite().all() for part in single)


@settings(max_examples=40, deadline=None)
@given(small, st.integers(1, 3), st.integers(1, 4))
def test_sup_con_and_gradients_are_the_oracles(case, views, classes):
    rng = np.random.default_rng(case["seed"])
    labels = rng.integers(0, classes, size=case["n"])
    compare(
        lambda x, t: sup_con(x, torch.tensor(labels), temperature=t, tile_size=case["tile"]),
        lambda x, t: oracle.sup_con(x, labels, t),
        [rng.normal(size=(case["n"], views, case["d"]))],
        case["temperature"],
    )


def test_dcl_is_nt_xent_without_the_positive_below():
    """exp(-L) of NT-Xent and of DCL per view: 1/p - 1 = exp(DCL), which a sample of its own size shows."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 2, 3, dtype=torch.float64)
    a[1], b[1] = a[0], b[0]  # two samples alike: every view has the same loss, so means are values
    b = a.clone()
    whole, decoupled = nt_xent(a, b, temperature=0.3), dcl(a, b, temperature=0.3)
    torch.testing.assert_close(whole, torch.log1p(decoupled.exp()))


def test_sup_con_without_labels_is_nt_xent():
    torch.manual_seed(0)
    a, b = torch.randn(2, 7, 5, dtype=torch.float64)
    expected = nt_xent(a, b, temperature=0.2)
    torch.testing.assert_close(sup_con(torch.stack([a, b], 1), None, temperature=0.2), expected)
    torch.testing.assert_close(sup_con(torch.stack([b, a], 1), torch.arange(7), temperature=0.2), expected)
    with_names = sup_con(torch.stack([a, b], 1), torch.tensor([3, 3, 3, -1, -1, 9, 0]), temperature=0.2)
    assert with_names > expected  # more positives to agree with, among the same random views


@pytest.mark.parametrize("loss", [nt_xent, dcl])
def test_rows_may_be_permuted_views_swapped_and_lengths_changed(loss):
    torch.manual_seed(0)
    a, b = torch.randn(2, 8, 5, dtype=torch.float64)
    order = torch.randperm(8)
    for other in (loss(a[order], b[order]), loss(b, a), loss(3 * a, 0.1 * b)):
        torch.testing.assert_close(other, loss(a, b))


def test_values_known_without_computing():
    same = torch.ones(6, 4, dtype=torch.float64)
    assert nt_xent(same, same).item() == pytest.approx(math.log(11))
    assert dcl(same, same).item() == pytest.approx(math.log(10))
    assert dcl(same, same, sigma=0.5).item() == pytest.approx(math.log(10))
    for labels in ([0, 0, 1, 1, 1, 2], [5] * 6):
        assert sup_con(same.view(3, 2, 4), torch.tensor(labels[:3])).item() == pytest.approx(math.log(5))
        assert sup_con(same.view(6, 1, 4), torch.tensor([5] * 6)).item() == pytest.approx(math.log(5))
    assert sup_con(same.view(6, 1, 4), torch.arange(6)).item() == 0  # nobody has a positive
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


@settings(max_examples=30, deadline=None)
@given(small, st.integers(1, 6))
def test_no_rows_take_the_bound_above_the_logarithm_of_the_candidates(case, k):
    """K - 1 negatives of the batch or 2N - 2 of NT-Xent, and K of a bank or of a query's own."""
    n, d = case["n"], case["d"]
    generator = torch.Generator().manual_seed(case["seed"])
    a, b = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    bank = torch.randn(n, k, d, generator=generator, dtype=torch.float64)
    how = {"temperature": case["temperature"], "tile_size": case["tile"]}
    for loss, negatives in (
        (nt_xent(a, b, **how), 2 * n - 2),
        (info_nce(a, b, **how), n - 1),
        (info_nce(a, b, bank[0], **how), k),
        (info_nce(a, b, bank, **how), k),
    ):
        assert mutual_information_bound(loss, negatives) <= math.log(negatives + 1) + 1e-12


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
    with pytest.raises(ValueError, match="no negatives: the batch of all ranks has 2 views"):
        dcl(a[:1], a[:1])
    with pytest.raises(ValueError, match="sigma=0"):
        dcl(a, a, sigma=0)
    with pytest.raises(ValueError, match="no other view"):
        sup_con(torch.randn(1, 1, 3), None)
    with pytest.raises(ValueError, match=r"features must be \[N, V, D\]"):
        sup_con(a, torch.arange(4))
    with pytest.raises(ValueError, match=r"labels must be integers \[2\]"):
        sup_con(torch.randn(2, 2, 3), torch.arange(4))
    for loss in (nt_xent, info_nce, dcl):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss(a.requires_grad_(), a), a, create_graph=True)
