"""A mask token in place of patches: for every family of transformers the backbone's own way where it has one."""

from __future__ import annotations

import pytest
import tiny
import torch
from linear_encoder import tiny_encoder

from mllm_vision.encoder.masking import mask_token, masked_features, masked_patches


@pytest.mark.parametrize("kind", ["vit", "clip", "siglip", "dinov2"])
def test_without_a_mask_it_is_the_encoders_own_pass(kind):
    encoder = tiny_encoder(kind)
    pixels = torch.randn(2, 3, 32, 32)
    pooled, patches = masked_features(encoder.backbone, pixels)
    torch.testing.assert_close(pooled, encoder(pixels).pooled)
    assert patches.shape == (2, 16, 32)
    none = torch.zeros(2, 16, dtype=torch.bool)
    for ours, theirs in zip(masked_features(encoder.backbone, pixels, none, torch.ones(32)), (pooled, patches)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("make", [tiny.tiny_dinov2, tiny.tiny_vit], ids=["dinov2", "vit"])
def test_it_is_what_transformers_does_with_its_own_mask_token(make):
    backbone = make(use_mask_token=True) if make is tiny.tiny_dinov2 else _vit_with_token()
    token = mask_token(backbone)
    torch.nn.init.normal_(token)
    pixels, mask = torch.randn(3, 3, 32, 32), torch.rand(3, 16) < 0.4
    pooled, patches = masked_features(backbone, pixels, mask, token)
    expected = backbone(pixels, bool_masked_pos=mask if make is tiny.tiny_dinov2 else mask.int())
    torch.testing.assert_close(patches, expected.last_hidden_state[:, 1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled, expected.pooler_output, rtol=1e-4, atol=1e-5)


def _vit_with_token():
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**tiny.SIZES), use_mask_token=True).eval()


def test_the_hook_is_gone_afterwards_and_a_wrong_mask_is_refused():
    backbone = tiny.tiny_clip_vision()
    pixels = torch.randn(2, 3, 32, 32)
    before = backbone(pixels).last_hidden_state
    with pytest.raises(ValueError, match=r"mask must be \[B, N\] = \[2, 16\]"):
        masked_features(backbone, pixels, torch.zeros(2, 9, dtype=torch.bool), torch.zeros(32))
    with masked_patches(backbone, torch.ones(2, 16, dtype=torch.bool), torch.zeros(32)):
        assert not torch.allclose(backbone(pixels).last_hidden_state, before)
    torch.testing.assert_close(backbone(pixels).last_hidden_state, before)
    assert mask_token(backbone) is None
