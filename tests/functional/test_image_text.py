"""The losses against float64 oracles written from the papers, and identities they must keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import image_text as oracle

from mllm_vision.functional.engine import targets as targets_of_the_engine
from mllm_vision.functional.engine.tiles import Grid
from mllm_vision.functional.image_text import clip_loss, related, siglip_loss

cases = st.fixed_dictionaries(
    {
        "n": st.integers(1, 9),
        "d": st.integers(2, 7),
        # the last leaves the window within which sums of exponentials are held as they are
        "scale": st.one_of(st.floats(0.01, 100.0), st.just(3000.0)),
        "bias": st.floats(-12.0, 4.0),
        "seed": st.integers(0, 2**16),
        "tile": st.one_of(st.none(), st.integers(1, 10)),
        "relations": st.sampled_from(["none", "ids", "two ids", "bool", "soft", "callable", "sparse", "sparse bool"]),
    }
)


def make(case):
    """Features, what to hand to the loss as relations, and the same as the oracle's dense matrix."""
    rng = np.random.default_rng(case["seed"])
    n = case["n"]
    image, text = rng.normal(size=(n, case["d"])), rng.normal(size=(n, case["d"]))
    kind = case["relations"]
    if kind == "none":
        return image, text, None, None
    if kind in ("ids", "two ids"):
        ids = rng.integers(0, max(1, n // 2), size=(n, 1 if kind == "ids" else 2)) - 2**62
        given = torch.tensor(ids[:, 0] if kind == "ids" else ids)
        return image, text, given, oracle.positives_from_ids(ids.tolist())
    if kind in ("bool", "sparse bool"):
        dense = (rng.random((n, n)) < 0.3) | np.eye(n, dtype=bool)
        given = torch.tensor(dense)
        return image, text, given if kind == "bool" else given.to_sparse_coo(), dense.astype(float)
    dense = np.clip(rng.random((n, n)), 0.01, 1.0)
    if kind == "sparse":  # compressed rows, the other of torch's two common layouts
        dense *= (rng.random((n, n)) < 0.4) | np.eye(n, dtype=bool)
        return image, text, torch.tensor(dense).to_sparse_csr(), dense
    given = torch.tensor(dense)
    return image, text, given if kind == "soft" else lambda rows, columns: given[rows, columns], dense


def leaves(*values):
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]


def close(ours, reference, size=1.0):
    np.testing.assert_allclose(ours.detach().numpy(), reference, rtol=1e-8, atol=1e-10 * max(1.0, size))


@settings(max_examples=600, deadline=None)
@given(cases)
def test_clip_loss_and_gradients_are_the_oracles(case):
    image, text, relations, dense = make(case)
    i, t, s = leaves(image, text, case["scale"])
    loss = clip_loss(i, t, s, relations=relations, tile_size=case["tile"])
    loss.backward()
    value, by_image, by_text, by_scale = oracle.clip(image, text, case["scale"], dense)
    close(loss, value, case["scale"])
    close(i.grad, by_image, case["scale"])
    close(t.grad, by_text, case["scale"])
    close(s.grad, by_scale)


@settings(max_examples=600, deadline=None)
@given(cases)
def test_siglip_loss_and_gradients_are_the_oracles(case):
    image, text, relations, dense = make(case)
    i, t, s, b = leaves(image, text, case["scale"], case["bias"])
    loss = siglip_loss(i, t, s, b, relations=relations, tile_size=case["tile"])
    loss.backward()
    value, by_image, by_text, by_scale, by_bias = oracle.siglip(image, text, case["scale"], case["bias"], dense)
    close(loss, value, case["scale"])
    close(i.grad, by_image, case["scale"])
    close(t.grad, by_text, case["scale"])
    close(s.grad, by_scale)
    close(b.grad, by_bias)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_order_of_the_pairs_and_length_of_the_features_do_not_matter(case):
    image, text, _, dense = make(case)
    i, t = torch.tensor(image), torch.tensor(text)
    order = torch.randperm(len(i))
    matrix = None if dense is None else torch.tensor(dense)
    moved = None if matrix is None else matrix[order][:, order]
    for loss, extra in ((clip_loss, ()), (siglip_loss, (case["bias"],))):
        a = loss(i, t, case["scale"], *extra, relations=matrix)
        b = loss(i[order] * 3.0, t[order] / 5.0, case["scale"], *extra, relations=moved, tile_size=case["tile"])
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_values_known_without_computing():
    features = torch.eye(8, dtype=torch.float64)
    collapsed = torch.ones(8, 4, dtype=torch.float64)
    assert clip_loss(collapsed, collapsed, 37.0).item() == pytest.approx(math.log(8))
    assert clip_loss(features, features, 1e4).item() == pytest.approx(0.0, abs=1e-12)
    assert siglip_loss(features, features, 0.0, 0.0).item() == pytest.approx(8 * math.log(2))
    # the paper's start: t = 10, b = -10 on unrelated features, nearly all of it from the N positives
    assert siglip_loss(features, features.roll(1, 0), 0.0, -10.0).item() == pytest.approx(
        math.log1p(math.exp(10)) + 7 * math.log1p(math.exp(-10))
    )
    # a batch of one caption twice: the best there is shares the row, ln 2, and not 0
    twice = torch.tensor([0, 0])
    assert clip_loss(features[:1].repeat(2, 1), features[:1].repeat(2, 1), 50.0, relations=twice).item() == (
        pytest.approx(math.log(2))
    )


def test_duplicates_as_positives_remove_the_pull_between_equal_pairs():
    """Two copies of a pair: without relations the loss pushes an image from its own caption's twin."""
    torch.manual_seed(0)
    image = torch.randn(3, 5, dtype=torch.float64)[[0, 0, 1, 2]].requires_grad_()
    text = torch.randn(3, 5, dtype=torch.float64)[[0, 0, 1, 2]]
    ids = torch.tensor([7, 7, 8, 9])
    with_ids = torch.autograd.grad(siglip_loss(image, text, 5.0, -2.0, relations=ids), image)[0]
    torch.testing.assert_close(with_ids[0], with_ids[1])
    better = image.detach().clone()
    better[:2] = text[:2] * 10  # both images at their caption
    assert siglip_loss(better, text, 20.0, -10.0, relations=ids) < siglip_loss(better, text, 20.0, -10.0)


def test_half_precision_inputs_are_computed_in_fp32():
    torch.manual_seed(0)
    image, text = torch.randn(32, 16), torch.randn(32, 16)
    half = image.bfloat16(), text.bfloat16()
    reference = clip_loss(half[0].double(), half[1].double(), 100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = clip_loss(*half, torch.tensor(100.0))
        sigmoid = siglip_loss(*half, torch.tensor(100.0), torch.tensor(-10.0))
    assert loss.dtype == torch.float32 and sigmoid.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    assert torch.isfinite(clip_loss(image.bfloat16() * 1e30, text.bfloat16() * 1e-30, 100.0))


def test_related_is_any_column():
    ids = torch.tensor([[1, 5], [1, 6], [2, 6], [3, 7]])
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]).bool()
    assert torch.equal(related(ids, ids), expected)
    assert torch.equal(related(ids[:, 0], ids[:2, 0]), expected[:, :2] & (ids[:, :1] == ids[:2, 0]))


