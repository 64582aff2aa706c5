"""Measures of a cloud of embeddings, against clouds whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import geometry as oracle

from mllm_vision.functional import geometry
from mllm_vision.functional.geometry import (
    alignment,
    alpha_req,
    effective_rank,
    participation_ratio,
    rankme,
    spectrum,
    spread,
    uniformity,
)


def cloud(eigenvalues, rows=64, seed=0):
    """Centred features `[rows, D]` whose covariance has exactly these eigenvalues, randomly rotated."""
    generator = torch.Generator().manual_seed(seed)
    d = len(eigenvalues)
    x = torch.randn(rows, d, generator=generator, dtype=torch.float64)
    x = torch.linalg.qr(x - x.mean(0)).Q  # orthonormal columns, still of mean zero
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    return (x * torch.tensor(eigenvalues, dtype=torch.float64).sqrt() * rows**0.5) @ rotation


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.01, 100.0), min_size=2, max_size=8), st.integers(0, 1000))
def test_spectrum_and_effective_rank_of_known_eigenvalues(values, seed):
    values = sorted(values, reverse=True)
    x = cloud(values, seed=seed)
    torch.testing.assert_close(spectrum(x), torch.tensor(values, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    shares = [math.sqrt(v) / sum(math.sqrt(w) for w in values) for v in values]
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert effective_rank(x).item() == pytest.approx(expected, rel=1e-6)
    assert effective_rank(x + 1000.0).item() == pytest.approx(expected, rel=1e-5)  # an offset is no direction


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 12), st.integers(2, 6), st.integers(0, 2**16))
def test_every_measure_is_the_oracles(n, d, seed):
    x, y = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows, last = x.numpy(), min(n - 1, d)
    found = {
        "effective_rank": (effective_rank(x), oracle.effective_rank(rows)),
        "uncentred": (effective_rank(x, center=False), oracle.effective_rank(rows, center=False)),
        "rankme": (rankme(x), oracle.rankme(rows, 1e-7)),
        "alpha_req": (alpha_req(x, last=last), oracle.alpha_req(rows, last)),
        "alignment": (alignment(x, y, alpha=1.5), oracle.alignment(rows, y.numpy(), 1.5)),
        "uniformity": (uniformity(x, t=3.0), oracle.uniformity(rows, 3.0)),
        "spread": (spread(x), oracle.spread(rows)),
        "participation_ratio": (participation_ratio(x), oracle.participation_ratio(rows)),
    }
    for name, (value, expected) in found.items():  # two in fp32; the oracle's eigenvalues of zero are 1e-17
        tolerance = 1e-4 if name in ("spread", "participation_ratio") else 2e-6
        assert value.item() == pytest.approx(expected, rel=tolerance), name
    torch.testing.assert_close(spectrum(x), torch.tensor(oracle.spectrum(rows).copy()), rtol=1e-7, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 12), st.integers(2, 6), st.floats(0.01, 100), st.integers(0, 2**16))
def test_order_rotation_and_size_are_no_matter(n, d, size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    other = size * x[torch.randperm(n, generator=generator)] @ rotation
    for measure in (effective_rank, rankme, uniformity, spread, participation_ratio):
        torch.testing.assert_close(measure(other), measure(x), rtol=1e-4, atol=1e-5)
    assert 1 <= participation_ratio(x) <= min(n - 1, d) + 1e-4 and 1 <= effective_rank(x) <= min(n - 1, d) + 1e-9
    last = min(n - 1, d)
    torch.testing.assert_close(alpha_req(other, last=last), alpha_req(x, last=last), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strip", [1, 40, 10**6])
def test_uniformity_goes_in_strips_of_any_height(strip, monkeypatch):
    monkeypatch.setattr(geometry, "STRIP", strip)
    x = torch.randn(23, 4, dtype=torch.float64)
    x[7] = x[2]  # a pair at no distance
    assert uniformity(x).item() == pytest.approx(oracle.uniformity(x.numpy(), 2.0), rel=1e-12)


def test_autocast_computes_in_full_precision():
    x = torch.randn(1, 32) + 0.01 * torch.randn(64, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [measure(x) for measure in (spread, participation_ratio, effective_rank, uniformity)]
    assert found == [measure(x) for measure in (spread, participation_ratio, effective_rank, uniformity)]


def test_rank_is_the_number_of_equal_directions():
    assert effective_rank(cloud([1.0] * 5)).item() == pytest.approx(5)
    assert effective_rank(cloud([1.0] * 3 + [0.0] * 5)).item() == pytest.approx(3, rel=1e-5)
    assert rankme(cloud([1.0] * 5)).item() == pytest.approx(5, rel=1e-4)
    assert effective_rank(torch.ones(10, 4)).item() == 0
    assert rankme(torch.ones(10, 4)).item() == pytest.approx(1, rel=1e-4)


def test_alpha_req_finds_the_exponent():
    values = [i**-1.3 for i in range(1, 21)]
    assert alpha_req(cloud(values)).item() == pytest.approx(1.3, rel=1e-6)
    bent = values[:10] + [v / 50 for v in values[10:]]
    assert alpha_req(cloud(bent), last=10).item() == pytest.approx(1.3, rel=1e-6)
    with pytest.raises(ValueError, match="at least two eigenvalues"):
        alpha_req(torch.ones(10, 4) * torch.arange(10)[:, None])


def test_alignment_and_uniformity():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert alignment(x, 3 * x).item() == pytest.approx(0)
    assert alignment(x, -x).item() == pytest.approx(4)
    assert alignment(x, x.flip(0), alpha=1).item() == pytest.approx(math.sqrt(2))
    assert uniformity(torch.ones(5, 3)).item() == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).item() == pytest.approx(-8)
    with pytest.raises(ValueError, match=r"\[2, 2\] and \[1, 2\]"):
        alignment(x, x[:1])
    with pytest.raises(ValueError, match="N >= 2"):
        uniformity(x[:1])
