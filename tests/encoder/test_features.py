"""Tokens of every family against the model's own `forward`; and that layers which are not needed do not run."""

from __future__ import annotations

import pytest
import torch
from families import CONVOLUTIONAL, FAMILIES, small

from mllm_vision.encoder.families import family_of
from mllm_vision.encoder.features import extract_features

PREFIX = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "vit": 1,
    "dinov2": 1,
    "dinov2_with_registers": 4,
    "dinov3_vit": 3,
}


def native(encoder, pixel_values, layer):
    with torch.no_grad():
        output = encoder.backbone(pixel_values, output_hidden_states=True)
    return output.hidden_states[layer], output.pooler_output.flatten(1)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("layer", [-1, -2, 0, 1])
def test_tokens_are_the_models_own_hidden_states(model_type, layer):
    encoder = small(model_type, select_layer=layer)
    pixel_values = torch.randn(2, 3, 32, 32)
    states, vector = native(encoder, pixel_values, layer)
    with torch.no_grad():
        features = encoder(pixel_values)
        alone = encoder(pixel_values, pooled=False)
    wanted = states.flatten(2).transpose(1, 2) if states.ndim == 4 else states[:, PREFIX[model_type] :]
    torch.testing.assert_close(features.tokens, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(features.pooled, vector, rtol=0, atol=1e-6)
    assert alone.pooled is None
    torch.testing.assert_close(alone.tokens, wanted, rtol=0, atol=1e-6)
    assert features.tokens.shape == (2, encoder.num_tokens, encoder.hidden_size)
    assert features.pooled.shape == (2, encoder.pooled_size)


@pytest.mark.parametrize("model_type", ["clip_vision_model", "vit", "dinov2", "dinov2_with_registers", "dinov3_vit"])
def test_features_of_towers_with_a_class_token(model_type):
    pixel_values = torch.randn(2, 3, 32, 32)
    patch = small(model_type, select_layer=-1)
    states, vector = native(patch, pixel_values, -1)
    with torch.no_grad():
        for feature, wanted in {
            "patch": states[:, PREFIX[model_type] :],
            "cls": states[:, :1],
            "cls_patch": torch.cat([states[:, :1], states[:, PREFIX[model_type] :]], dim=1),
            "pooled": vector[:, None],
        }.items():
            patch.select_feature = feature
            torch.testing.assert_close(patch(pixel_values).tokens, wanted, rtol=0, atol=1e-6)
            assert patch.num_tokens == wanted.shape[1]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_only_the_layers_needed_run(model_type):
    encoder = small(model_type)
    layers = family_of(encoder.backbone).layers(encoder.backbone)
    ran: list[int] = []
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    pixel_values = torch.randn(1, 3, 32, 32)
    for layer in range(-len(layers) - 1, len(layers) + 1):
        ran.clear()
        extract_features(encoder.backbone, pixel_values, select_layer=layer, select_feature="patch")
        assert ran == list(range(layer % (len(layers) + 1)))
        ran.clear()
        extract_features(encoder.backbone, pixel_values, select_layer=layer, select_feature="patch", pooled=True)
        assert ran == list(range(len(layers)))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradients_reach_the_layers_that_ran_and_no_other(model_type):
    encoder = small(model_type, select_layer=1)
    encoder(torch.randn(2, 3, 32, 32), pooled=False).tokens.square().sum().backward()
    layers = family_of(encoder.backbone).layers(encoder.backbone)
    assert all(parameter.grad is not None for parameter in layers[0].parameters())
    assert all(parameter.grad is None for layer in layers[1:] for parameter in layer.parameters())


def test_gradient_checkpointing_changes_nothing():
    encoder = small("clip_vision_model", select_layer=-1).train()
    pixel_values = torch.randn(2, 3, 32, 32)
    weight = encoder.backbone.encoder.layers[0].mlp.fc1.weight
    encoder(pixel_values, pooled=False).tokens.square().sum().backward()
    plain, weight.grad = weight.grad, None
    encoder.backbone.gradient_checkpointing_enable()
    encoder(pixel_values, pooled=False).tokens.square().sum().backward()
    torch.testing.assert_close(weight.grad, plain)


def test_defaults_are_second_to_last_for_clip_like_towers_and_last_for_others():
    layers = {model_type: small(model_type).select_layer for model_type in FAMILIES}
    assert layers == {model_type: -2 if "_vision_model" in model_type else -1 for model_type in FAMILIES}


@pytest.mark.parametrize("model_type", ["siglip_vision_model", *CONVOLUTIONAL])
@pytest.mark.parametrize("feature", ["cls", "cls_patch"])
def test_no_class_token_is_said(model_type, feature):
    with pytest.raises(ValueError, match=r"needs a class token.*use 'patch' or 'pooled'"):
        small(model_type, select_feature=feature)


@pytest.mark.parametrize("layer", [4, -5, 99])
def test_an_impossible_layer_is_said(layer):
    with pytest.raises(ValueError, match=rf"select_layer={layer} does not exist.*3 layers; use -4..3"):
        small("clip_vision_model", select_layer=layer)


def test_other_impossible_selections():
    with pytest.raises(ValueError, match=r"not a whole number"):
        small("clip_vision_model", select_layer=-1.5)
    with pytest.raises(ValueError, match=r"use one of patch, cls_patch, cls, pooled"):
        small("clip_vision_model", select_feature="patches")
    with pytest.raises(ValueError, match=r"expected \[batch, 3, height, width\]"):
        small("clip_vision_model")(torch.randn(1, 1, 32, 32))


def test_siglip_without_its_head_pools_by_the_mean():
    from mllm_vision.encoder import VisionEncoder, build_backbone

    backbone, processor = build_backbone(
        "siglip", image_size=32, **FAMILIES["siglip_vision_model"], vision_use_head=False
    )
    encoder = VisionEncoder.from_backbone(backbone.eval(), processor)
    pixel_values = torch.randn(2, 3, 32, 32)
    wanted = backbone(pixel_values).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(encoder(pixel_values).pooled, wanted)