@pytest.mark.parametrize(
    ("relations", "words"),
    [
        (torch.ones(3, dtype=torch.long), r"\[4\] or \[4, K\], got \[3\]"),
        (torch.ones(4, 3), r"\[4, 4\], got \[4, 3\]"),
        (torch.ones(4), r"\[4, 4\], got \[4\]"),
    ],
)
def test_relations_of_a_wrong_shape_are_refused(relations, words):
    with pytest.raises(ValueError, match=words):
        siglip_loss(torch.randn(4, 2), torch.randn(4, 2), 1.0, 0.0, relations=relations)


def test_wrong_features_are_refused():
    with pytest.raises(ValueError, match=r"\[4, 2\] and \[4, 3\]"):
        clip_loss(torch.randn(4, 2), torch.randn(4, 3), 1.0)
    with pytest.raises(ValueError, match="N > 0"):
        clip_loss(torch.randn(0, 2), torch.randn(0, 2), 1.0)
    with pytest.raises(ValueError, match="without any positive"):
        clip_loss(torch.randn(2, 2), torch.randn(2, 2), 1.0, relations=torch.tensor([[True, False], [True, False]]))


@pytest.mark.parametrize("relations", [None, "callable"])
def test_no_matrix_of_all_pairs_is_ever_made(relations):
    """Every tensor made on the way, forward and backward, is at most a tile or as long as the features."""
    from torch.utils._python_dispatch import TorchDispatchMode

    n, d, tile = 96, 4, 8
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.numel())
            return out

    def eye(rows, columns):
        return (torch.arange(n)[rows, None] == torch.arange(n)[None, columns]).float()

    given = eye if relations else None
    image, text = torch.randn(2, n, d).unbind()
    scale = torch.tensor(5.0, requires_grad=True)
    with Watch():
        for extra, loss in (((), clip_loss), ((torch.tensor(-2.0),), siglip_loss)):
            loss(
                image.requires_grad_(), text.requires_grad_(), scale, *extra, tile_size=tile, relations=given
            ).backward()
    assert 0 < largest <= n * d < n * n


