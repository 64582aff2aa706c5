"""`VisionEncoder.from_pretrained` of a saved system: its tuned tower as a plain encoder."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import transformers
from transformers import CONFIG_MAPPING

from mllm_vision.encoder import VisionEncoder

IMAGE = tiny.random_image(5, (45, 36))
LLAMA = tiny.tiny_llama().config.to_dict()
VISION = dict(tiny.SIZES)
PERCEIVER = {"hidden_size": 32, "resampler_n_latents": 4, "resampler_n_heads": 2, "resampler_head_dim": 16}
GEMMA = {"model_type": "gemma", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
GEMMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 300}
QFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIGLIP, CLIP = tiny.tiny_siglip_vision().config.to_dict(), tiny.tiny_clip_vision().config.to_dict()

SYSTEMS = {
    # system -> its config's fields, the plain encoder's type, the hidden state and tokens that its language model sees
    "internvl": (
        {"vision_config": {**VISION, "use_mean_pooling": False, "attention_bias": True}},
        ("dinov2", -1, "patch"),
    ),
    "idefics2": (
        {"vision_config": VISION, "perceiver_config": {**PERCEIVER, "num_key_value_heads": 2}},
        ("siglip_vision_model", -1, "patch"),
    ),
    "idefics3": ({"vision_config": VISION}, ("siglip_vision_model", -1, "patch")),
    "smolvlm": ({"vision_config": VISION}, ("siglip_vision_model", -1, "patch")),
    "blip-2": (
        {"vision_config": VISION, "qformer_config": {**QFORMER, "encoder_hidden_size": 32}},
        ("vit", -1, "cls_patch"),
    ),
    "paligemma": (
        {"vision_config": SIGLIP, "text_config": GEMMA, "projection_dim": 32},
        ("siglip_vision_model", -1, "patch"),
    ),
    "llava_next": ({"vision_config": CLIP}, ("clip_vision_model", -2, "patch")),
    "llava_onevision": ({"vision_config": SIGLIP}, ("siglip_vision_model", -1, "patch")),
    "aya_vision": ({"vision_config": SIGLIP}, ("siglip_vision_model", -1, "patch")),
}
PROCESSORS = {
    "internvl": {"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 32, "width": 32}},
    "idefics2": {"image_processor_type": "Idefics2ImageProcessor", "size": {"shortest_edge": 16, "longest_edge": 64}},
    "idefics3": {"image_processor_type": "Idefics3ImageProcessor", "size": {"longest_edge": 128}},
    "smolvlm": {"image_processor_type": "SmolVLMImageProcessor", "size": {"longest_edge": 128}},
    "blip-2": {"image_processor_type": "BlipImageProcessor", "size": {"height": 32, "width": 32}},
    "paligemma": {
        "image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}, "image_seq_length": 16,
    },
    "llava_next": {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "image_grid_pinpoints": [[32, 64]],
    },
    "llava_onevision": {"image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": 32, "width": 32}},
    "aya_vision": {"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 32, "width": 32}},
}  # fmt: skip


def saved(system: str, path, **settings):
    """A tiny system whose tower differs from its initial weights in every parameter, saved with its processor."""
    fields = {"text_config": LLAMA, **SYSTEMS[system][0], **settings}
    config = CONFIG_MAPPING[system](**fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    inner = model if system == "blip-2" else model.model
    tower = inner.vision_tower if hasattr(inner, "vision_tower") else inner.vision_model
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": 3, **PROCESSORS[system]}
    (path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    return tower


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_tuned_tower_of_every_system(tmp_path, system):
    tower = saved(system, tmp_path)
    encoder = VisionEncoder.from_pretrained(tmp_path)
    kind, layer, feature = SYSTEMS[system][1]
    assert (encoder.config.model_type, encoder.select_layer, encoder.select_feature) == (kind, layer, feature)
    assert encoder.pretrained
    assert encoder.lineage is None
    pixel_values = encoder.processor(images=IMAGE, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 32, 32)
    assert list(encoder.processor.image_mean) == [0.4, 0.5, 0.6]
    with torch.no_grad():
        states = tower(pixel_values, output_hidden_states=True).hidden_states[layer]
        mine = encoder(pixel_values, pooled=False).tokens
    drop = int(kind in ("clip_vision_model", "dinov2"))
    assert torch.equal(mine, states[:, drop:])
    assert torch.equal(encoder.encode([IMAGE]), mine)

    encoder.save_pretrained(tmp_path / "encoder")  # a plain checkpoint again
    again = VisionEncoder.from_pretrained(tmp_path / "encoder")
    assert (again.select_layer, again.select_feature) == (layer, feature)
    assert torch.equal(again.encode([IMAGE]), mine)


def test_the_layer_that_a_system_names(tmp_path):
    saved("internvl", tmp_path, vision_feature_layer=-2, vision_feature_select_strategy="full")
    encoder = VisionEncoder.from_pretrained(tmp_path)
    assert (encoder.select_layer, encoder.select_feature) == (-2, "cls_patch")


def test_an_internvit_without_its_last_norm_is_refused(tmp_path):
    saved("internvl", tmp_path, vision_config={**VISION, "use_mean_pooling": True})
    with pytest.raises(ValueError, match=r"no norm after its last layer \(use_mean_pooling=True\)"):
        VisionEncoder.from_pretrained(tmp_path)


def test_a_tower_of_no_family_is_refused(tmp_path):
    tower = transformers.PixtralVisionConfig(**{k: v for k, v in VISION.items() if k != "num_key_value_heads"})
    config = transformers.LlavaConfig(vision_config=tower, text_config=LLAMA)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its image tower has model_type='pixtral'; accepted are"):
        VisionEncoder.from_pretrained(tmp_path)
