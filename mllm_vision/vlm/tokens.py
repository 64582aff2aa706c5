"""What generation needs of a tokenizer: where a turn stops, and padding on the left."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from mllm_vision.data.chat import ChatTokenizer
from mllm_vision.data.prompts import chat_template_of, prompt_text, tokens_before_answer

logger = logging.getLogger(__name__)
_SAMPLE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def pad_left(tokenizer: Any) -> None:
    """Pad on the left, where a batch of prompts needs it; saved with the tokenizer too.

    Only what is among its initial settings is written to ``tokenizer_config.json`` (transformers 5.23).
    """
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"


def special_ids(tokenizer: Any) -> set[int]:
    """Ids that are no words: the named special tokens and every added one."""
    return {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}


def turn_end(processor: Any) -> int | None:
    """The token that ends an answer as the chat template writes it: the last special one that is learnt.

    None where the template says nothing of it: no generation marks, or an answer that ends in words.
    """
    template = chat_template_of(processor)
    if not template or "generation" not in template:
        return None
    tokenizer = processor.tokenizer
    chat = ChatTokenizer(tokenizer, template, getattr(processor, "image_token", "<image>"))
    [(ids, mask)] = chat([_SAMPLE])
    specials = special_ids(tokenizer)
    after: list[int] = []
    for token in reversed([int(token) for token, learnt in zip(ids, mask, strict=True) if learnt]):
        if token in specials:
            return None if tokenizer.decode(after[::-1]).strip() else token
        after.append(token)
    return None


def _ids(value: Any) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else {int(each) for each in value}


def known_ends(tokenizer: Any, configs: Iterable[Any]) -> set[int]:
    """End tokens of the tokenizer and of all ``configs`` (model and generation configs; None is left out)."""
    ends = _ids(tokenizer.eos_token_id)
    for config in configs:
        ends |= _ids(getattr(config, "eos_token_id", None))
    return ends


def stop_ids(model: Any, processor: Any, configs: Iterable[Any] = ()) -> list[int]:
    """Every token that ends an answer of ``model``: those its generation config names, the tokenizer's end, the end
    of a turn of the chat template, and those of ``configs``. Sorted."""
    ends = known_ends(processor.tokenizer, [getattr(model, "generation_config", None), *configs])
    return sorted(ends | ({end} if (end := turn_end(processor)) is not None else set()))


def settle_ends(model: Any, processor: Any, configs: Iterable[Any] = ()) -> None:
    """Write ``stop_ids`` into ``model.generation_config``, so that plain transformers stops there too.

    A template that teaches no end is warned about.
    """
    ends, config = stop_ids(model, processor, configs), model.generation_config
    config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    if config.pad_token_id is None:
        config.pad_token_id = processor.tokenizer.pad_token_id
    if "generation" not in (chat_template_of(processor) or ""):
        return
    prompt = prompt_text(processor, _SAMPLE[:1])
    if len(tokens_before_answer(processor.tokenizer, prompt)) < len(
        processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ):
        logger.warning(
            "the chat template's prompt ends with a space that the tokenizer joins to the answer's first word, so "
            "plain transformers begins answers otherwise than training did: put the space after {% generation %}"
        )
    if turn_end(processor) is None:
        logger.warning(
            "the answers of the chat template end with no special token, so nothing teaches the model where to stop: "
            "put {{ eos_token }} before {% endgeneration %}"
        )
