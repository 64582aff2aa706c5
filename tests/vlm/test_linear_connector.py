"""The linear connector: transformers' own module as the oracle."""

from __future__ import annotations

import torch

from mllm_vision.vlm.connectors.linear import LinearConnector


def test_equals_transformers_projector_given_the_same_weights():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    ours = LinearConnector(12, 20)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=12, num_attention_heads=2),
        text_config=LlamaConfig(hidden_size=20, num_attention_heads=2),
        projector_hidden_act="linear",
    )
    theirs = LlavaMultiModalProjector(config)
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randn(3, 5, 12)
    assert torch.allclose(ours(tokens), theirs(tokens), atol=1e-6)


def test_linear_is_one_affine_map_and_trains_only_that():
    connector = LinearConnector(6, 4)
    assert sorted(name for name, _ in connector.named_parameters()) == ["linear_1.bias", "linear_1.weight"]
    tokens = torch.randn(7, 6)
    expected = tokens @ connector.linear_1.weight.T + connector.linear_1.bias
    assert torch.allclose(connector(tokens), expected, atol=1e-6)
