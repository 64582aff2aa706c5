"""The losses that couple the batch: two and three ranks, even and uneven, equal one process with the whole batch."""

from __future__ import annotations

import loss_work
import pytest
import torch


@pytest.mark.parametrize(("sizes", "exchange", "tile"), [([5, 5], "gather", None), ([2, 7, 1], "ring", 3)])
def test_ranks_are_one_process(gloo, sizes, exchange, tile):
    torch.manual_seed(1)
    z1, z2 = torch.randn(2, 10, 5, dtype=torch.float64)
    labels, temperature = torch.tensor([0, 1, 0, 2, 1, 0, 2, 1, 0, 3]), 0.3
    expected = loss_work.every_loss(z1, z2, labels, temperature, [10], "gather", None)
    assert all(rows[0].abs().max() > 0 for _, rows, _ in expected.values())
    for found in gloo.run(len(sizes), loss_work.every_loss, z1, z2, labels, temperature, sizes, exchange, tile):
        for name, (value, rows, by_temperature) in expected.items():
            here = found[name]
            assert here[0] == pytest.approx(value, rel=1e-10), name
            assert here[2] == pytest.approx(by_temperature, rel=1e-8), name
            torch.testing.assert_close(here[1], rows, rtol=1e-8, atol=1e-11, msg=lambda text, name=name: name + text)
