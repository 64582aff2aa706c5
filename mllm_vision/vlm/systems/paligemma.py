"""PaliGemma (arXiv:2407.07726) on ``PaliGemmaForConditionalGeneration``.

The tower's last tokens (all of them) pass one linear layer. Image and prompt attend to each other in both directions,
the answer is causal. The layer starts at zero, as in the official code.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.paligemma.modeling_paligemma import PaliGemmaMultiModalProjector

from mllm_vision.data.images.layouts import FixedLayout, ImageLayout
from mllm_vision.encoder import VisionEncoder
from mllm_vision.encoder.families import family_of
from mllm_vision.vlm.language_model import JoinedLanguageModel
from mllm_vision.vlm.systems.base import Parts, System
from mllm_vision.vlm.tokens import check_image_token

logger = logging.getLogger(__name__)


class PaliGemma(System):
    """PaliGemma: any transformer tower, one linear layer, and full attention over image and prompt.

    Prompts follow PaliGemmaProcessor (chat template "paligemma"): the images, the beginning token, the question and a
    line break.
    """

    name: ClassVar[str] = "paligemma"
    softcap: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True
    parts: ClassVar[Parts] = Parts(
        encoder=["model.vision_tower"],
        connector=["model.multi_modal_projector"],
        language_model=["model.language_model", "lm_head"],
    )

    def processor(self, encoder: VisionEncoder, tokenizer: Any) -> PaliGemmaProcessor:
        if tokenizer.bos_token is None:
            raise ValueError("PaliGemma's prompts contain a beginning token; set the tokenizer's bos_token")
        image_processor = encoder.processor
        image_processor.image_seq_length = _num_tokens(encoder)
        return PaliGemmaProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template)

    def build(self, encoder: VisionEncoder, language: JoinedLanguageModel, processor: Any) -> PreTrainedModel:
        text: Any = language.base.config
        text.use_bidirectional_attention = True  # language models but Gemma have no such field
        config = PaliGemmaConfig(
            vision_config=encoder.backbone.config,
            text_config=text,
            image_token_index=language.image_token_id,
            vocab_size=text.vocab_size,
            projection_dim=text.hidden_size,
            hidden_size=text.hidden_size,
            tie_word_embeddings=language.tied,
        )
        with torch.device("meta"):  # every part is replaced below, so nothing is allocated twice
            model: Any = PaliGemmaForConditionalGeneration(config)
        model.config.vision_config, model.config.text_config = encoder.backbone.config, text
        connector = PaliGemmaMultiModalProjector(config)
        torch.nn.init.zeros_(connector.linear.weight)
        torch.nn.init.zeros_(connector.linear.bias)
        model.model.vision_tower = encoder.backbone
        model.model.language_model, model.lm_head = language.base, language.head
        model.model.multi_modal_projector = connector.to(language.head.weight)
        return model

    def load_processor(self, model: Any, path: str, **hub: Any) -> Any:
        processor = super().load_processor(model, path, **hub)
        if not isinstance(processor, PaliGemmaProcessor):
            raise ValueError(f"{path} has no PaliGemmaProcessor but a {type(processor).__name__}; save one beside it")
        check_image_token(model, processor, path)
        return processor

    def layout(self, model: Any, processor: Any) -> ImageLayout:
        return FixedLayout(model.config.image_token_id, processor.image_seq_length, processor.image_processor)

    def features(self, model: Any, images: Mapping[str, Tensor]) -> Tensor:
        tower = model.model.vision_tower
        return tower(images["pixel_values"].to(tower.dtype)).last_hidden_state

    def connect(self, model: Any, features: Tensor, images: Mapping[str, Tensor]) -> Tensor:
        connector = model.model.multi_modal_projector
        return connector(features.to(connector.linear.weight.dtype)).flatten(0, 1)

    def image_output(self, tokens: Tensor) -> dict[str, Any]:
        return {"image": BaseModelOutputWithPooling(pooler_output=tokens)}

    def decode(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        image_tokens: Tensor | None,
        answers: Tensor | None,
    ) -> Tensor:
        # 0: the prompt, in both directions; 1: from the first supervised token on
        kinds = torch.zeros_like(input_ids) if answers is None else (answers.cumsum(dim=1) > 0).long()
        images = {} if image_tokens is None else {"mm_encoder_outputs": self.image_output(image_tokens)}
        return model.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=None if position_ids is None else position_ids + 1,  # PaliGemma counts from 1
            token_type_ids=kinds,
            use_cache=False,
            **images,
        ).last_hidden_state

    def head(self, model: Any) -> tuple[Tensor, Tensor | None, float | None]:
        return (
            model.lm_head.weight,
            model.lm_head.bias,
            getattr(model.config.text_config, "final_logit_softcapping", None),
        )

    def generate(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, image_tokens: Tensor | None, **options: Any
    ) -> Tensor:
        options["token_type_ids"] = torch.zeros_like(input_ids)
        return super().generate(model, input_ids, attention_mask, image_tokens, **options)


def _num_tokens(encoder: VisionEncoder) -> int:
    """Tokens of the tower's last hidden state."""
    config = encoder.backbone.config
    if not isinstance(getattr(config, "hidden_size", None), int):
        raise ValueError(
            f"{config.model_type} gives feature maps, but PaliGemma takes a sequence of tokens; use a transformer "
            "tower (SigLIP, CLIP, DINOv2, ViT)"
        )
    if encoder.select_layer != -1:
        logger.info("PaliGemma reads the tower's last hidden state; select_layer=%s is not used", encoder.select_layer)
    grid = encoder.image_size // encoder.patch_size
    return grid * grid + family_of(encoder.backbone).num_prefix_tokens(config)
