"""The tokenizers of text towers: end token, padding and truncation as the tower expects them."""

from __future__ import annotations

import copy
from typing import Any

CLIP_TEXT, SIGLIP_TEXT = "clip_text_model", "siglip_text_model"
END_OF_TEXT = "<|endoftext|>"


def prepare_tokenizer(tokenizer: Any, text_type: str, max_length: int, *, adapt_end: bool = True) -> Any:
    """A copy of the tokenizer configured for a text tower; the settings are saved with it.

    Texts are padded on the right and truncated to `max_length`. For CLIP and SigLIP towers every text ends with the end
    token, also when truncated. transformers' CLIP treats end id 2 as legacy and pools at the highest id, so a tokenizer
    with end id 2 (or none) receives a new end token.

    Args:
        tokenizer: any transformers tokenizer; not changed.
        text_type: the text tower's `model_type`.
        max_length: longest text in tokens, the end token included.
        adapt_end: whether an end token may be added (for towers built here).

    Raises:
        ValueError: `max_length` too small, or the end token cannot be appended.
    """
    if max_length < 2:
        raise ValueError(f"max_length={max_length} leaves no room for a token and the end token; use at least 2")
    tokenizer = copy.deepcopy(tokenizer)
    settings: dict[str, Any] = {"padding_side": "right", "truncation_side": "right"}
    if text_type == SIGLIP_TEXT and adapt_end:
        # A tower built here masks its padding, so pipelines need the mask too.
        settings["model_input_names"] = ["input_ids", "attention_mask"]
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    if text_type in (CLIP_TEXT, SIGLIP_TEXT):
        _end_with_token(tokenizer, text_type, adapt_end)
    tokenizer.model_max_length = settings["model_max_length"] = max_length
    tokenizer.init_kwargs |= settings  # this is what save_pretrained writes
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither a padding nor an end token; set tokenizer.pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _end_with_token(tokenizer: Any, text_type: str, adapt: bool) -> None:
    def ids(text: str, **settings: Any) -> list[int]:
        return tokenizer(text, **settings)["input_ids"]

    probe = "a red circle on the left of a blue square"
    starts_with_bos = tokenizer.bos_token_id is not None and ids(probe)[:1] == [tokenizer.bos_token_id]
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token  # BERT's texts end with [SEP]
    if adapt and (tokenizer.eos_token_id is None or (text_type == CLIP_TEXT and tokenizer.eos_token_id == 2)):
        tokenizer.add_tokens([END_OF_TEXT], special_tokens=True)
        tokenizer.eos_token = END_OF_TEXT
    if ids(probe)[-1] != tokenizer.eos_token_id and hasattr(tokenizer, "update_post_processor"):
        tokenizer.add_bos_token = starts_with_bos
        tokenizer.add_eos_token = True
    whole, cut = ids(probe), ids(probe, truncation=True, max_length=3)
    if tokenizer.eos_token_id is None or whole[-1] != tokenizer.eos_token_id or cut[-1] != tokenizer.eos_token_id:
        raise ValueError(
            f"{type(tokenizer).__name__} does not end its texts with its end token ({tokenizer.eos_token!r}, id "
            f"{tokenizer.eos_token_id}), which CLIP and SigLIP towers require: {probe!r} became {whole}. Use a "
            "tokenizer with an end token in its post-processor (for example one with add_eos_token)"
        )


def check_tokenizer(model: Any, tokenizer: Any) -> None:
    """Raises ValueError if the tokenizer's ids do not fit the text tower's vocabulary or pooling."""
    highest = max(len(tokenizer) - 1, tokenizer.pad_token_id or 0, tokenizer.eos_token_id or 0)
    if highest >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {highest} but the text tower's vocab_size is {model.config.vocab_size}; "
            "use the tokenizer that belongs to the tower, or build a new tower for this tokenizer"
        )
    if model.config.model_type != CLIP_TEXT:
        return
    expected = model.config.eos_token_id
    if expected == 2 and tokenizer.eos_token_id != len(tokenizer) - 1:
        raise ValueError(
            "the CLIP text tower has the legacy eos_token_id=2 and pools at the highest id, but the tokenizer's end "
            f"token has id {tokenizer.eos_token_id} of {len(tokenizer)}; use the tokenizer of that checkpoint"
        )
    if expected not in (2, tokenizer.eos_token_id):
        raise ValueError(
            f"the CLIP text tower pools at eos_token_id={expected} but the tokenizer ends texts with id "
            f"{tokenizer.eos_token_id}; use the tokenizer of that checkpoint"
        )
