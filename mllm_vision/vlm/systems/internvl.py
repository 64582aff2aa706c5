"""InternVL 1.5 to 3 (arXiv:2404.16821, arXiv:2412.05271) on ``InternVLForConditionalGeneration``.

An image becomes 1 to `max_tiles` tiles in the grid nearest to its aspect, and a thumbnail behind several. Four
neighbouring patch tokens are joined by a pixel shuffle, then pass a norm and an MLP of two layers.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BatchFeature,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from mllm_vision.data.images.layouts import ImageLayout, TilesLayout
from mllm_vision.encoder import VisionEncoder
from mllm_vision.vlm.language_model import JoinedLanguageModel
from mllm_vision.vlm.systems.base import Parts, System
from mllm_vision.vlm.systems.tiled import pixels_of, square_side
from mllm_vision.vlm.tokens import check_image_token
from mllm_vision.vlm.towers import check_tower, convert_tower

logger = logging.getLogger(__name__)
_SHUFFLE = 2  # patches along a side that become one token: the class's downsample_ratio of 0.5
_START, _END, _VIDEO = "<img>", "</img>", "<video>"


class InternVLFiles:
    """Image processor and tokenizer of an InternVL, saved as transformers' `InternVLProcessor` reads them.

    That class itself asks for a video processor, which needs torchvision. A folder written here is read by
    `AutoProcessor` where torchvision is installed, and by `AutoTokenizer` and `AutoImageProcessor` without it.

    Args:
        image_processor: a `GotOcr2ImageProcessor`.
        tokenizer: has the image token, `<img>`, `</img>` and `<video>` as special tokens.
        image_seq_length: image tokens a tile.
        image_token: stands for an image in a text.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, image_seq_length: int, image_token: str) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.image_seq_length, self.image_token = int(image_seq_length), image_token
        self.chat_template = tokenizer.chat_template
        names = {"start_image_token": _START, "end_image_token": _END, "context_image_token": image_token}
        names["video_token"] = _VIDEO
        known = tokenizer.SPECIAL_TOKENS_ATTRIBUTES
        tokenizer.SPECIAL_TOKENS_ATTRIBUTES = [*known, *(name for name in names if name not in known)]
        for name, token in names.items():  # `InternVLProcessor` reads them from the tokenizer, which saves them
            setattr(tokenizer, name, token)
        self.image_token_id = tokenizer.context_image_token_id
        self.start_image_token_id, self.end_image_token_id = (
            tokenizer.start_image_token_id,
            tokenizer.end_image_token_id,
        )

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None, **options: Any) -> BatchFeature:
        """Texts with one image token an image, and the images in their order, as the model's inputs.

        Args:
            images: PIL images, one or a list.
            text: one or several.
            options: of the tokenizer.
        """
        texts = [text] if isinstance(text, str) else list(text or [""])
        given = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
        found: dict[str, Any] = {}
        counts: list[int] = []
        if given:
            tiles = self.image_processor(images=given, crop_to_patches=True, return_tensors="pt")
            found["pixel_values"], counts = tiles["pixel_values"], tiles["num_patches"].tolist()
        if (places := sum(each.count(self.image_token) for each in texts)) != len(given):
            raise ValueError(f"{places} image tokens ({self.image_token}) in the text and {len(given)} images")
        left = iter(counts)
        for number, each in enumerate(texts):
            first, *others = each.split(self.image_token)
            marks = (f"{_START}{self.image_token * (next(left) * self.image_seq_length)}{_END}" for _ in others)
            texts[number] = first + "".join(mark + other for mark, other in zip(marks, others, strict=True))
        return BatchFeature({**self.tokenizer(texts, **options), **found})

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """As the tokenizer's, with this processor's template."""
        return self.tokenizer.apply_chat_template(conversation, chat_template=self.chat_template, **options)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the tokenizer with its chat template, and `processor_config.json`."""
        side = dict(self.image_processor.size)
        config = {
            "processor_class": "InternVLProcessor",
            "image_seq_length": self.image_seq_length,
            "image_processor": json.loads(self.image_processor.to_json_string()),
            "video_processor": {"video_processor_type": "InternVLVideoProcessor", "size": side},
        }
        self.tokenizer.chat_template = self.chat_template
        self.tokenizer.save_pretrained(path)
        file = Path(path) / "processor_config.json"
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class InternVL(System):
    """InternVL: a ViT or DINOv2 tower (converted exactly), tiles, a pixel shuffle and an MLP."""

    @dataclasses.dataclass
    class Config:
        min_tiles: int = dataclasses.field(default=1, metadata={"help": "Tiles of an image, at least."})
        max_tiles: int = dataclasses.field(default=12, metadata={"help": "Tiles of an image, without the thumbnail."})

    name: ClassVar[str] = "internvl"
    tokens: ClassVar[tuple[str, ...]] = (_START, _END, _VIDEO)
    parts: ClassVar[Parts] = Parts(
        encoder=["model.vision_tower"],
        connector=["model.multi_modal_projector"],
        language_model=["model.language_model", "lm_head"],
    )

    def processor(self, encoder: VisionEncoder, tokenizer: Any) -> InternVLFiles:
        check_tower(encoder.backbone, "internvl_vision")
        side, patch = square_side(encoder, "InternVL"), encoder.patch_size
        settings: Any = self.config
        if side // patch % _SHUFFLE:
            raise ValueError(
                f"InternVL joins 2 x 2 patches, but the tower has {side // patch} patches along a side of {side} px; "
                f"load the encoder with --image_size {side - side % (_SHUFFLE * patch)}"
            )
        if not 1 <= settings.min_tiles <= settings.max_tiles:
            raise ValueError(
                f"min_tiles={settings.min_tiles} and max_tiles={settings.max_tiles} must be 1 <= min <= max"
            )
        image_processor = GotOcr2ImageProcessorPil(
            size={"height": side, "width": side},
            crop_to_patches=True,
            min_patches=settings.min_tiles,
            max_patches=settings.max_tiles,
            **pixels_of(encoder.processor),
        )
        if encoder.select_layer != -1:
            logger.info(
                "InternVL reads the tower's last hidden state; select_layer=%s is not used", encoder.select_layer
            )
        return InternVLFiles(image_processor, tokenizer, (side // patch // _SHUFFLE) ** 2, self.image_token)

    def build(self, encoder: VisionEncoder, language: JoinedLanguageModel, processor: Any) -> PreTrainedModel:
        tower = convert_tower(encoder.backbone, "internvl_vision")
        config = InternVLConfig(
            vision_config=tower.config,
            text_config=language.base.config,
            image_token_id=language.image_token_id,
            image_seq_length=processor.image_seq_length,
            downsample_ratio=1 / _SHUFFLE,
            tie_word_embeddings=language.tied,
        )
        with torch.device("meta"):  # every part is replaced below, so nothing is allocated twice
            model: Any = InternVLForConditionalGeneration(config)
        model.config.vision_config, model.config.text_config = tower.config, language.base.config
        model.model.vision_tower = tower
        model.model.language_model, model.lm_head = language.base, language.head
        model.model.multi_modal_projector = InternVLMultiModalProjector(model.config).to(language.head.weight)
        return model

    def layout(self, model: Any, processor: Any) -> ImageLayout:
        return TilesLayout(
            model.config.image_token_id,
            model.config.image_seq_length,
            processor.image_processor,
            processor.start_image_token_id,
            processor.end_image_token_id,
        )

    def load_processor(self, model: Any, path: str, **hub: Any) -> InternVLFiles:
        tokenizer = AutoTokenizer.from_pretrained(path, **hub)
        image_processor = AutoImageProcessor.from_pretrained(path, **hub)
        token: Any = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
        processor = InternVLFiles(image_processor, tokenizer, model.config.image_seq_length, token)
        check_image_token(model, processor, path)
        return processor

    def features(self, model: Any, images: Mapping[str, Tensor]) -> Tensor:
        tower = model.model.vision_tower
        return tower(images["pixel_values"].to(tower.dtype)).last_hidden_state[:, 1:]

    def connect(self, model: Any, features: Tensor, images: Mapping[str, Tensor]) -> Tensor:
        inner = model.model
        side = int(features.shape[1] ** 0.5)
        grid = features.reshape(len(features), side, side, -1).to(inner.multi_modal_projector.linear_1.weight.dtype)
        joined = inner.pixel_shuffle(grid, scale_factor=model.config.downsample_ratio).flatten(1, 2)
        return inner.multi_modal_projector(joined).flatten(0, 1)

    def image_output(self, tokens: Tensor) -> dict[str, Any]:
        return {"image": BaseModelOutputWithPooling(pooler_output=tokens)}
