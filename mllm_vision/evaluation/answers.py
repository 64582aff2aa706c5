"""Comparing a generated answer with the right one, and guessing answers without a picture.

Source: the VQA evaluation (Antol et al. 2015; Goyal et al. 2017) for the normalisation and the consensus
    score.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBERS)}
ARTICLES = {"a", "an", "the"}
_BETWEEN_DIGITS = re.compile(r"(?<=\d)[,](?=\d)")
_APOSTROPHE = re.compile(r"['’`]")
_OTHER = re.compile(r"[^\w\s.]|_|(?<!\d)\.|\.(?!\d)")


def normalize_answer(text: str) -> str:
    """Lower case, punctuation and articles removed, number words as digits, single spaces.

    An answer that consists of an article only ("a") is kept, otherwise nothing would be left to compare.
    """
    text = _APOSTROPHE.sub("", _BETWEEN_DIGITS.sub("", str(text).lower()))
    words = _OTHER.sub(" ", text).split()
    kept = [word for word in words if word not in ARTICLES] or words
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
