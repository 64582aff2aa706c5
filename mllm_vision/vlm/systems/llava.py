"""LLaVA (arXiv:2304.08485) and LLaVA-1.5 (arXiv:2310.03744) on ``LlavaForConditionalGeneration``.

The tower's patch tokens of one layer pass a linear layer (LLaVA, equation 1) or an MLP of two layers with a GELU
(LLaVA-1.5, section 3.3); each becomes one token of the language model.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel
from transformers.models.llava import LlavaImageProcessorPil
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mllm_vision.data.images.layouts import FixedLayout, ImageLayout, PaddedLayout
from mllm_vision.data.images.transforms import ImageTransform
from mllm_vision.encoder import VisionEncoder
from mllm_vision.encoder.families import FAMILIES, family_of
from mllm_vision.encoder.features import extract_features, num_layers
from mllm_vision.vlm.connectors.linear import LinearConnector
from mllm_vision.vlm.language_model import JoinedLanguageModel
from mllm_vision.vlm.systems.base import Parts, System
from mllm_vision.vlm.systems.tiled import pixels_of
from mllm_vision.vlm.tokens import check_image_token

logger = logging.getLogger(__name__)


class LLaVA15(System):
    """LLaVA-1.5: an MLP of two layers between any transformer tower and any language model."""

    @dataclasses.dataclass
    class Config:
        pad_images: bool = dataclasses.field(
            default=False, metadata={"help": "Pad images to squares with the mean colour, in place of cropping."}
        )

    name: ClassVar[str] = "llava15"
    activation: ClassVar[str] = "gelu"
    parts: ClassVar[Parts] = Parts(
        encoder=["model.vision_tower"],
        connector=["model.multi_modal_projector"],
        language_model=["model.language_model", "lm_head"],
    )

    def processor(self, encoder: VisionEncoder, tokenizer: Any) -> LlavaProcessor:
        layout = tower_layout(encoder)
        images = encoder.processor
        if self.config.pad_images:
            square = {"height": encoder.image_size, "width": encoder.image_size}
            images = LlavaImageProcessorPil(do_pad=True, size=square, crop_size=square, **pixels_of(images))
        return LlavaProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=layout["patch_size"],
            vision_feature_select_strategy=layout["strategy"],
            num_additional_image_tokens=layout["additional"],
            chat_template=tokenizer.chat_template,
            image_token=self.image_token,
        )

    def build(self, encoder: VisionEncoder, language: JoinedLanguageModel, processor: Any) -> PreTrainedModel:
        config = LlavaConfig(projector_hidden_act=self.activation, **llava_fields(encoder, language))
        with torch.device("meta"):  # every part is replaced below, so nothing is allocated twice
            model: Any = LlavaForConditionalGeneration(config)
        model.config.vision_config, model.config.text_config = encoder.backbone.config, language.base.config
        model.model.vision_tower = encoder.backbone
        model.model.language_model, model.lm_head = language.base, language.head
        model.model.multi_modal_projector = self.connector(model.config).to(language.head.weight)
        return model

    def connector(self, config: Any) -> nn.Module:
        """A new connector."""
        return LlavaMultiModalProjector(config)

    def layout(self, model: Any, processor: Any) -> ImageLayout:
        kind = PaddedLayout if getattr(processor.image_processor, "do_pad", None) else FixedLayout
        return kind(model.config.image_token_id, model.config.image_seq_length, processor.image_processor)

    def features(self, model: Any, images: Mapping[str, Tensor]) -> Tensor:
        return tower_tokens(model, images["pixel_values"])

    def connect(self, model: Any, features: Tensor, images: Mapping[str, Tensor]) -> Tensor:
        projector = model.model.multi_modal_projector
        return projector(features.to(projector.linear_1.weight.dtype)).flatten(0, 1)

    def load_processor(self, model: Any, path: str, **hub: Any) -> Any:
        processor = super().load_processor(model, path, **hub)
        if not isinstance(processor, LlavaProcessor):
            raise ValueError(
                f"{path} has no LlavaProcessor (found: {type(processor).__name__}); save one into the folder with "
                "LlavaProcessor(image_processor, tokenizer, patch_size=..., vision_feature_select_strategy=...)"
            )
        check_image_token(model, processor, path)
        fit_processor(model, processor, path)
        return processor


class LLaVA(LLaVA15):
    """LLaVA: one linear layer, saved as Llava's two with a linear activation and an identity as the second."""

    name: ClassVar[str] = "llava"
    activation: ClassVar[str] = "linear"

    def connector(self, config: Any) -> nn.Module:
        return LinearConnector(config.vision_config.hidden_size, config.text_config.hidden_size)

    @classmethod
    def recognises(cls, config: Any) -> bool:
        return config.projector_hidden_act == "linear"

    def load_processor(self, model: Any, path: str, **hub: Any) -> Any:
        stored = model.model.multi_modal_projector
        linear = LinearConnector(stored.linear_1.in_features, stored.linear_1.out_features)
        second = stored.linear_2
        identity = linear.linear_2.to(second.weight)
        if not (torch.equal(second.weight, identity.weight) and torch.equal(second.bias, identity.bias)):
            raise ValueError(
                f"{path}: the second layer of the connector is not an identity, so it is not a linear connector; set "
                "projector_hidden_act in config.json to the activation it was trained with"
            )
        linear.linear_1 = stored.linear_1
        model.model.multi_modal_projector = linear.to(second.weight)
        return super().load_processor(model, path, **hub)


