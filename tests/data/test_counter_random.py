"""Counter-based random numbers: against splitmix64 in Python's integers, and independent of how rows are drawn."""

from __future__ import annotations

import pytest
import torch

from mllm_vision.functional.random import uniform

ALL = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """The next output of a generator in `state`, in unbounded integers."""
    z = (state + 0x9E3779B97F4A7C15) & ALL
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & ALL
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & ALL
    return z ^ (z >> 31)


def test_the_generator_itself() -> None:
    """The published first outputs for seed 0."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4


@pytest.mark.parametrize("stream", [0, 7, 1000])
def test_equals_integers(stream: int) -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 123456789012345]
    drawn = uniform(torch.tensor(seeds), stream, 6)
    for row, seed in enumerate(seeds):
        start = splitmix64((seed + 0x9E3779B97F4A7C15 * stream) & ALL)
        expected = [(splitmix64((start + 0x9E3779B97F4A7C15 * k) & ALL) >> 40) / 2**24 for k in range(6)]
        assert drawn[row].tolist() == expected


def test_rows_do_not_know_one_another() -> None:
    seeds = torch.randint(-(2**62), 2**62, (64,))
    whole, order = uniform(seeds, 3, 20), torch.randperm(64)
    assert torch.equal(uniform(seeds[order], 3, 20), whole[order])
    assert torch.equal(torch.cat([uniform(part, 3, 20) for part in seeds.split(7)]), whole)
    assert torch.equal(uniform(seeds, 3, 5), whole[:, :5])


def test_uniform_and_independent() -> None:
    """Consecutive seeds, as bad as seeds get: flat, uncorrelated between rows, positions and streams."""
    seeds = torch.arange(20000)
    a, b = uniform(seeds, 0, 8), uniform(seeds, 1, 8)
    assert float(a.min()) >= 0.0 and float(a.max()) < 1.0
    counts = torch.histc(a, bins=50, min=0, max=1)
    expected = a.numel() / 50
    assert float(((counts - expected) ** 2 / expected).sum()) < 49 + 5 * (2 * 49) ** 0.5  # chi squared, 5 deviations
    bound = 5 / len(seeds) ** 0.5
    assert float((torch.corrcoef(torch.cat([a, b], dim=1).T) - torch.eye(16)).abs().max()) < bound
    assert abs(float(torch.corrcoef(torch.stack([a[1:, 0], a[:-1, 0]]))[0, 1])) < bound


@pytest.mark.parametrize(
    ("seeds", "stream", "word"),
    [
        (torch.zeros(3), 0, "int64"),
        (torch.zeros(3, 1, dtype=torch.int64), 0, r"\[B\]"),
        (torch.zeros(3, dtype=torch.int64), -1, "negative"),
    ],
)
def test_errors(seeds: torch.Tensor, stream: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        uniform(seeds, stream, 2)
