"""The teacher-student losses against float64 oracles written from the papers, and values known without computing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import distillation as oracle
from oracles import numeric

from mllm_vision.functional.distillation import (
    centred_softmax,
    dino_loss,
    ibot_loss,
    koleo,
    negative_cosine,
    sinkhorn_knopp,
)

seeds = st.integers(0, 2**16)


def distributions(rng, *shape):
    e = np.exp(rng.normal(size=shape) * 2)
    return e / e.sum(-1, keepdims=True)


def compare(loss, reference, *arrays):
    """Value and gradients by each array against the oracle's, the gradients by central differences."""
    leaves = [torch.tensor(array, requires_grad=True) for array in arrays]
    value = loss(*leaves)
    value.backward()
    assert value.item() == pytest.approx(reference(*arrays), rel=1e-9, abs=1e-12)
    numeric.check_gradients(leaves, reference, arrays, rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), seeds)
def test_negative_cosine_is_byols_and_simsiams(n, d, seed):
    rng = np.random.default_rng(seed)
    p, z = rng.normal(size=(2, n, d))
    both = lambda a, b: 2 + 2 * negative_cosine(a, b, stop_gradient=False)
    compare(both, oracle.byol, p, z)
    first, second = (torch.tensor(x, requires_grad=True) for x in (p, z))
    negative_cosine(first, second).backward()
    assert second.grad is None and first.grad is not None


def test_both_directions_are_byols_distances_and_simsiams_cosines():
    rng = np.random.default_rng(0)
    p1, p2, z1, z2 = (torch.tensor(rows) for rows in rng.normal(size=(4, 5, 3)))
    both = negative_cosine(p1, z2) + negative_cosine(p2, z1)
    byol = oracle.byol(p1.numpy(), z2.numpy()) + oracle.byol(p2.numpy(), z1.numpy())
    assert 4 + 2 * both.item() == pytest.approx(byol)
    cosines = torch.cosine_similarity(p1, z2).mean() + torch.cosine_similarity(p2, z1).mean()
    assert both.item() / 2 == pytest.approx(-0.5 * cosines.item())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(2, 5), st.integers(1, 2), st.integers(2, 6), st.floats(0.05, 1.0), seeds)
def test_dino_and_its_gradient_are_the_oracles(n, views, seen, k, temperature, seed):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(n, views, k)), distributions(rng, n, seen, k)
    compare(
        lambda s: dino_loss(s, torch.tensor(teacher), temperature=temperature),
        lambda s: oracle.dino(s, teacher, temperature),
        student,
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 5), seeds)
def test_ibot_of_all_patches_and_of_the_masked_ones_are_the_oracles(n, patches, k, seed):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(n, patches, k)), distributions(rng, n, patches, k)
    mask = rng.random((n, patches)) < 0.5
    chosen = torch.tensor(mask)

    def packed(s):
        return ibot_loss(s[chosen], torch.tensor(teacher)[chosen], chosen, temperature=0.2)

    def whole(s):
        return ibot_loss(s, torch.tensor(teacher), chosen, temperature=0.2)

    for loss in (whole, packed):
        compare(loss, lambda s: oracle.ibot(s, teacher, mask, 0.2), student)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(1, 6), st.integers(1, 4), st.floats(0.05, 1.0), seeds)
def test_sinkhorn_is_swavs(n, k, iterations, temperature, seed):
    logits = np.random.default_rng(seed).uniform(-1, 1, size=(n, k))
    found = sinkhorn_knopp(torch.tensor(logits), temperature=temperature, iterations=iterations)
    np.testing.assert_allclose(found, oracle.sinkhorn(logits, temperature, iterations), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(found.sum(1), 1.0)


def test_sinkhorn_balances_the_outputs_and_survives_any_temperature():
    torch.manual_seed(0)
    found = sinkhorn_knopp(torch.randn(64, 8).clamp(-1, 1), temperature=0.3, iterations=60)
    torch.testing.assert_close(found.sum(0), torch.full((8,), 8.0), rtol=1e-4, atol=1e-4)
    steep = sinkhorn_knopp(torch.randn(16, 6) * 100, temperature=0.01)
    assert steep.isfinite().all()
    torch.testing.assert_close(steep.sum(1), torch.ones(16))
    assert sinkhorn_knopp(torch.empty(0, 4), temperature=0.1).shape == (0, 4)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(2, 5), st.sampled_from([None, 1, 3]), seeds)
def test_koleo_and_its_gradient_are_the_oracles(n, d, tile, seed):
    features = np.random.default_rng(seed).normal(size=(n, d))
    cosines = oracle.cosines(features)
    gaps = np.diff(np.sort(cosines, axis=1)[:, -3:-1], axis=1) if n > 2 else np.ones(1)
    assume(np.sort(cosines, axis=1)[:, -2].max() < 0.999 and gaps.min() > 1e-4)  # where differences can measure it
    compare(lambda x: koleo(x, tile_size=tile), oracle.koleo, features)


def test_koleo_finds_neighbours_among_rows_that_have_nearly_collapsed():
    """Where it is needed most: cosines that differ by 1e-7 in fp32, distances that differ by tenths."""
    features = 5 + 0.01 * torch.randn(60, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact, single = features.requires_grad_(), features.detach().float().requires_grad_()
    losses = koleo(exact, tile_size=7), koleo(single, tile_size=7)
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-4)
    assert (single.grad - exact.grad).norm() < 1e-2 * exact.grad.norm()