def llava_fields(encoder: VisionEncoder, language: JoinedLanguageModel) -> dict[str, Any]:
    """The fields of a ``LlavaConfig`` that tower and language model determine."""
    layout = tower_layout(encoder)
    return {
        "vision_config": encoder.backbone.config,
        "text_config": language.base.config,
        "image_token_index": language.image_token_id,
        "image_seq_length": layout["num_tokens"],
        "vision_feature_select_strategy": layout["strategy"],
        # 0 (the embeddings) counted from the end: transformers' Llava takes a plain 0 for "no hidden states"
        "vision_feature_layer": encoder.select_layer or -(num_layers(encoder.backbone) + 1),
        "tie_word_embeddings": language.tied,
        "mllm_vision": {"select_feature": layout["select_feature"]},  # for VisionEncoder.from_pretrained
    }


def tower_tokens(model: Any, pixel_values: Tensor) -> Tensor:
    """The selected tokens ``[n, N, D]`` of ``pixel_values [n, 3, H, W]``, as Llava's config selects them.

    A single layer of a known tower runs no layer above it.
    """
    config, tower = model.config, model.model.vision_tower
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    family = FAMILIES.get(tower.config.model_type)
    if isinstance(layer, int) and family is not None:
        before = family.num_prefix_tokens(tower.config)
        if before <= 1 and not (strategy == "default" and before == 0):  # transformers then drops the first patch
            feature = "patch" if strategy == "default" or before == 0 else "cls_patch"
            tokens = extract_features(
                tower, pixel_values, select_layer=layer, select_feature=feature, pooled=False
            ).tokens
            assert tokens is not None
            return tokens
    hidden = tower(pixel_values.to(tower.dtype), output_hidden_states=True).hidden_states
    layers = [layer] if isinstance(layer, int) else layer
    tokens = torch.cat([hidden[each] for each in layers], dim=-1)
    return tokens[:, 1:] if strategy == "default" else tokens


def tower_layout(encoder: VisionEncoder) -> dict[str, Any]:
    """The output of ``encoder`` in the terms of LLaVA's config: strategy, patch size, tokens beside the patch grid.

    Raises:
        ValueError: features that LLaVA's config cannot express, with the remedy.
    """
    config, feature = encoder.backbone.config, encoder.select_feature
    name = getattr(config, "model_type", type(encoder.backbone).__name__)
    if feature not in ("patch", "cls_patch"):
        raise ValueError(
            f"select_feature={feature!r} gives one vector per image; a language model needs the patch tokens: "
            "load the encoder with select_feature='patch'"
        )
    if not isinstance(encoder.select_layer, int):
        raise ValueError(f"select_layer={encoder.select_layer!r} is not an integer; load the encoder with -2 or -1")
    if not isinstance(getattr(config, "hidden_size", None), int):
        raise ValueError(
            f"{name} gives feature maps without a hidden_size, which LLaVA's layout cannot hold; "
            "use a transformer tower (CLIP, SigLIP, DINOv2, ViT)"
        )
    size, patch = encoder.image_size, encoder.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    grid = (height // patch) * (width // patch)
    before = family_of(encoder.backbone).num_prefix_tokens(config)
    if before <= 1:
        keeps_all = feature == "cls_patch" or before == 0
        strategy = "full" if keeps_all else "default"
        return {
            "strategy": strategy,
            "patch_size": patch,
            "additional": before,
            "num_tokens": grid + before * keeps_all,
            "select_feature": feature,
        }
    if feature == "patch":
        raise ValueError(
            f"{name} puts {before} tokens before its patches, but LLaVA's layout can drop only one; "
            "load the encoder with select_feature='cls_patch' to keep them all"
        )
    logger.info("%s: the language model also receives its %d register tokens", name, before - 1)
    return {
        "strategy": "full",
        "patch_size": patch,
        "additional": before,
        "num_tokens": grid + before,
        "select_feature": None,  # transformers' selection: our cls_patch drops the registers
    }


def fit_processor(model: Any, processor: Any, path: str) -> None:
    """Sets the number of tokens per image in config and processor to that of the tower; logs corrections.

    Older LLaVA checkpoints have an unused ``image_seq_length`` and processors without a patch size.

    Raises:
        ValueError: images of a different size than the tower's.
    """
    config: Any = model.config
    token = processor.image_token_id
    blank = ImageTransform(processor.image_processor, train=False)([Image.new("RGB", (64, 64))])
    size = config.vision_config.image_size
    if tuple(blank.shape[-2:]) != ((size, size) if isinstance(size, int) else tuple(size)):
        raise ValueError(
            f"{path}: the processor gives images of {tuple(blank.shape[-2:])} pixels, but the vision tower takes "
            f"{size}; correct the size of the image processor in processor_config.json"
        )
    tower = next(model.model.vision_tower.parameters())
    with torch.no_grad():
        tokens = tower_tokens(model, blank.to(tower.device, tower.dtype)).shape[1]
    patch = config.vision_config.patch_size
    wanted = {
        "patch_size": patch,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": tokens
        - (blank.shape[-2] // patch) * (blank.shape[-1] // patch)
        + (config.vision_feature_select_strategy == "default"),
    }
    changed = []
    for holder, values in ((config, {"image_seq_length": tokens, "image_token_id": token}), (processor, wanted)):
        for name, value in values.items():
            if (was := getattr(holder, name)) != value:
                changed.append(f"{name}={was} -> {value}")
                setattr(holder, name, value)
    if changed:
        logger.warning("%s: corrected to the vision tower's output: %s", path, ", ".join(changed))
