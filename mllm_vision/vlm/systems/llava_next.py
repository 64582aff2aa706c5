"""LLaVA-NeXT (LLaVA-1.6; grids of OneVision, arXiv:2408.03326) on ``LlavaNextForConditionalGeneration``.

The image is seen whole and as a grid of tiles, each of the tower's size; of the grid's tokens those of the padding are
dropped, and a learned vector ends every row. The connector is LLaVA-1.5's.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor, PreTrainedModel
from transformers.models.llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector, image_size_to_num_patches

from mllm_vision.data.images.layouts import AnyResolutionLayout, ImageLayout
from mllm_vision.encoder import VisionEncoder
from mllm_vision.vlm.language_model import JoinedLanguageModel
from mllm_vision.vlm.systems.base import Parts, System
from mllm_vision.vlm.systems.llava import llava_fields, tower_layout, tower_tokens
from mllm_vision.vlm.systems.tiled import pixels_of, square_side
from mllm_vision.vlm.tokens import check_image_token


class LLaVANeXT(System):
    """LLaVA-NeXT: any square transformer tower, tiles of any resolution, an MLP of two layers."""

    @dataclasses.dataclass
    class Config:
        grids: list[str] = dataclasses.field(
            default_factory=lambda: ["1x2", "2x1", "2x2", "3x1", "1x3"],
            metadata={"help": "Grids of tiles (rows x columns) that an image may take."},
        )

    name: ClassVar[str] = "llava_next"
    parts: ClassVar[Parts] = Parts(
        encoder=["model.vision_tower"],
        connector=["model.multi_modal_projector", "model.image_newline"],
        language_model=["model.language_model", "lm_head"],
    )

    def processor(self, encoder: VisionEncoder, tokenizer: Any) -> LlavaNextProcessor:
        layout, side = tower_layout(encoder), square_side(encoder, "LLaVA-NeXT")
        if layout["additional"] and layout["strategy"] == "full":
            raise ValueError(
                "LLaVA-NeXT cuts the grid of patches, so no other token may be kept: load the encoder with "
                "select_feature='patch', or choose a tower without register tokens"
            )
        settings: Any = self.config
        image_processor = LlavaNextImageProcessorPil(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=[[rows * side, columns * side] for rows, columns in map(_grid, settings.grids)],
            **pixels_of(encoder.processor),
        )
        return LlavaNextProcessor(
            image_processor=image_processor,
            tokenizer=tokenizer,
            patch_size=layout["patch_size"],
            vision_feature_select_strategy=layout["strategy"],
            num_additional_image_tokens=layout["additional"],
            chat_template=tokenizer.chat_template,
            image_token=self.image_token,
        )

    def build(self, encoder: VisionEncoder, language: JoinedLanguageModel, processor: Any) -> PreTrainedModel:
        pinpoints = processor.image_processor.image_grid_pinpoints
        config = LlavaNextConfig(image_grid_pinpoints=pinpoints, **llava_fields(encoder, language))
        with torch.device("meta"):  # every part is replaced below, so nothing is allocated twice
            model: Any = LlavaNextForConditionalGeneration(config)
        model.config.vision_config, model.config.text_config = encoder.backbone.config, language.base.config
        weight = language.head.weight
        model.model.vision_tower = encoder.backbone
        model.model.language_model, model.lm_head = language.base, language.head
        model.model.multi_modal_projector = LlavaNextMultiModalProjector(model.config).to(weight)
        model.model.image_newline = nn.Parameter((torch.randn(weight.shape[1]) / weight.shape[1] ** 0.5).to(weight))
        return model

    def layout(self, model: Any, processor: Any) -> ImageLayout:
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size
        return AnyResolutionLayout(model.config.image_token_id, side, processor.image_processor)

    def blank(self, model: Any) -> dict[str, Tensor]:
        pixels = super().blank(model)["pixel_values"]
        height, width = model.config.image_grid_pinpoints[0]
        sizes = torch.tensor([[height, width]], device=pixels.device)
        return {"pixel_values": pixels.expand(_tiles(model, sizes.tolist())[0], -1, -1, -1), "image_sizes": sizes}

    def features(self, model: Any, images: Mapping[str, Tensor]) -> Tensor:
        return tower_tokens(model, images["pixel_values"])

    def connect(self, model: Any, features: Tensor, images: Mapping[str, Tensor]) -> Tensor:
        inner, config = model.model, model.config
        sizes = images["image_sizes"].tolist()
        projected = inner.multi_modal_projector(features.to(inner.multi_modal_projector.linear_1.weight.dtype))
        packed, _ = inner.pack_image_features(
            projected.split(_tiles(model, sizes)), sizes, config.vision_feature_select_strategy, inner.image_newline
        )
        return torch.cat(packed)

    def load_processor(self, model: Any, path: str, **hub: Any) -> Any:
        processor, config = super().load_processor(model, path, **hub), model.config
        if not isinstance(processor, LlavaNextProcessor):
            raise ValueError(
                f"{path} has no LlavaNextProcessor (found: {type(processor).__name__}); save one beside it"
            )
        check_image_token(model, processor, path)
        found = [list(each) for each in processor.image_processor.image_grid_pinpoints]
        if found != [list(each) for each in config.image_grid_pinpoints]:
            raise ValueError(
                f"{path}: the processor's image_grid_pinpoints={found} are not the model's "
                f"{config.image_grid_pinpoints}; correct processor_config.json"
            )
        return processor


def _grid(text: str) -> tuple[int, int]:
    """(rows, columns) of "2x3"."""
    if not re.fullmatch(r"[1-9]\d?x[1-9]\d?", str(text)):
        raise ValueError(f"grids={text!r} is not rows x columns, such as 2x3")
    rows, columns = str(text).split("x")
    return int(rows), int(columns)


def _tiles(model: Any, sizes: list[list[int]]) -> list[int]:
    """How many tiles an image of each (height, width) has, the whole image included."""
    config = model.config
    side = config.vision_config.image_size
    return [image_size_to_num_patches(size, config.image_grid_pinpoints, side) for size in sizes]
