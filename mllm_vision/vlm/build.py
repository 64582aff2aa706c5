"""``build_vlm``: a LLaVA-style model from an encoder, a projector and any causal language model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mllm_vision.encoder import VisionEncoder
from mllm_vision.encoder.families import family_of
from mllm_vision.encoder.features import num_layers
from mllm_vision.errors import reading, unknown_name
from mllm_vision.modules.projectors import PROJECTORS, build_projector
from mllm_vision.vlm.language_model import (
    check_generation,
    decoder_of,
    fold_factor,
    load_language_model,
    logit_factor,
)
from mllm_vision.vlm.model import VisionLanguageModel
from mllm_vision.vlm.tokens import load_tokenizer, pad_left, settle_ends

logger = logging.getLogger(__name__)
IMAGE_TOKEN = "<image>"


def build_vlm(
    encoder: VisionEncoder,
    llm: str | Path | PreTrainedModel,
    projector: str = "mlp",
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    chat_template: str | None = None,
    *,
    image_token: str = IMAGE_TOKEN,
    dtype: torch.dtype | str = torch.float32,
    blind: bool = False,
    token: str | None = None,
    revision: str | None = None,
) -> tuple[VisionLanguageModel, LlavaProcessor]:
    """Connects ``encoder`` to ``llm`` by a new projector; tower and language model keep their weights.

    The given modules are not copied. Missing image and padding tokens are added to the tokenizer; embeddings grow as
    needed, and each new row is the mean of the old ones.

    Args:
        encoder: its ``select_layer`` and ``select_feature`` decide which tokens the language model sees.
        llm: a causal language model, or the path or Hub id of one.
        projector: one of ``list_projectors()``.
        tokenizer: by default the one saved with ``llm``; required when ``llm`` is a model.
        chat_template: a Jinja template with generation marks, set on the processor; None keeps the tokenizer's.
        image_token: the token of an image.
        dtype: of the language model and the projector, when ``llm`` is a path; "auto" keeps the checkpoint's.
        blind: replace every image by zeros (an ablation).
        token, revision: for a language model on the Hub.

    Returns:
        The model (everything trainable; see ``vlm.freezing.freeze``) and its ``LlavaProcessor``.

    Raises:
        ValueError: an unknown projector, a tower or a language model that LLaVA's layout cannot represent, a model
            without tokenizer.
        OSError: ``llm`` cannot be read.
    """
    if projector not in PROJECTORS:
        raise ValueError(unknown_name("projector", projector, PROJECTORS))
    layout = tower_layout(encoder)
    if isinstance(llm, PreTrainedModel):
        language_model = llm
        if tokenizer is None:
            raise ValueError("llm is a model, which carries no tokenizer: pass tokenizer=, or the path of the model")
    else:
        source, hub = str(llm), {"token": token, "revision": revision}
        with reading(source):
            language_model = load_language_model(source, dtype, **hub)
            if tokenizer is None:
                tokenizer = load_tokenizer(source, **hub)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        with reading(tokenizer):
            tokenizer = load_tokenizer(str(tokenizer))
    base = decoder_of(language_model)
    factor = logit_factor(language_model, base)
    table: Any = language_model.get_input_embeddings().weight
    rows = table.shape[0]
    if len(tokenizer) > rows:
        logger.warning(
            "the tokenizer has %d tokens, but %s has embeddings for only %d: is it the tokenizer of this model? The "
            "others are initialised to the mean",
            len(tokenizer),
            type(language_model).__name__,
            rows,
        )
    image_token_id = prepare_tokenizer(tokenizer, image_token)
    grow_embeddings(language_model, len(tokenizer))
    if factor != 1:
        fold_factor(language_model, factor)
    tied = _settle_tying(language_model, base)

    base.config.pad_token_id = tokenizer.pad_token_id
    config = LlavaConfig(  # type: ignore[call-arg]
        vision_config=encoder.backbone.config,
        text_config=base.config,
        image_token_index=image_token_id,
        image_seq_length=layout["num_tokens"],
        projector_hidden_act=PROJECTORS[projector].hidden_act,
        vision_feature_select_strategy=layout["strategy"],
        # 0 (the embeddings) counted from the end: transformers' Llava takes a plain 0 for "no hidden states"
        vision_feature_layer=encoder.select_layer or -(num_layers(encoder.backbone) + 1),
        tie_word_embeddings=tied,
        mllm_vision={"projector": projector, "select_feature": layout["select_feature"], "blind": blind},
    )
    with torch.device("meta"):  # every part is replaced below, so nothing is allocated twice
        model = VisionLanguageModel(config)
    model.config.vision_config, model.config.text_config = encoder.backbone.config, base.config
    model.model.vision_tower = encoder.backbone
    model.model.language_model = base
    model.lm_head = language_model.get_output_embeddings()
    width = encoder.backbone.config.hidden_size
    model.model.multi_modal_projector = build_projector(projector, width, base.config.hidden_size).to(
        model.lm_head.weight
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    processor = LlavaProcessor(
        image_processor=encoder.processor,
        tokenizer=tokenizer,
        patch_size=layout["patch_size"],
        vision_feature_select_strategy=layout["strategy"],
        num_additional_image_tokens=layout["additional"],
        chat_template=tokenizer.chat_template,
        image_token=image_token,
    )
    if processor.image_token_id != image_token_id:
        raise ValueError(
            f"the tokenizer splits {image_token!r} (first id {processor.image_token_id}, its own id {image_token_id}); "
            "choose another image_token"
        )
    # The language model's sampling settings are dropped: a LLaVA answers greedily by default.
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id)
    settle_ends(model, processor, [language_model.config, language_model.generation_config])
    check_generation(model.eval(), type(language_model).__name__)
    return model, processor


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


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, image_token: str = IMAGE_TOKEN) -> int:
    """Adds missing image and padding tokens to ``tokenizer``; returns the image token's id.

    Padding is on the left, as generation needs it (training collates its own batches). The end-of-sequence token is
    never used for padding, because the model must learn it.

    Raises:
        ValueError: no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, so no answer could end; set one before building")
    if image_token not in tokenizer.all_special_tokens:
        # Even if the vocabulary contains it (the id stays): only special tokens are never split.
        tokenizer.add_special_tokens({"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    pad_left(tokenizer)
    return tokenizer.convert_tokens_to_ids(image_token)  # type: ignore[return-value]


@torch.no_grad()
def grow_embeddings(language_model: PreTrainedModel, size: int) -> int:
    """Grows the embeddings to ``size`` tokens; new input and output rows are the mean. Returns the rows added."""
    table: Any = language_model.get_input_embeddings().weight
    old = table.shape[0]
    if size <= old:
        return 0
    # transformers' mean_resizing samples around the mean, so equal runs would differ by the random state.
    language_model.resize_token_embeddings(size, mean_resizing=False)
    for layer in {language_model.get_input_embeddings(), language_model.get_output_embeddings()}:
        layer.weight[old:] = layer.weight[:old].mean(dim=0)
    logger.info("embeddings grown from %d to %d rows (new rows: the mean)", old, size)
    return size - old


def _settle_tying(language_model: PreTrainedModel, base: PreTrainedModel) -> bool:
    """Whether input and output embeddings stay tied, which LLaVA supports only for ``embed_tokens``.

    For other layouts (GPT-2's ``wte``) the output layer becomes a copy, so that the checkpoint stays loadable.
    """
    embeddings, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    tied = head.weight is embeddings.weight
    if tied and getattr(base, "embed_tokens", None) is not embeddings:
        head.weight = nn.Parameter(head.weight.detach().clone())
        tied = False
        logger.info("%s: output embeddings untied, as LLaVA's layout cannot tie them", type(base).__name__)
    for config in (language_model.config, base.config):
        config.tie_word_embeddings = tied
    return tied
