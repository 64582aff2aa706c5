"""Encoders by name: published sizes, overrides on top, and the text tower that goes with an image tower."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, ResNetConfig, SiglipVisionConfig

import mllm_vision
from mllm_vision.encoder.build import build_backbone
from mllm_vision.encoder.presets import RESNETS, config_fields, list_encoders
from mllm_vision.encoder.sources import build_encoder, is_convolutional, is_model_type
from mllm_vision.encoder.text.towers import text_sizes
from mllm_vision.objectives import ImageObjective, list_objectives, load_objective

# parameters of timm's models of these names, without their classifiers, in millions
MILLIONS = {
    "vit_tiny": 5.5,
    "vit_small": 21.7,
    "vit_base": 85.8,
    "vit_large": 303.3,
    "resnet18": 11.2,
    "resnet50": 23.5,
}


@pytest.mark.parametrize("name", MILLIONS)
def test_sizes_are_the_published_ones(name):
    with torch.device("meta"):
        backbone, processor = build_backbone(name)
    count = sum(value.numel() for key, value in backbone.named_parameters() if not key.startswith("pooler."))
    assert count / 1e6 == pytest.approx(MILLIONS[name], abs=0.1)
    assert processor.size


def test_every_name_builds():
    assert mllm_vision.list_encoders() == list_encoders()
    for name in list_encoders():
        assert is_model_type(name)
        with torch.device("meta"):
            backbone, _ = build_backbone(name)
        fields = config_fields(name)
        assert {key: getattr(backbone.config, key) for key in fields} == fields
        assert is_convolutional(name) == (name.startswith(("resnet", "convnext", "efficientnet")))
    assert {backbone.config.model_type for backbone, _ in [build_backbone("clip_vit_tiny")]} == {"clip_vision_model"}


def test_overrides_and_patches_on_top():
    fields = config_fields("dinov2_vit_small_patch14")
    assert (fields["patch_size"], fields["mlp_ratio"], fields["image_size"]) == (14, 4, 224)
    made = build_encoder("siglip_vit_tiny_patch8", image_size=32, overrides={"num_hidden_layers": 1, "patch_size": 16})
    assert (made.image_size, made.config.patch_size, made.config.num_hidden_layers) == (32, 16, 1)
    assert (made.config.hidden_size, made.config.intermediate_size) == (192, 768)
    assert not config_fields("vit_smal") and not config_fields("vit_small_patch")
    with pytest.raises(FileNotFoundError, match="vit_small"):
        is_model_type("vit_smal")


def test_a_text_tower_is_sized_to_its_image_tower():
    def clip(width: int, layers: int, heads: int) -> dict:
        return text_sizes(CLIPVisionConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads))

    # CLIP's table 20: 512 beside 768, 768 beside 1024, always 12 layers
    assert clip(768, 12, 12) == {"hidden_size": 512, "num_hidden_layers": 12}
    assert clip(1024, 24, 16) == {"hidden_size": 768, "num_hidden_layers": 12}
    assert clip(192, 4, 3) == {"hidden_size": 128, "num_hidden_layers": 4}
    small = CLIPVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    same = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    assert text_sizes(small) == same
    siglip = text_sizes(
        SiglipVisionConfig(hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304)
    )
    assert siglip == {
        "hidden_size": 1152,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
    }
    assert text_sizes(ResNetConfig()) == {"hidden_size": 512, "num_hidden_layers": 12}
    assert text_sizes(ResNetConfig(**RESNETS["resnet18"])) == {}


@pytest.mark.parametrize("name", list_objectives())
def test_a_methods_optimizer_fits_the_encoder(name):
    """AdamW for transformers, LARS or SGD for ResNets; a flag takes the method's own optimizer back."""
    method = load_objective(name)
    transformer = method.defaults_beside(None, "vit_small")
    assert transformer.get("optim", "adamw_torch") == "adamw_torch"
    assert not {"optim_args", "base_bias_learning_rate"} & set(transformer)
    if not issubclass(method, ImageObjective) or name in ("mae", "dinov2"):  # transformers only, or AdamW in any case
        return
    convolutional = method.defaults_beside(None, "resnet50")
    assert convolutional["optim"] in ("lars", "sgd") and convolutional["optim"] in method.default_optimizers()
    assert convolutional["base_learning_rate"] > transformer["base_learning_rate"]
    if method.training_defaults["optim"] != "adamw_torch":
        assert method.defaults_beside(method.training_defaults["optim"], "vit") == method.training_defaults
