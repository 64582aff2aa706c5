"""Comparing a generated answer with the right one, and guessing answers without an image.

Source: the VQA evaluation (Antol et al. 2015; Goyal et al. 2017) for the normalisation and the consensus
    score.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBERS)}
ARTICLES = {"a", "an", "the"}
_BETWEEN_DIGITS = re.compile(r"(?<=\d),(?=\d)")
_APOSTROPHES = dict.fromkeys(map(ord, "'’`"))
_INVISIBLE = dict.fromkeys((0x00AD, 0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF))  # joiners carry meaning, these do not
_POINT = re.compile(r"\.(?!\d)|(?<=[^\W\d])\.")  # a full stop, not a decimal point
_DASH = re.compile(r"[-‐‑‒–—−]")
_SIGN = re.compile(r"(?<!\S)[-‐‑‒–−](?=[.\d])")  # a minus before a number
_FULL_WIDTH = re.compile(r"[\u3000\uff00-\uffef]+")
_KEPT = "%‰&#@*."  # in Unicode's classes these are punctuation, but an answer without them is another one


def _composed(text: str) -> str:
    """One spelling of each character: composed, without case, full and half width as usual."""
    text = _FULL_WIDTH.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text.translate(_INVISIBLE))
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def normalize_answer(text: str) -> str:
    """Composed Unicode without case; punctuation and articles removed, number words as digits, single spaces.

    Letters, combining marks, digits and symbols (of currencies, units, arithmetic) are kept, and a minus before a
    number. Articles and number words are English ones. An answer that consists of nothing but an article ("a") or
    punctuation ("?") is kept, otherwise nothing would be left to compare.
    """
    composed = _composed(str(text))
    bare = _DASH.sub(" ", _SIGN.sub("\0", _POINT.sub(" ", _BETWEEN_DIGITS.sub("", composed.translate(_APOSTROPHES)))))
    signs = (" " if unicodedata.category(sign)[0] == "P" and sign not in _KEPT else sign for sign in bare)
    words = "".join(signs).replace("\0", "-").split()
    kept = [word for word in words if word not in ARTICLES] or words or composed.split()
    return " ".join(NUMBER_WORDS.get(word, word) for word in kept)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the normalised prediction equals the most frequent normalised answer (any of those tied)."""
    counts = Counter(normalize_answer(answer) for answer in answers)
    top = max(counts.values())
    return float(counts.get(normalize_answer(prediction), 0) == top)


def consensus(prediction: str, answers: Sequence[str]) -> float:
    """The VQA consensus score ``min(agreeing / 3, 1)``; with fewer than three annotators, divided by their
    number.
    """
    own = normalize_answer(prediction)
    agreeing = sum(normalize_answer(answer) == own for answer in answers)
    return min(agreeing / min(3, len(answers)), 1.0)


class MajorityBaseline:
    """Always answers with the most frequent answer, overall or by question type, having seen only answers.

    Args:
        pairs: (question type, answer) of the training data, or of the evaluated data, where the figure
            becomes the best that any constant answer can reach.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        overall: Counter[str] = Counter()
        by_type: dict[str, Counter[str]] = defaultdict(Counter)
        for kind, answer in pairs:
            overall[normalize_answer(answer)] += 1
            by_type[kind][normalize_answer(answer)] += 1
        if not overall:
            raise ValueError("a majority baseline needs at least one answer")
        # Sorted, so that the choice among equally frequent answers does not depend on the order of the rows.
        self.overall = min(overall, key=lambda answer: (-overall[answer], answer))
        self.by_type = {
            kind: min(counts, key=lambda answer: (-counts[answer], answer)) for kind, counts in by_type.items()
        }

    def guess(self, kind: str | None = None) -> str:
        """The majority answer of a question type (the overall one where the type is unknown or None)."""
        return self.overall if kind is None else self.by_type.get(kind, self.overall)
