"""Tokenizers for generation: end tokens of a turn, and padding on the left."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mllm_vision.data.chat.prompts import chat_template_of, has_marks, prompt_text, tokens_before_answer
from mllm_vision.data.chat.templates import ChatTokenizer
from mllm_vision.data.records.sampling import BadRow, judge
from mllm_vision.errors import short

logger = logging.getLogger(__name__)
# The form of special tokens in vocabularies that do not mark them; bytes ("<0x0A>") are ordinary tokens.
_MARK = re.compile(r"<(?!0x[0-9A-Fa-f]{2}>).+>$|\[.+\]$")
_SAMPLE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def pad_left(tokenizer: Any) -> None:
    """Sets padding on the left, as batches of prompts need it; saved with the tokenizer.

    ``tokenizer_config.json`` contains only the initial settings (transformers 5.23).
    """
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, image_token: str, others: Sequence[str] = ()) -> int:
    """Adds missing special tokens and a padding token to ``tokenizer``; returns the image token's id.

    Padding is on the left, as generation needs it (training collates its own batches). The end-of-sequence token is
    never used for padding, because the model must learn it.

    Raises:
        ValueError: no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, so no answer could end; set one before building")
    missing = [token for token in (image_token, *others) if token not in tokenizer.all_special_tokens]
    if missing:
        # Even if the vocabulary contains it (the id stays): only special tokens are never split.
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    pad_left(tokenizer)
    return tokenizer.convert_tokens_to_ids(image_token)  # type: ignore[return-value]


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the named special tokens and of every added token."""
    return {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}


def check_vocabulary(tokenizer: Any, source: str) -> None:
    """Raises ValueError for an empty tokenizer, which transformers creates if files are missing."""
    if not set(tokenizer.get_vocab().values()) - special_ids(tokenizer):
        raise ValueError(
            f"{source} has no vocabulary, so its tokenizer's files are missing; copy them into the folder, or, for a "
            "language model, name a tokenizer with --tokenizer"
        )


def check_image_token(model: Any, processor: Any, path: str) -> None:
    """Raises ValueError for an image token without embedding."""
    token, rows = processor.image_token_id, model.get_input_embeddings().weight.shape[0]
    if token >= rows:
        raise ValueError(
            f"{path}: the processor's image token {processor.image_token!r} has id {token}, beyond the {rows} "
            "embeddings of the language model; use the processor that was saved with the model"
        )


def load_tokenizer(source: str, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer at ``source`` (folder or Hub id), with a vocabulary.

    Raises:
        ValueError: it cannot be loaded.
        OSError: ``source`` cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **hub)
    except OSError:
        raise
    except Exception as error:  # many types, depending on the tokenizer that is missing or damaged
        raise ValueError(
            f"{source} has no tokenizer that can be read ({short(' '.join(str(error).split()))}); name one with "
            "--tokenizer"
        ) from error
    check_vocabulary(tokenizer, source)
    return tokenizer


def turn_end(processor: Any) -> tuple[int | None, bool]:
    """The token that ends an answer in the chat template, and whether it is trained on.

    It is the last special token that is trained on, or else the first one after it. (None, True) if the template does
    not define it: no generation marks, or it does not accept a dialogue without images.
    """
    template, tokenizer = chat_template_of(processor), processor.tokenizer
    if not has_marks(template) or not getattr(tokenizer, "is_fast", False):
        return None, True
    chat = ChatTokenizer(tokenizer, template, str(getattr(processor, "image_token", "<image>")))
    found = judge("the chat template", chat, [_SAMPLE])
    if isinstance(found, BadRow):
        return None, True
    [(ids, mask)] = found
    last = max((place for place, trained in enumerate(mask) if trained), default=len(ids) - 1)
    trained, behind = ids[mask].tolist(), ids[last + 1 :].tolist()
    specials = special_ids(tokenizer)
    for tokens, is_trained in ((trained[::-1], True), (behind, False)):
        place = next((place for place, token in enumerate(tokens) if token in specials), None)
        if place is not None and not tokenizer.decode(tokens[:place]).strip():
            return int(tokens[place]), is_trained
    return None, False


def _ids(value: Any) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else {int(each) for each in value}


def known_ends(tokenizer: Any, configs: Iterable[Any]) -> set[int]:
    """End tokens of the tokenizer and of all ``configs`` (model and generation configs, or None).

    An end token that is an ordinary token of this tokenizer (the default of a config) is ignored.
    """
    named: set[int] = set()
    for config in configs:
        named |= _ids(getattr(config, "eos_token_id", None))
    specials = special_ids(tokenizer)
    words = {token for token in named - specials if not _MARK.match(str(tokenizer.convert_ids_to_tokens(token)))}
    return _ids(tokenizer.eos_token_id) | named - words


def stop_ids(model: Any, processor: Any, configs: Iterable[Any] = ()) -> list[int]:
    """Sorted end tokens of ``model``'s answers: of its generation config, tokenizer, chat template and ``configs``."""
    ends = known_ends(processor.tokenizer, [getattr(model, "generation_config", None), *configs])
    end, _ = turn_end(processor)
    return sorted(ends if end is None else ends | {end})


def settle_ends(model: Any, processor: Any, configs: Iterable[Any] = ()) -> None:
    """Writes ``stop_ids`` into ``model.generation_config``, so that plain transformers stops there too.

    Warns about a template without an end token to train on, and about a prompt whose last space belongs to the answer.
    """
    ends, config = stop_ids(model, processor, configs), model.generation_config
    config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    if config.pad_token_id is None:
        config.pad_token_id = processor.tokenizer.pad_token_id
    if not turn_end(processor)[1]:
        logger.warning(
            "the answers of the chat template do not end with a special token that is trained on, so the model cannot "
            "learn to stop: put {{ eos_token }} before {% endgeneration %}"
        )
    prompt = judge("the chat template", prompt_text, processor, _SAMPLE[:1])
    if not has_marks(chat_template_of(processor)) or isinstance(prompt, BadRow):
        return
    whole = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if len(tokens_before_answer(processor.tokenizer, prompt)) < len(whole):
        logger.warning(
            "the chat template's prompt ends with a space that the tokenizer joins to the answer's first word, so "
            "plain transformers begins answers differently from training: put the space after {% generation %}"
        )
