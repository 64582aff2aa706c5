"""Comparing a generated answer with the right one, and guessing answers without an image.

Source: the VQA evaluation (Antol et al. 2015; Goyal et al. 2017) for the normalisation and the consensus
    score, POPE (Li et al. 2023) for yes and no.
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
_VQA_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_VQA_FULL_STOP = re.compile(r"\.(?!\d)")
_VQA_CONTRACTED = {  # written without the apostrophe they are the same word
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could might must not should they we what where who would you",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "'d": "he how it someone something there they where who you",
    "'s": "he how somebody someone that there what when where who why",
}
_VQA_WORDS = NUMBER_WORDS | {
    stem + ending.replace("'", ""): stem + ending for ending, stems in _VQA_CONTRACTED.items() for stem in stems.split()
}
_VQA_WORDS |= {"maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all"}


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


def vqa_answer(text: str) -> str:
    """As the official VQA evaluation has an answer before it compares (Goyal et al. 2017, ``vqaEval.py``).

    Lower case, number words as digits, no articles, apostrophes restored in contractions. A sign becomes a space, or
    nothing where a space stands beside it anywhere in the text or a comma between digits. An answer of which nothing
    would be left ("a") is kept, unlike there.
    """
    given = " ".join(str(text).split())
    inside = _BETWEEN_DIGITS.search(given)
    bare = given
    for sign in _VQA_SIGNS:
        bare = bare.replace(sign, "" if inside or f"{sign} " in given or f" {sign}" in given else " ")
    words = [_VQA_WORDS.get(word, word) for word in _VQA_FULL_STOP.sub("", bare).lower().split()]
    return " ".join(word for word in words if word not in ARTICLES) or given.lower()


def consensus(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy: ``min(agreeing / 3, 1)``, averaged over every choice of all annotators but one.

    With ten annotators, 1, 2, 3 and 4 of them who agree give 0.3, 0.6, 0.9 and 1. Where fewer than three are left, the
    divisor is their number; a single annotator's answer counts by itself.

    Source: Antol et al. 2015, as the official evaluation averages it; answers are compared as by `vqa_answer`.
    """
    own = vqa_answer(prediction)
    agree = [vqa_answer(answer) == own for answer in answers]
    if len(agree) == 1:
        return float(agree[0])
    needed = min(3, len(agree) - 1)
    return sum(min((sum(agree) - each) / needed, 1.0) for each in agree) / len(agree)


def says_no(answer: str) -> bool:
    """Whether POPE's official evaluation reads an answer as "no"; it reads everything else as "yes".

    No, no and not count as words of the first sentence, which ends at the first full stop; commas are ignored, other
    signs belong to their word ("no!" is a yes).

    Source: POPE (Li et al. 2023), ``evaluate.py``.
    """
    words = str(answer).partition(".")[0].replace(",", "").split(" ")
    return any(word in words for word in ("No", "no", "not"))


def yes_no_scores(answers: Sequence[str], labels: Sequence[bool]) -> dict[str, float]:
    """Figures of answers to yes/no questions, "yes" being the positive class.

    Args:
        answers: generated texts, read by `says_no`.
        labels: True for yes.

    Returns:
        ``accuracy``, ``precision``, ``recall``, ``f1`` (0 where there is nothing to divide by), ``yes_ratio`` (the
        share of yes among the answers) and ``neither`` (the share that begins with neither yes nor no, which counts as
        yes or no all the same).

    Raises:
        ValueError: answers and labels differ in number, or there are none.

    Source: POPE (Li et al. 2023, section 4).
    """
    if len(answers) != len(labels) or not len(answers):
        raise ValueError(f"{len(answers)} answers and {len(labels)} labels; give as many of each, at least one")
    said = [not says_no(answer) for answer in answers]
    positive = sum(yes and label for yes, label in zip(said, labels, strict=True))
    precision = positive / max(sum(said), 1)
    recall = positive / max(sum(labels), 1)
    words = [normalize_answer(answer).partition(" ")[0] for answer in answers]
    return {
        "accuracy": sum(yes == bool(label) for yes, label in zip(said, labels, strict=True)) / len(said),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if positive else 0.0,
        "yes_ratio": sum(said) / len(said),
        "neither": sum(word not in ("yes", "no") for word in words) / len(words),
    }


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