def test_values_known_without_computing():
    assert koleo(torch.tensor([[1.0]])).item() == pytest.approx(17.7275, abs=1e-4)
    pair = torch.tensor([[2.0, 0.0, 0.0], [-5.0, 0.0, 0.0]])
    assert koleo(pair).item() == pytest.approx(-math.log(2), abs=1e-6)
    assert negative_cosine(pair, 3 * pair).item() == pytest.approx(-1.0)
    assert negative_cosine(pair, -pair).item() == pytest.approx(1.0)
    # a teacher that always names one output, and a student that agrees: nothing left; uniform ones: ln K
    logits = torch.zeros(3, 4, 16)
    sure = torch.zeros(3, 2, 16)
    sure[..., 5] = 1.0
    assert dino_loss(logits + 9 * sure[:, :1], sure).item() == pytest.approx(0.0, abs=1e-6)
    assert dino_loss(logits, torch.full((3, 2, 16), 1 / 16)).item() == pytest.approx(math.log(16), rel=1e-6)
    assert ibot_loss(logits, sure[:, :1].expand(3, 4, 16), torch.zeros(3, 4, dtype=torch.bool)).item() == 0.0


def test_dino_leaves_out_the_pairs_of_a_view_with_itself():
    """With one teacher view and two of the student the first of the student's gets no gradient."""
    student = torch.randn(5, 2, 7, requires_grad=True)
    dino_loss(student, torch.randn(5, 1, 7).softmax(-1)).backward()
    assert not student.grad[:, 0].any() and student.grad[:, 1].any()


def test_permuting_samples_outputs_and_views_changes_nothing():
    torch.manual_seed(1)
    student, teacher = torch.randn(6, 2, 9, dtype=torch.float64), torch.randn(6, 2, 9, dtype=torch.float64).softmax(-1)
    value = dino_loss(student, teacher)
    rows, outputs = torch.randperm(6), torch.randperm(9)
    torch.testing.assert_close(dino_loss(student[rows], teacher[rows]), value)
    torch.testing.assert_close(dino_loss(student[..., outputs], teacher[..., outputs]), value)
    torch.testing.assert_close(dino_loss(student.flip(1), teacher.flip(1)), value)
    torch.testing.assert_close(dino_loss(student + 4.0, teacher), value)  # a softmax does not see a shift
    features = student.flatten(1)
    scaled = features * torch.rand(6, 1, dtype=torch.float64).add(0.1)
    torch.testing.assert_close(koleo(scaled[rows]), koleo(features))
    torch.testing.assert_close(negative_cosine(scaled, features), negative_cosine(features, features))


def test_the_teachers_softmax_is_centred_and_sharpened():
    logits = torch.tensor([[3.0, 1.0, 1.5], [3.0, 2.0, 1.0]])
    bare = centred_softmax(logits, torch.zeros(3), temperature=0.05)
    centred = centred_softmax(logits, logits.mean(0), temperature=0.05)
    assert bare.argmax(1).tolist() == [0, 0] and centred.argmax(1).tolist() == [2, 1]
    assert bare[:, 0].min() > 0.999 and centred.max(1).values.min() > 0.99  # sharp, in either case
    flat = centred_softmax(logits, logits.mean(0), temperature=50.0)
    torch.testing.assert_close(flat, torch.full((2, 3), 1 / 3), atol=0.01, rtol=0)


def test_half_precision_is_computed_in_fp32():
    torch.manual_seed(2)
    student, teacher = torch.randn(4, 3, 32), torch.randn(4, 2, 32).softmax(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [dino_loss(student.bfloat16(), teacher), koleo(student[:, 0].bfloat16())]
        losses += [negative_cosine(student[:, 0].bfloat16(), student[:, 1])]
        taught = sinkhorn_knopp(student[:, 0].bfloat16(), temperature=0.07)
    assert {value.dtype for value in (*losses, taught)} == {torch.float32}
    assert losses[0].item() == pytest.approx(dino_loss(student.bfloat16().float(), teacher).item(), rel=1e-6)


def test_gradients_stay_finite_where_features_collapse():
    same = torch.ones(4, 8, requires_grad=True)
    (koleo(same) + negative_cosine(same, same)).backward()
    assert same.grad.isfinite().all()
    zero = torch.zeros(3, 5, requires_grad=True)
    negative_cosine(zero, torch.randn(3, 5)).backward()
    assert zero.grad.isfinite().all()


def test_what_is_refused():
    rows = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"\[4, 3\] and \[4, 2\]"):
        negative_cosine(rows, torch.randn(4, 2))
    with pytest.raises(ValueError, match="give two"):
        dino_loss(rows[:, None], rows[:, None].softmax(-1))
    with pytest.raises(ValueError, match="G <= V"):
        dino_loss(torch.randn(4, 2, 3), torch.randn(4, 3, 3))
    with pytest.raises(ValueError, match="temperature=0"):
        dino_loss(torch.randn(4, 2, 3), torch.randn(4, 2, 3), temperature=0)
    with pytest.raises(ValueError, match="bool"):
        ibot_loss(torch.randn(2, 4, 3), torch.randn(2, 4, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"\[3, K\] of the masked"):
        mask = torch.tensor([[True, True, False], [False, False, True]])
        ibot_loss(torch.randn(2, 5), torch.randn(2, 5), mask)
    with pytest.raises(ValueError, match=r"centre must be \[3\]"):
        centred_softmax(rows, torch.zeros(4), temperature=0.1)
    with pytest.raises(ValueError, match="iterations=0"):
        sinkhorn_knopp(rows, temperature=0.1, iterations=0)
    with pytest.raises(ValueError, match="N > 0"):
        koleo(rows[:0])
