"""BLIP-2 (arXiv:2301.12597), stages one and two of its language side, on ``Blip2ForConditionalGeneration``.

A Q-Former reads the frozen tower's tokens by cross-attention into a fixed number of queries; a linear layer projects
them to the language model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    PreTrainedModel,
)

from mllm_vision.data.images.layouts import FixedLayout, ImageLayout
from mllm_vision.encoder import VisionEncoder
from mllm_vision.vlm.language_model import JoinedLanguageModel
from mllm_vision.vlm.systems.base import Parts, System
from mllm_vision.vlm.tokens import check_image_token
from mllm_vision.vlm.towers import convert_tower


class BLIP2(System):
    """BLIP-2: a ViT or DINOv2 tower (converted exactly), a Q-Former, and any decoder-only language model.

    Prompts follow Blip2Processor (chat template "blip2"): the queries, the beginning token, the text.
    """

    @dataclasses.dataclass
    class Config:
        num_query_tokens: int = dataclasses.field(default=32, metadata={"help": "Queries of the Q-Former."})
        qformer_layers: int = dataclasses.field(default=12, metadata={"help": "Layers of the Q-Former."})
        qformer_width: int = dataclasses.field(default=768, metadata={"help": "Width of the Q-Former."})
        qformer_dropout: float = dataclasses.field(default=0.1, metadata={"help": "Dropout in the Q-Former."})

    name: ClassVar[str] = "blip2"
    parts: ClassVar[Parts] = Parts(
        encoder=["vision_model"],
        connector=["qformer", "query_tokens", "language_projection"],
        language_model=["language_model"],
    )

    def processor(self, encoder: VisionEncoder, tokenizer: Any) -> Blip2Processor:
        processor = Blip2Processor(encoder.processor, tokenizer, num_query_tokens=self.config.num_query_tokens)
        return _with_id(processor)

    def build(self, encoder: VisionEncoder, language: JoinedLanguageModel, processor: Any) -> PreTrainedModel:
        settings, name = self.config, type(language.model).__name__
        if language.factor != 1:
            raise ValueError(f"{name} scales its logits, which BLIP-2 would do twice; use another --llm (Llama, OPT)")
        heads = settings.qformer_width // 64 or 1
        if settings.qformer_width % heads:
            raise ValueError(f"qformer_width={settings.qformer_width} is not a multiple of 64, the width of its heads")
        tower = convert_tower(encoder.backbone, "blip_2_vision_model")
        qformer = Blip2QFormerConfig(
            hidden_size=settings.qformer_width,
            num_hidden_layers=settings.qformer_layers,
            num_attention_heads=heads,
            intermediate_size=4 * settings.qformer_width,
            hidden_dropout_prob=settings.qformer_dropout,
            attention_probs_dropout_prob=settings.qformer_dropout,
        )
        config = Blip2Config(
            vision_config=tower.config,
            qformer_config=qformer,
            text_config=language.model.config,
            num_query_tokens=settings.num_query_tokens,
            image_token_index=language.image_token_id,
        )
        with torch.device("meta"):  # every part is replaced below, so nothing is allocated twice
            model: Any = Blip2ForConditionalGeneration(config)
        model.config.vision_config, model.config.text_config = tower.config, language.model.config
        model.vision_model, model.language_model = tower, language.model
        weight = language.head.weight
        model.qformer = Blip2QFormerModel(model.config.qformer_config).to(weight)
        # transformers starts the queries at zero, where all of them stay equal
        queries = torch.randn(1, settings.num_query_tokens, settings.qformer_width) * qformer.initializer_range
        model.query_tokens = torch.nn.Parameter(queries.to(weight))
        model.language_projection = torch.nn.Linear(settings.qformer_width, weight.shape[1]).to(weight)
        return model

    def load_processor(self, model: Any, path: str, **hub: Any) -> Any:
        processor = super().load_processor(model, path, **hub)
        if not isinstance(processor, Blip2Processor):
            raise ValueError(f"{path} has no Blip2Processor (found: {type(processor).__name__}); save one beside it")
        check_image_token(model, _with_id(processor), path)
        return processor

    def layout(self, model: Any, processor: Any) -> ImageLayout:
        return FixedLayout(model.config.image_token_id, model.config.num_query_tokens, processor.image_processor)

    def features(self, model: Any, images: Mapping[str, Tensor]) -> Tensor:
        return model.vision_model(images["pixel_values"].to(model.vision_model.dtype)).last_hidden_state

    def connect(self, model: Any, features: Tensor, images: Mapping[str, Tensor]) -> Tensor:
        seen = torch.ones(features.shape[:-1], dtype=torch.long, device=features.device)
        read = model.qformer(
            query_embeds=model.query_tokens.expand(len(features), -1, -1),
            encoder_hidden_states=features,
            encoder_attention_mask=seen,
        ).last_hidden_state
        return model.language_projection(read.to(model.language_projection.weight.dtype)).flatten(0, 1)

    def decode(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        image_tokens: Tensor | None,
        answers: Tensor | None,
    ) -> Tensor:
        return model.language_model.base_model(
            inputs_embeds=self._embed(model, input_ids, image_tokens),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state

    def generate(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, image_tokens: Tensor | None, **options: Any
    ) -> Tensor:
        # the class's own `generate` runs tower and Q-Former again, and needs images
        embeds = self._embed(model, input_ids, image_tokens)
        options.setdefault("generation_config", model.generation_config)
        return model.language_model.generate(
            input_ids=input_ids, inputs_embeds=embeds, attention_mask=attention_mask, **options
        )

    def _embed(self, model: Any, input_ids: Tensor, image_tokens: Tensor | None) -> Tensor:
        embeds = model.get_input_embeddings()(input_ids)
        places = input_ids == model.config.image_token_id
        if image_tokens is None:
            return embeds
        if (count := int(places.sum())) != len(image_tokens):
            raise ValueError(f"{count} image tokens and {len(image_tokens)} image features do not match")
        return embeds.masked_scatter(places[..., None], image_tokens.to(embeds))


def _with_id(processor: Any) -> Any:
    """The processor with the id of its image token, which others have."""
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids(str(processor.image_token))
    return processor
