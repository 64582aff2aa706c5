"""``build_vlm``: a system of the literature from an encoder, a new connector and any causal language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from mllm_vision.encoder import VisionEncoder
from mllm_vision.vlm.language_model import check_generation, join_language_model, open_language_model
from mllm_vision.vlm.systems import System, load_system
from mllm_vision.vlm.task import LanguageTask
from mllm_vision.vlm.tokens import prepare_tokenizer, settle_ends


def build_vlm(
    encoder: VisionEncoder,
    llm: str | Path | PreTrainedModel,
    system: str | System = "llava15",
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    chat_template: str | None = None,
    *,
    dtype: torch.dtype | str = torch.float32,
    blind: bool = False,
    token: str | None = None,
    revision: str | None = None,
    **settings: Any,
) -> tuple[LanguageTask, Any]:
    """Connects ``encoder`` to ``llm`` as a system does; tower and language model keep their weights.

    The given modules are not copied. Missing special tokens are added to the tokenizer; embeddings grow as needed, and
    each new row is the mean of the old ones.

    Args:
        encoder: its ``select_layer`` and ``select_feature`` decide which tokens the connector receives.
        llm: a causal language model, or the path or Hub id of one.
        system: one of ``list_systems()``, ``package.module:Class``, or a ``System``.
        tokenizer: by default the one saved with ``llm``; required when ``llm`` is a model.
        chat_template: a Jinja template with generation marks, set on the processor; None keeps the tokenizer's.
        dtype: of the language model and the connector, when ``llm`` is a path; "auto" keeps the checkpoint's.
        blind: replace every image by zeros (an ablation).
        token, revision: for a language model on the Hub.
        settings: fields of the system's ``Config``.

    Returns:
        The task (everything trainable; see ``vlm.freezing.freeze``) around the native model ``task.model``, and the
        system's processor.

    Raises:
        ValueError: an unknown system or setting, a tower or a language model that does not fit the system, a model
            without tokenizer.
        OSError: ``llm`` cannot be read.
    """
    if not isinstance(system, System):
        kind = load_system(system)
        system = kind(kind.Config(**settings))
    language_model, tokenizer = open_language_model(llm, tokenizer, dtype, token=token, revision=revision)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    # As a language model: once its head is replaced it could not say what it computes by itself.
    ends = [language_model.config, language_model.generation_config]
    image_token_id = prepare_tokenizer(tokenizer, system.image_token, system.tokens)
    processor = system.processor(encoder, tokenizer)
    if processor.image_token_id != image_token_id:
        raise ValueError(
            f"the tokenizer splits {system.image_token!r} (first id {processor.image_token_id}, its own id "
            f"{image_token_id}); choose another tokenizer"
        )
    language = join_language_model(language_model, tokenizer, image_token_id, softcap=system.softcap)
    model: Any = system.build(encoder, language, processor)
    # The language model's sampling settings are dropped: a system answers greedily by default.
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id)
    settle_ends(model, processor, ends)
    task = LanguageTask(model, system).eval()
    check_generation(task, type(language_model).__name__)
    task.blind = blind
    return task, processor
