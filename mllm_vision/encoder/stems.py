"""A ResNet stem for small images, which transformers does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer, ResNetBottleNeckLayer

from mllm_vision.errors import unknown_name

STEMS = ("imagenet", "cifar")


@torch.no_grad()
def zero_last_norms(backbone: nn.Module) -> int:
    """Zero-initialises the gain of the last BatchNorm of every residual block of a ResNet, in place.

    Returns:
        Number of blocks; 0 for other networks, which are unchanged.

    Reference:
        Goyal et al., 2017, "Accurate, Large Minibatch SGD", section 5.1 (https://arxiv.org/abs/1706.02677).
    """
    blocks = [module for module in backbone.modules() if isinstance(module, (ResNetBasicLayer, ResNetBottleNeckLayer))]
    block: Any
    for block in blocks:
        block.layer[-1].normalization.weight.zero_()
    return len(blocks)


def check_stem(stem: str, model_type: str) -> None:
    """Raises ValueError for an unknown stem, or a model other than a ResNet."""
    if stem not in STEMS:
        raise ValueError(unknown_name("stem", str(stem), STEMS))
    if model_type != "resnet":
        raise ValueError(f"stem={stem!r} is only available for ResNets, not for {model_type}; leave it out")


def stem_of(config: Any) -> str:
    """The stem stored in a config (an object or its dict), by default `"imagenet"`."""
    fields = config if isinstance(config, dict) else vars(config)
    return (fields.get("mllm_vision") or {}).get("stem", "imagenet")


def set_stem(backbone: PreTrainedModel, stem: str) -> None:
    """Gives a ResNet the stem for 32-pixel images: a 3x3 convolution of stride 1, without max-pooling.

    The ImageNet stem (7x7 of stride 2, then pooling) shrinks a 32-pixel image to 8x8 before the first block. The
    choice is stored in the config under `mllm_vision.stem` and restored by `VisionEncoder.from_pretrained`. Plain
    transformers refuses the checkpoint, because the shape of the first kernel differs.

    Args:
        backbone: a `ResNetModel`, changed in place; the new convolution has random weights.
        stem: `"cifar"`, or `"imagenet"`, which changes nothing.

    Raises:
        ValueError: an unknown stem, or a model other than a ResNet.

    Reference:
        Chen et al., 2020, "A Simple Framework for Contrastive Learning of Visual Representations", appendix B.9
        (https://arxiv.org/abs/2002.05709).
    """
    check_stem(stem, backbone.config.model_type)
    if stem == "imagenet":
        return
    embedder: Any = backbone.embedder
    old = embedder.embedder.convolution
    new = nn.Conv2d(old.in_channels, old.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")  # as transformers does
    embedder.embedder.convolution = new
    embedder.pooler = nn.Identity()
    backbone.config.mllm_vision = {**(getattr(backbone.config, "mllm_vision", None) or {}), "stem": stem}


def with_stem(model_class: type[PreTrainedModel], stem: str) -> type[PreTrainedModel]:
    """A subclass with this stem, for loading weights."""
    if stem == "imagenet":
        return model_class

    class Stemmed(model_class):  # type: ignore[valid-type,misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            set_stem(self, stem)

    Stemmed.__name__ = model_class.__name__
    return Stemmed
