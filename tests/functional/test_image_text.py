"""The losses against float64 oracles written from the papers, and identities they must keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import image_text as oracle

from mllm_vision.functional.image_text import clip_loss, related, siglip_loss

cases = st.fixed_dictionaries(
    {
        "n": st.integers(1, 9),
        "d": st.integers(2, 7),
        "scale": st.floats(0.01, 100.0),
        "bias": st.floats(-12.0, 4.0),
        "seed": st.integers(0, 2**16),
        "relations": st.sampled_from(["none", "ids", "two ids", "bool", "soft"]),
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
    if kind == "bool":
        dense = (rng.random((n, n)) < 0.3) | np.eye(n, dtype=bool)
        return image, text, torch.tensor(dense), dense.astype(float)
    dense = np.clip(rng.random((n, n)), 0.01, 1.0)
    return image, text, torch.tensor(dense), dense


def leaves(*values):
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]


def close(ours, reference):
    np.testing.assert_allclose(ours.detach().numpy(), reference, rtol=1e-8, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_clip_loss_and_gradients_are_the_oracles(case):
    image, text, relations, dense = make(case)
    i, t, s = leaves(image, text, case["scale"])
    loss = clip_loss(i, t, s, relations=relations)
    loss.backward()
    value, by_image, by_text, by_scale = oracle.clip(image, text, case["scale"], dense)
    close(loss, value)
    close(i.grad, by_image)
    close(t.grad, by_text)
    close(s.grad, by_scale)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_siglip_loss_and_gradients_are_the_oracles(case):
    image, text, relations, dense = make(case)
    i, t, s, b = leaves(image, text, case["scale"], case["bias"])
    loss = siglip_loss(i, t, s, b, relations=relations)
    loss.backward()
    value, by_image, by_text, by_scale, by_bias = oracle.siglip(image, text, case["scale"], case["bias"], dense)
    close(loss, value)
    close(i.grad, by_image)
    close(t.grad, by_text)
    close(s.grad, by_scale)
    close(b.grad, by_bias)


@settings(max_examples=30, deadline=None)
@given(cases)
def test_order_of_the_pairs_and_length_of_the_features_do_not_matter(case):
    image, text, _, dense = make(case)
    i, t = torch.tensor(image), torch.tensor(text)
    order = torch.randperm(len(i))
    matrix = None if dense is None else torch.tensor(dense)
    moved = None if matrix is None else matrix[order][:, order]
    for loss, extra in ((clip_loss, ()), (siglip_loss, (case["bias"],))):
        a = loss(i, t, case["scale"], *extra, relations=matrix)
        b = loss(i[order] * 3.0, t[order] / 5.0, case["scale"], *extra, relations=moved)
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
