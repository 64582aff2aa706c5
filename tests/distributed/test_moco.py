"""Shuffled BatchNorm over ranks: rows are dealt over all of them, and two ranks are one with twice the groups."""

from __future__ import annotations

import moco_work
import pytest
import torch

from mllm_vision.modules.shuffle import shuffled


@pytest.mark.parametrize(("sizes", "groups"), [([4, 4], 1), ([4, 4], 2), ([2, 4, 3], 1)])
def test_rows_are_dealt_over_all_ranks(gloo, sizes, groups):
    rows, keys = torch.randn(sum(sizes), 3), torch.rand(sum(sizes))
    found = torch.cat(gloo.run(len(sizes), moco_work.dealt, rows, keys, sizes, groups))
    expected = torch.empty_like(rows)
    for share in keys.argsort().split(sizes):
        for part in share.tensor_split(groups):
            expected[part] = rows[part] - rows[part].mean(0)
    torch.testing.assert_close(found, expected)
    if len(set(sizes)) == 1:
        alone = shuffled(lambda group: group - group.mean(0), rows, keys, groups=len(sizes) * groups)
        torch.testing.assert_close(found, alone)


def test_two_ranks_are_one_with_twice_the_groups(gloo):
    """Queries, shuffled keys, losses, gradients, the queue and the key encoder of three steps."""
    losses, state = moco_work.trained(1, "moco_v2", 4)
    for found, other in gloo.run(2, moco_work.trained, 2, "moco_v2", 2):
        assert found == pytest.approx(losses, rel=1e-5)
        assert other.keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert moco_work.trained(1, "moco_v2", 1)[0] != pytest.approx(losses, rel=1e-4)
