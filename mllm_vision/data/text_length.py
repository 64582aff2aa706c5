"""The longest text worth tokenising: megabytes would otherwise be read for a few hundred tokens."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

_SPARE = 64  # tokens: the last ones of a cut text may be other ones than the whole text's
_LONGEST: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def most_characters(tokenizer: Any, max_length: int) -> int:
    """Characters beyond which a text has more than `max_length` tokens for certain: none is longer than the longest.

    Vocabularies of bytes spell a character in one to four letters, so theirs are counted on the safe side. What a
    normalizer drops before the tokens are counted (runs of spaces, in some) is not known here.
    """
    if tokenizer not in _LONGEST:
        _LONGEST[tokenizer] = max(map(len, tokenizer.get_vocab()), default=1)
    return (max_length + _SPARE) * _LONGEST[tokenizer]


def cut_text(text: str, tokenizer: Any, max_length: int) -> str:
    """The text without what a truncation to `max_length` tokens would drop for certain, on the tokenizer's side."""
    most = most_characters(tokenizer, max_length)
    if len(text) <= most:
        return text
    return text[-most:] if getattr(tokenizer, "truncation_side", "right") == "left" else text[:most]
