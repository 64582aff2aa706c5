"""Idefics2 (arXiv:2405.02246) on ``Idefics2ForConditionalGeneration``.

Images keep their aspect within bounds of their sides. The tower's tokens pass a gated MLP, and a perceiver reads them
into a fixed number of latents.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Idefics2Config, Idefics2ForConditionalGeneration, Idefics2Processor, PreTrainedModel
from transformers.models.idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

from mllm_vision.data.chat.prompts import prompt_text
from mllm_vision.data.images.layouts import ImageLayout, NativeAspectLayout
from mllm_vision.encoder import VisionEncoder
from mllm_vision.vlm.language_model import JoinedLanguageModel
from mllm_vision.vlm.systems.base import Parts, System
from mllm_vision.vlm.systems.tiled import pixels_of, square_side
from mllm_vision.vlm.tokens import check_image_token
from mllm_vision.vlm.towers import check_tower, convert_tower

_FAKE, _END = "<fake_token_around_image>", "<end_of_utterance>"
_PROBE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]


class Idefics2(System):
    """Idefics2: a SigLIP tower (converted exactly) in native aspect, an MLP and a perceiver."""

    @dataclasses.dataclass
    class Config:
        longest_edge: int | None = dataclasses.field(
            default=None, metadata={"help": "The longer side of an image, at most; by default the encoder's."}
        )
        shortest_edge: int | None = dataclasses.field(
            default=None, metadata={"help": "The shorter side, at least; by default 378/980 of the longer one."}
        )
        image_splitting: bool = dataclasses.field(
            default=False, metadata={"help": "Give an image as its four quarters and itself."}
        )
        num_latents: int = dataclasses.field(default=64, metadata={"help": "Image tokens an image."})
        perceiver_layers: int = dataclasses.field(default=3, metadata={"help": "Layers of the perceiver."})
        perceiver_heads: int = dataclasses.field(default=16, metadata={"help": "Heads of the perceiver."})
        perceiver_head_dim: int = dataclasses.field(default=96, metadata={"help": "Width of each of its heads."})
        perceiver_key_value_heads: int = dataclasses.field(default=4, metadata={"help": "Key and value heads of it."})

    name: ClassVar[str] = "idefics2"
    tokens: ClassVar[tuple[str, ...]] = (_FAKE, _END)
    parts: ClassVar[Parts] = Parts(
        encoder=["model.vision_model"],
        connector=["model.connector"],
        language_model=["model.text_model", "lm_head"],
    )

    def processor(self, encoder: VisionEncoder, tokenizer: Any) -> Idefics2Processor:
        check_tower(encoder.backbone, "idefics2_vision")
        settings: Any = self.config
        longest = settings.longest_edge or square_side(encoder, "Idefics2")
        shortest = settings.shortest_edge or round(longest * 378 / 980)
        if not encoder.patch_size <= shortest <= longest:
            raise ValueError(
                f"shortest_edge={shortest} and longest_edge={longest} must be patch ({encoder.patch_size}) <= shortest "
                "<= longest, so that an image has at least one whole patch"
            )
        image_processor = Idefics2ImageProcessorPil(
            size={"shortest_edge": shortest, "longest_edge": longest},
            do_image_splitting=settings.image_splitting,
            **pixels_of(encoder.processor),
        )
        return Idefics2Processor(
            image_processor, tokenizer, settings.num_latents, chat_template=tokenizer.chat_template
        )

    def build(self, encoder: VisionEncoder, language: JoinedLanguageModel, processor: Any) -> PreTrainedModel:
        text: Any = language.base.config
        missing = [name for name in ("intermediate_size", "hidden_act") if getattr(text, name, None) is None]
        if missing:
            raise ValueError(
                f"Idefics2's connector takes {' and '.join(missing)} of the language model's config, which a "
                f"{text.model_type} does not have; use a Llama, Mistral or Qwen model"
            )
        settings: Any = self.config
        tower = convert_tower(encoder.backbone, "idefics2_vision")
        perceiver = Idefics2PerceiverConfig(
            hidden_size=text.hidden_size,
            rms_norm_eps=getattr(text, "rms_norm_eps", 1e-6),
            resampler_n_latents=settings.num_latents,
            resampler_depth=settings.perceiver_layers,
            resampler_n_heads=settings.perceiver_heads,
            resampler_head_dim=settings.perceiver_head_dim,
            num_key_value_heads=settings.perceiver_key_value_heads,
        )
        config = Idefics2Config(
            vision_config=tower.config,
            text_config=text,
            perceiver_config=perceiver,
            image_token_id=language.image_token_id,
            tie_word_embeddings=language.tied,
            use_cache=getattr(text, "use_cache", True),
        )
        with torch.device("meta"):  # every part is replaced below, so nothing is allocated twice
            model: Any = Idefics2ForConditionalGeneration(config)
        model.config.vision_config, model.config.text_config = tower.config, text
        model.model.vision_model = tower
        model.model.text_model, model.lm_head = language.base, language.head
        model.model.connector = Idefics2Connector(model.config).to(language.head.weight)
        return model

    def layout(self, model: Any, processor: Any) -> ImageLayout:
        if re.search(rf"{re.escape(processor.image_token)}[^\s<]", text := prompt_text(processor, _PROBE)):
            raise ValueError(
                f"the chat template writes text directly behind an image ({text!r}), where Idefics2Processor puts a "
                "space in use; put a space or a line break behind the image, or choose another --chat_template"
            )
        around = processor.tokenizer.convert_tokens_to_ids(_FAKE)
        tokens = model.config.perceiver_config.resampler_n_latents
        return NativeAspectLayout(model.config.image_token_id, tokens, processor.image_processor, around)

    def load_processor(self, model: Any, path: str, **hub: Any) -> Any:
        processor = super().load_processor(model, path, **hub)
        if not isinstance(processor, Idefics2Processor):
            raise ValueError(f"{path} has no Idefics2Processor (found: {type(processor).__name__}); save one beside it")
        check_image_token(model, processor, path)
        return processor

    def blank(self, model: Any) -> dict[str, Tensor]:
        pixels = super().blank(model)["pixel_values"]
        return {"pixel_values": pixels, "pixel_attention_mask": torch.ones_like(pixels[:, 0], dtype=torch.long)}

    def features(self, model: Any, images: Mapping[str, Tensor]) -> Tensor:
        tower = model.model.vision_model
        pixels = images["pixel_values"].to(tower.dtype)
        return tower(pixel_values=pixels, patch_attention_mask=_patches(model, images)).last_hidden_state

    def connect(self, model: Any, features: Tensor, images: Mapping[str, Tensor]) -> Tensor:
        connector = model.model.connector
        features = features.to(connector.modality_projection.gate_proj.weight.dtype)
        return connector(features, attention_mask=_patches(model, images).flatten(1)).flatten(0, 1)


def _patches(model: Any, images: Mapping[str, Tensor]) -> Tensor:
    """Which patches are the image's as a whole, bool ``[n, rows, columns]``."""
    size = model.config.vision_config.patch_size
    grid = images["pixel_attention_mask"].unfold(1, size, size).unfold(2, size, size)
    return grid.sum(dim=(-1, -2)) == size * size
