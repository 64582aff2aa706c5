"""LARS, LAMB and clipping over sliced parameters (`DTensor`, what FSDP version 2 makes) = over whole ones."""

from __future__ import annotations

import optimizer_work
import pytest
import torch


@pytest.mark.parametrize("name", ["simclr", "paper", "barlow_twins", "lamb"])
def test_slices_step_as_the_whole(gloo, name: str) -> None:
    expected = optimizer_work.steps(name, sharded=False)
    for found in gloo.run(2, optimizer_work.steps, name, True):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
