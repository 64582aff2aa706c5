"""What generation needs of a tokenizer: where a turn stops, and padding on the left."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mllm_vision.data.chat.prompts import chat_template_of, has_marks, prompt_text, tokens_before_answer
from mllm_vision.data.chat.templates import ChatTokenizer
from mllm_vision.data.records.sampling import BadRow, judge
from mllm_vision.errors import short

logger = logging.getLogger(__name__)
# What special tokens look like in vocabularies that do not say which they are; bytes ("<0x0A>") are words.
_MARK = re.compile(r"<(?!0x[0-9A-Fa-f]{2}>).+>$|\[.+\]$")
_SAMPLE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def pad_left(tokenizer: Any) -> None:
    """Pad on the left, where a batch of prompts needs it; saved with the tokenizer too.

    Only what is among its initial settings is written to ``tokenizer_config.json`` (transformers 5.23).
    """
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"


def special_ids(tokenizer: Any) -> set[int]:
    """Ids that are no words: the named special tokens and every added one."""
    return {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}


def check_vocabulary(tokenizer: Any, source: str) -> None:
    """ValueError for a tokenizer without words: transformers makes an empty one where its files are missing."""
    if not set(tokenizer.get_vocab().values()) - special_ids(tokenizer):
        raise ValueError(
            f"{source} has no vocabulary, so its tokenizer's files are missing there; copy them into the folder, or, "
            "for a language model, name a tokenizer with --tokenizer"
        )


def load_tokenizer(source: str, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer at ``source`` (folder or Hub id), with a vocabulary.

    Raises:
        ValueError: none can be made of what lies there.
        OSError: ``source`` cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **hub)
    except OSError:
        raise
    except Exception as error:  # of many kinds, by the tokenizer that is missing or damaged
        raise ValueError(
            f"{source} has no tokenizer that can be read ({short(' '.join(str(error).split()))}); name one with "
            "--tokenizer"
        ) from error
    check_vocabulary(tokenizer, source)
    return tokenizer


def turn_end(processor: Any) -> tuple[int | None, bool]:
    """The token that ends an answer as the chat template writes it, and whether it is learnt.

    It is the last special token among what is learnt, or else the first one behind it. (None, True) where the template
    cannot say: no generation marks, or a text alone is no dialogue to it.
    """
    template, tokenizer = chat_template_of(processor), processor.tokenizer
    if not has_marks(template) or not getattr(tokenizer, "is_fast", False):
        return None, True
    chat = ChatTokenizer(tokenizer, template, getattr(processor, "image_token", "<image>"))
    found = judge("the chat template", chat, [_SAMPLE])
    if isinstance(found, BadRow):
        return None, True
    [(ids, mask)] = found
    last = max((place for place, learnt in enumerate(mask) if learnt), default=len(ids) - 1)
    learnt, behind = ids[mask].tolist(), ids[last + 1 :].tolist()
    specials = special_ids(tokenizer)
    for tokens, is_learnt in ((learnt[::-1], True), (behind, False)):
        place = next((place for place, token in enumerate(tokens) if token in specials), None)
        if place is not None and not tokenizer.decode(tokens[:place]).strip():
            return int(tokens[place]), is_learnt
    return None, False


def _ids(value: Any) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else {int(each) for each in value}


def known_ends(tokenizer: Any, configs: Iterable[Any]) -> set[int]:
    """End tokens of the tokenizer and of all ``configs`` (model and generation configs; None is left out).

    A config may name an end that is an ordinary word of this tokenizer (a default that nobody set): it ends nothing.
    """
    named: set[int] = set()
    for config in configs:
        named |= _ids(getattr(config, "eos_token_id", None))
    specials = special_ids(tokenizer)
    words = {token for token in named - specials if not _MARK.match(str(tokenizer.convert_ids_to_tokens(token)))}
    return _ids(tokenizer.eos_token_id) | named - words


def stop_ids(model: Any, processor: Any, configs: Iterable[Any] = ()) -> list[int]:
    """Every token that ends an answer of ``model``: those its generation config names, the tokenizer's end, the end
    of a turn of the chat template, and those of ``configs``. Sorted."""
    ends = known_ends(processor.tokenizer, [getattr(model, "generation_config", None), *configs])
    end, _ = turn_end(processor)
    return sorted(ends if end is None else ends | {end})


def settle_ends(model: Any, processor: Any, configs: Iterable[Any] = ()) -> None:
    """Write ``stop_ids`` into ``model.generation_config``, so that plain transformers stops there too.

    A template that teaches no end, or a prompt whose last space belongs to the answer, is warned about.
    """
    ends, config = stop_ids(model, processor, configs), model.generation_config
    config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    if config.pad_token_id is None:
        config.pad_token_id = processor.tokenizer.pad_token_id
    if not turn_end(processor)[1]:
        logger.warning(
            "the answers of the chat template end with no special token that is learnt, so nothing teaches the model "
            "where to stop: put {{ eos_token }} before {% endgeneration %}"
        )
    prompt = judge("the chat template", prompt_text, processor, _SAMPLE[:1])
    if not has_marks(chat_template_of(processor)) or isinstance(prompt, BadRow):
        return
    whole = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if len(tokens_before_answer(processor.tokenizer, prompt)) < len(whole):
        logger.warning(
            "the chat template's prompt ends with a space that the tokenizer joins to the answer's first word, so "
            "plain transformers begins answers otherwise than training did: put the space after {% generation %}"
        )
