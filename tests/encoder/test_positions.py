"""Sine-cosine positions against loops over the grid, and backbones that take them."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from mllm_vision.encoder import VisionEncoder
from mllm_vision.encoder.positions import fix_positions, sincos_positions


def test_positions_are_those_of_loops():
    table = sincos_positions(2, 3, 8, prefix=1)
    assert table.shape == (7, 8) and not table[0].any()
    for row in range(2):
        for column in range(3):
            waves = [place * 10000 ** (-i / 2) for place in (row, column) for i in range(2)]
            (r0, r1), (c0, c1) = waves[:2], waves[2:]
            sines = [math.sin(r0), math.sin(r1), math.cos(r0), math.cos(r1)]
            sines += [math.sin(c0), math.sin(c1), math.cos(c0), math.cos(c1)]
            assert table[1 + 3 * row + column].tolist() == pytest.approx(sines, rel=1e-6)


def test_rows_and_columns_of_a_grid_that_is_no_square():
    grid = sincos_positions(2, 3, 8).view(2, 3, 8)
    assert torch.equal(grid[:, :1, :4].expand(-1, 3, -1), grid[..., :4])  # the row alone
    assert torch.equal(grid[:1, :, 4:].expand(2, -1, -1), grid[..., 4:])  # the column alone
    assert grid.flatten(0, 1).unique(dim=0).shape == (6, 8)


@pytest.mark.parametrize("kind", ["vit", "clip", "siglip", "dinov2"])
def test_backbones_take_fixed_positions(kind, tmp_path):
    make = {"vit": tiny.tiny_vit, "clip": tiny.tiny_clip_vision, "siglip": tiny.tiny_siglip_vision}
    backbone = make.get(kind, tiny.tiny_dinov2)()
    assert fix_positions(backbone)
    table = next(value for name, value in backbone.named_parameters() if "position_embedding" in name)
    assert not table.requires_grad
    torch.testing.assert_close(table.squeeze(0), sincos_positions(4, 4, 32, prefix=0 if kind == "siglip" else 1))
    VisionEncoder.from_backbone(backbone, tiny.tiny_image_processor(kind)).save_pretrained(tmp_path)
    again = VisionEncoder.from_pretrained(tmp_path).backbone
    assert torch.equal(dict(again.named_parameters())[_name(backbone)], table)


def _name(backbone):
    return next(name for name, _ in backbone.named_parameters() if "position_embedding" in name)


def test_no_table_no_change_and_widths_that_four_does_not_divide():
    from transformers import ResNetConfig, ResNetModel

    assert not fix_positions(ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])))
    with pytest.raises(ValueError, match="divisible by 4, got 30; use 28 or 32"):
        sincos_positions(2, 2, 30)
