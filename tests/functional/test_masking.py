"""Masks of patches: exact shares, in rectangles, row by row."""

from __future__ import annotations

import pytest
import torch

from mllm_vision.functional.masking import block_masks, draws_of_blocks, random_masks


@pytest.mark.parametrize("side", [4, 8, 14])
def test_exactly_the_share_is_hidden(side):
    ratio = torch.linspace(0, 1, 41)
    wanted = [int(side * side * (index / 40) + 1e-6) for index in range(41)]
    blocks = block_masks(torch.rand(41, draws_of_blocks(side, side)), ratio, side, side)
    assert blocks.sum(1).tolist() == wanted
    assert random_masks(torch.rand(41, side * side), ratio).sum(1).tolist() == wanted


@pytest.mark.parametrize("patches", [10, 49, 196, 576])
def test_a_decimal_share_is_meant_as_it_is_written(patches):
    """In fp32 0.7 is a little less, and a little less than 7 of 10 patches would be 6."""
    for percent in range(0, 101, 7):
        mask = random_masks(torch.rand(1, patches), torch.tensor([percent / 100]))
        assert mask.sum() == percent * patches // 100


def _neighbours(mask):
    """Share of the hidden patches' right-hand neighbours that are hidden too."""
    left, right = mask[:, :, :-1], mask[:, :, 1:]
    return ((left & right).sum() / left.sum()).item()


def test_blocks_hang_together_and_single_patches_do_not():
    ratio = torch.full((500,), 0.3)
    blocks = block_masks(torch.rand(500, draws_of_blocks(14, 14)), ratio, 14, 14).view(-1, 14, 14)
    singles = random_masks(torch.rand(500, 196), ratio).view(-1, 14, 14)
    assert _neighbours(singles) == pytest.approx(0.3, abs=0.02)
    assert _neighbours(blocks) > 0.7
    share = blocks.float().mean(0)  # corners are in fewer rectangles than the middle, but in some
    assert share.min() > 0.01 and share.max() < 0.6


def test_a_view_depends_on_its_own_draws_alone():
    draws, ratio = torch.rand(6, draws_of_blocks(5, 7)), torch.rand(6)
    whole = block_masks(draws, ratio, 5, 7)
    assert torch.equal(torch.cat([block_masks(draws[i : i + 1], ratio[i : i + 1], 5, 7) for i in range(6)]), whole)
    assert not torch.equal(whole[0], block_masks(draws.flip(1), ratio, 5, 7)[0])


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"draws must be \[N, 80\] for 4 x 4"):
        block_masks(torch.rand(2, 10), torch.rand(2), 4, 4)
    with pytest.raises(ValueError, match=r"ratio \[N\]"):
        random_masks(torch.rand(2, 16), torch.rand(3))