@pytest.mark.parametrize("scale", [14.0, 60.0, 100.0])
@pytest.mark.parametrize("worst", [False, True])
def test_fp32_is_fp64_to_rounding(scale, worst):
    """Also where every pair is the worst of its row: then no common shift holds all sums, and another path runs."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(20, 8))
    text = -image if worst else rng.normal(size=(20, 8))
    for kind in ("clip", "siglip"):
        i, t, s, b = (torch.tensor(v, dtype=torch.float32, requires_grad=True) for v in (image, text, scale, -10.0))
        loss = clip_loss(i, t, s, tile_size=7) if kind == "clip" else siglip_loss(i, t, s, b, tile_size=7)
        loss.backward()
        reference = oracle.clip(image, text, scale) if kind == "clip" else oracle.siglip(image, text, scale, -10.0)
        for ours, expected in zip((loss, i.grad, t.grad, s.grad, b.grad), reference, strict=False):
            error = np.abs(ours.detach().numpy() - expected).max() / np.abs(expected).max()
            assert error < 2e-5, (kind, error)


@pytest.mark.parametrize("bias", [-300.0, -10.0, 0.0, 30.0, 79.0, 300.0])
def test_siglip_is_exact_wherever_the_scores_lie(bias):
    """One exponential serves where it cannot overflow; tiles of even and odd height; far beyond, the stable form."""
    rng = np.random.default_rng(1)
    image, text = rng.normal(size=(2, 8, 5))
    value, by_image, *_, by_scale, by_bias = oracle.siglip(image, text, 20.0, bias)
    for tile in (3, 4, 8):
        i, t, s, b = (torch.tensor(v, dtype=torch.float32, requires_grad=True) for v in (image, text, 20.0, bias))
        loss = siglip_loss(i, t, s, b, tile_size=tile)
        loss.backward()
        assert loss.item() == pytest.approx(value, rel=3e-6)
        assert s.grad.item() == pytest.approx(by_scale, rel=1e-4, abs=1e-5)
        assert b.grad.item() == pytest.approx(by_bias, rel=1e-5, abs=1e-6)
        np.testing.assert_allclose(i.grad.numpy(), by_image, rtol=1e-3, atol=2e-5 * max(1, np.abs(by_image).max()))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30, 3e38])
@pytest.mark.parametrize("equal", [False, True])
def test_bf16_stays_finite_on_extreme_inputs(size, equal):
    torch.manual_seed(0)
    image = (torch.randn(24, 8) * min(size, 1e37)).bfloat16() if not equal else torch.full((24, 8), size).bfloat16()
    text = -image if equal else (torch.randn(24, 8) * min(size, 1e37)).bfloat16()
    for scale in (0.0, 1.0, 100.0):
        for bias in (None, -10.0, 1e4):
            i, t = image.clone().requires_grad_(), text.clone().requires_grad_()
            s = torch.tensor(scale, dtype=torch.bfloat16, requires_grad=True)
            b = None if bias is None else torch.tensor(bias, dtype=torch.bfloat16, requires_grad=True)
            loss = clip_loss(i, t, s, tile_size=5) if b is None else siglip_loss(i, t, s, b, tile_size=5)
            loss.backward()
            assert loss.dtype == torch.float32 and i.grad.dtype == torch.bfloat16
            for value in (loss, i.grad, t.grad, s.grad, *(() if b is None else (b.grad,))):
                assert torch.isfinite(value).all(), (scale, bias)


def test_what_needs_no_gradient_gets_none_and_costs_no_other():
    torch.manual_seed(0)
    image, text = torch.randn(2, 9, 4).unbind()
    full = image.clone().requires_grad_(), text.clone().requires_grad_()
    for extra, loss in (((), clip_loss), ((-3.0,), siglip_loss)):
        for leaf in full:
            leaf.grad = None
        loss(*full, 7.0, *extra, tile_size=4).backward()
        for frozen in (0, 1):
            pair = [image.clone(), text.clone()]
            pair[1 - frozen].requires_grad_()
            loss(*pair, 7.0, *extra, tile_size=4).backward()
            assert pair[frozen].grad is None
            torch.testing.assert_close(pair[1 - frozen].grad, full[1 - frozen].grad)
        scale = torch.tensor(7.0, requires_grad=True)
        (by_scale,) = torch.autograd.grad(loss(image, text, scale, *extra, tile_size=4), scale)
        step = 1e-2
        slope = (loss(image.double(), text.double(), 7 + step, *extra) -
                 loss(image.double(), text.double(), 7 - step, *extra)) / (2 * step)  # fmt: skip
        assert by_scale.item() == pytest.approx(slope.item(), rel=1e-3)
        with torch.no_grad():
            assert not loss(*full, 7.0, *extra).requires_grad


def test_a_factor_and_a_second_backward_through_the_same_graph():
    torch.manual_seed(0)
    image, text = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    for extra, loss in (((), clip_loss), ((-3.0,), siglip_loss)):
        whole = loss(image, text, 7.0, *extra, tile_size=4)
        (once,) = torch.autograd.grad(whole, image, retain_graph=True)
        (again,) = torch.autograd.grad(whole, image, retain_graph=True)
        (tripled,) = torch.autograd.grad(3 * whole, image)
        torch.testing.assert_close(once, again, rtol=0, atol=0)
        torch.testing.assert_close(3 * once, tripled)
        zero = torch.autograd.grad(0 * loss(image, text, 7.0, *extra), image)[0]
        assert torch.equal(zero, torch.zeros_like(zero))


def test_the_backward_pass_leaves_autocast_too():
    torch.manual_seed(0)
    image, text = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    for extra, loss in (((), clip_loss), ((-3.0,), siglip_loss)):
        (expected,) = torch.autograd.grad(loss(image, text, 7.0, *extra), image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (found,) = torch.autograd.grad(loss(image, text, 7.0, *extra), image)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_second_derivative_is_refused():
    image, text = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    for loss in (clip_loss(image, text, 5.0), siglip_loss(image, text, 5.0, -1.0)):
        with pytest.raises(RuntimeError, match="no second derivative.*create_graph"):
            torch.autograd.grad(loss, image, create_graph=True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"tile_size": 0}, "tile_size=0 must be at least 1"),
        ({"exchange": "rings"}, "exchange='rings' must be one of 'gather', 'ring'"),
        ({"relations": [0, 1, 2, 3]}, "tensor or a callable, got list"),
        ({"relations": torch.ones(4, 4, requires_grad=True)}, r"detach\(\)"),
        ({"relations": lambda rows, columns: torch.ones(1, 2)}, r"returned \[1, 2\] for a tile of \[4, 4\]"),
        ({"relations": torch.eye(4)[:3].to_sparse_coo()}, r"must be \[4, 4\], got \[3, 4\]"),
    ],
)
def test_wrong_flags_are_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        clip_loss(torch.randn(4, 2), torch.randn(4, 2), 1.0, **flags)


@pytest.mark.parametrize("listed", [True, False])
def test_equal_ids_are_those_of_related_listed_or_tile_by_tile(listed, monkeypatch):
    """For ids of any size, also where two columns agree."""
    torch.manual_seed(0)
    monkeypatch.setattr(targets_of_the_engine, "LISTED_SHARE", 1 if listed else 10**9)
    ids = torch.tensor([[5, 1], [5, 1], [-6, 1], [2**62, 2], [2**62, 2], [9, -3]])
    targets = targets_of_the_engine.find_targets(ids, 6, [6], Grid(6, [(0, 6)], 4), torch.ones(1), None)
    assert targets.certain
    assert isinstance(targets, targets_of_the_engine.SparseTargets) == listed
    whole = torch.zeros(6, 6)
    for r, rows in enumerate(targets._grid.rows):
        for c, columns in enumerate(targets._grid.columns):
            tile = torch.zeros(rows.stop - rows.start, columns.stop - columns.start)
            targets.subtract(tile, r, c)
            whole[rows, columns] = -tile
    assert torch.equal(whole, related(ids, ids).float())


@pytest.mark.parametrize("relations", [None, "ids"])
def test_threads_change_no_bit(relations):
    """Tiles shared by several threads give what one thread gives."""
    torch.manual_seed(0)
    image, text = torch.randn(2, 150, 24).unbind()
    ids = None if relations is None else torch.arange(150) // 3
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for loss, extra in ((clip_loss, ()), (siglip_loss, (torch.tensor(-6.0, requires_grad=True),))):
                leaves = [image.clone().requires_grad_(), text.clone().requires_grad_(), torch.tensor(20.0), *extra]
                leaves[2].requires_grad_()
                value = loss(*leaves, relations=ids, tile_size=20)
                found.append([value.detach(), *torch.autograd.grad(value, leaves)])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for index, values in enumerate(found[2:]):
        assert all(torch.equal(a, b) for a, b in zip(values, found[index % 2], strict=True))


def test_an_error_in_a_thread_is_raised_and_ends_the_others():
    def fails(rows, columns):
        if rows.start and columns.start:
            raise KeyError("no such row")
        return torch.eye(80)[rows, columns]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(KeyError, match="no such row"):
            clip_loss(torch.randn(80, 4), torch.randn(80, 4), 1.0, relations=fails, tile_size=10)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
