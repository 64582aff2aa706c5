"""Projectors: names, errors, and transformers' own module as the oracle."""

from __future__ import annotations

import pytest
import torch

from mllm_vision.modules.projectors import build_projector, list_projectors


def test_list_names_both_and_is_sorted():
    assert list_projectors() == ["linear", "mlp"]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_equals_transformers_projector_given_the_same_weights(kind):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    ours = build_projector(kind, 12, 20)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=12, num_attention_heads=2),
        text_config=LlamaConfig(hidden_size=20, num_attention_heads=2),
        projector_hidden_act=ours.hidden_act,
    )
    theirs = LlavaMultiModalProjector(config)
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randn(3, 5, 12)
    assert torch.allclose(ours(tokens), theirs(tokens), atol=1e-6)


def test_linear_is_one_affine_map_and_trains_only_that():
    projector = build_projector("linear", 6, 4)
    assert sorted(name for name, _ in projector.named_parameters()) == ["linear_1.bias", "linear_1.weight"]
    tokens = torch.randn(7, 6)
    expected = tokens @ projector.linear_1.weight.T + projector.linear_1.bias
    assert torch.allclose(projector(tokens), expected, atol=1e-6)


def test_unknown_kind_names_the_nearest():
    with pytest.raises(ValueError, match=r"'mpl'.*'mlp'"):
        build_projector("mpl", 4, 4)


@pytest.mark.parametrize("widths", [(0, 4), (4, -1)])
def test_widths_must_be_positive(widths):
    with pytest.raises(ValueError, match="positive widths"):
        build_projector("mlp", *widths)
