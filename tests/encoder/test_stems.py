"""The ResNet stem for small images: built, saved, restored, and told apart by plain transformers."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModel

from mllm_vision.encoder.build import build_backbone
from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.encoder.sources import build_encoder
from mllm_vision.encoder.stems import zero_last_norms

SMALL = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def test_it_is_saved_and_restored(tmp_path):
    encoder = build_encoder("resnet", image_size=32, overrides={**SMALL, "stem": "cifar"}).eval()
    convolution = encoder.backbone.embedder.embedder.convolution
    assert (convolution.kernel_size, convolution.stride) == ((3, 3), (1, 1))
    assert isinstance(encoder.backbone.embedder.pooler, nn.Identity)
    images = torch.randn(2, 3, 32, 32)
    assert encoder(images).tokens.shape == (2, 16 * 16, 16)  # only the second stage halves the image
    encoder.save_pretrained(tmp_path / "encoder")
    again = VisionEncoder.from_pretrained(tmp_path / "encoder")
    assert torch.equal(again(images).pooled, encoder(images).pooled)
    assert type(again.backbone) is type(encoder.backbone)
    assert again.config.mllm_vision["stem"] == "cifar"
    built, _ = build_backbone(tmp_path / "encoder", image_size=32)  # a config alone says the stem too
    assert built.embedder.embedder.convolution.kernel_size == (3, 3)
    with pytest.raises(RuntimeError, match="mismatch"):  # plain transformers does not guess
        AutoModel.from_pretrained(tmp_path / "encoder")


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_residual_blocks_may_start_as_the_identity(layer_type):
    encoder = build_encoder("resnet", image_size=32, overrides={**SMALL, "layer_type": layer_type, "depths": [2, 1]})
    assert zero_last_norms(encoder.backbone) == 3
    second = encoder.backbone.encoder.stages[0].layers[1].train()  # no shortcut convolution: the identity
    rows = torch.rand(4, 8, 6, 6)
    torch.testing.assert_close(second(rows), rows)
    zeros = [norm for norm in encoder.modules() if isinstance(norm, nn.BatchNorm2d) and not norm.weight.any()]
    assert len(zeros) == 3
    assert zero_last_norms(tiny.tiny_vit()) == 0


def test_the_usual_stem_stays():
    encoder = build_encoder("resnet", image_size=32, overrides={**SMALL, "stem": "imagenet"})
    assert encoder.backbone.embedder.embedder.convolution.kernel_size == (7, 7)
    assert "stem" not in encoder.config.mllm_vision


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"unknown stem 'cifer'; the nearest known one is 'cifar'"):
        build_encoder("resnet", image_size=32, overrides={**SMALL, "stem": "cifer"})
    with pytest.raises(ValueError, match=r"stem='cifar' is only available for ResNets, not for vit"):
        build_encoder("vit", image_size=32, overrides={"stem": "cifar"})
