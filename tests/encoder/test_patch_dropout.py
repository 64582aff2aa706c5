"""Dropped patches: what stays is computed as if the others had been hidden from attention; never in evaluation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from families import CONVOLUTIONAL, FAMILIES, small
from pairs_for_tests import make_dual, make_objective, pair_batches

from mllm_vision.encoder.families import family_of
from mllm_vision.objectives.clip import CLIP
from mllm_vision.training.trainer.gradient_cache import cached_backward

TRANSFORMERS = [name for name in FAMILIES if name not in CONVOLUTIONAL]


def dropped(encoder, pixel_values, share, seed=5, **arguments):
    encoder.train()
    torch.manual_seed(seed)
    with torch.no_grad():
        found = encoder(pixel_values, patch_dropout=share, **arguments)
    encoder.eval()
    return found


def kept_patches(model_type: str, pixel_values: torch.Tensor, share: float) -> torch.Tensor:
    """`[B, K]`: which patches stayed, found by comparing their embeddings with all of them."""
    encoder = small(model_type, select_layer=0)
    with torch.no_grad():
        every = encoder(pixel_values).tokens
    some = dropped(encoder, pixel_values, share).tokens
    distances = torch.cdist(some, every)
    assert distances.amin(-1).max() < 1e-4
    return distances.argmin(-1)


@pytest.mark.parametrize("model_type", TRANSFORMERS)
def test_a_subset_is_the_whole_with_the_others_hidden_from_attention(model_type, monkeypatch):
    pixel_values = torch.randn(3, 3, 32, 32)
    kept = kept_patches(model_type, pixel_values, 0.6)
    assert kept.shape == (3, 6) and all(len(set(row)) == 6 for row in kept.tolist())
    encoder = small(model_type, select_layer=-1)
    found = dropped(encoder, pixel_values, 0.6)
    backbone, family = encoder.backbone, family_of(encoder.backbone)
    prefix = family.num_prefix_tokens(backbone.config)
    visible = torch.zeros(3, 16, dtype=torch.bool).scatter(1, kept, True)
    mask = torch.cat([torch.ones(3, prefix, dtype=torch.bool), visible], dim=1)[:, None, None]
    attend = F.scaled_dot_product_attention

    def hiding(query, key, value, attn_mask=None, **settings):
        assert attn_mask is None and key.shape[2] == prefix + 16
        return attend(query, key, value, attn_mask=mask, **settings)

    with torch.no_grad():
        torch.manual_seed(5)
        hidden, arguments = family.embed(backbone.train(), pixel_values)  # DINOv3 jitters its positions in training
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", hiding)
            for layer in family.layers(backbone):
                hidden = layer(hidden, **arguments)
        rows = torch.arange(3)[:, None]
        hidden = torch.cat([hidden[:, :prefix], hidden[rows, prefix + kept]], dim=1)
        pooled = family.pool(backbone, hidden)
    torch.testing.assert_close(found.tokens, hidden[:, prefix:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.pooled, pooled, rtol=1e-4, atol=1e-5)
    alone = dropped(encoder, pixel_values, 0.6, tokens=False)
    assert alone.tokens is None
    torch.testing.assert_close(alone.pooled, pooled, rtol=1e-4, atol=1e-5)


def test_every_image_draws_its_own_and_every_patch_is_drawn_alike():
    counts = torch.zeros(16)
    rows = []
    for number in range(40):
        torch.manual_seed(number)
        encoder = small("clip_vision_model", select_layer=0).train()
        pixel_values = torch.randn(8, 3, 32, 32)
        with torch.no_grad():
            some, every = encoder(pixel_values, patch_dropout=0.5).tokens, encoder(pixel_values).tokens
        kept = torch.cdist(some, every).argmin(-1)
        assert kept.shape == (8, 8)
        counts += torch.bincount(kept.flatten(), minlength=16)
        rows += [tuple(sorted(row)) for row in kept.tolist()]
    assert len(set(rows)) > 300  # of 320, out of 12,870 subsets
    assert (counts / 320 - 0.5).abs().max() < 0.15  # five standard deviations


@pytest.mark.parametrize(("share", "kept"), [(0.0, 16), (0.01, 16), (0.25, 12), (0.5, 8), (0.99, 1)])
def test_how_many_stay(share, kept):
    encoder = small("siglip_vision_model")
    assert dropped(encoder, torch.randn(2, 3, 32, 32), share).tokens.shape[1] == kept


def test_evaluation_sees_every_patch():
    objective = make_objective("clip", patch_dropout=0.5)
    whole = make_objective("clip")
    batch = pair_batches(1, 6)[0]
    with torch.no_grad():
        assert torch.equal(objective.eval()(**batch).loss, whole.eval()(**batch).loss)
        assert objective.encoder(batch["pixel_values"], patch_dropout=0.5).tokens.shape[1] == 16
        images = torch.stack([objective.train().embed(**batch)["image"] for _ in range(2)])
    assert not torch.equal(images[0], images[1]), "training does draw"


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("chunk", [1, 3, 6])
def test_gradient_caching_drops_the_same_patches_twice(kind, chunk):
    """Chunks draw one after the other what the whole batch draws at once, and each again in its second pass."""
    batch = pair_batches(1, 6)[0]
    batch["pixel_values"] = batch["pixel_values"].double()
    found = []
    for size in (6, chunk):
        objective = make_objective(kind, patch_dropout=0.5).double().train()
        torch.manual_seed(3)
        output = cached_backward(objective, batch, size, check=True)
        gradients = {name: value.grad for name, value in objective.named_parameters() if value.requires_grad}
        found.append((output.loss.detach(), gradients, torch.rand(2)))
    (loss, expected, after), (same_loss, gradients, same_after) = found
    torch.testing.assert_close(same_loss, loss, rtol=1e-10, atol=0)
    assert torch.equal(same_after, after), "and leaves the random state where the whole batch leaves it"
    assert all(value is not None for value in expected.values()), "a parameter without gradient stops DDP"
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-6, atol=1e-9)


def test_what_cannot_be_dropped():
    for share in (1.0, -0.1, 1.5):
        with pytest.raises(ValueError, match=rf"patch_dropout={share} must lie in \[0, 1\)"):
            CLIP(make_dual("clip"), CLIP.Config(patch_dropout=share))
    encoder = small("resnet").train()
    with pytest.raises(ValueError, match="resnet is convolutional and has no patches"):
        encoder(torch.randn(2, 3, 32, 32), patch_dropout=0.5)
