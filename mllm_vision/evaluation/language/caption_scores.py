"""BLEU and CIDEr-D of generated captions against several references each.

Source: BLEU (Papineni et al. 2002), CIDEr-D (Vedantam et al. 2015, section 6), both as the COCO caption evaluation
(pycocoevalcap) computes them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_SUFFIX = r"'(?:s|m|d|ll|re|ve)\b"
_HAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_TOKEN = re.compile(
    rf"""[{_HAN}]                                      # no spaces between words: one character, one token
      | \w+?(?=n't\b) | n't\b | {_SUFFIX} | \bcan(?=not\b)
      | (?:(?![{_HAN}])\w)+ (?: [-/.,:](?=\w)\w+ | (?!{_SUFFIX})'\w+ )*   # t-shirt, 3.5, o'clock
      | [^\w\s]""",
    re.VERBOSE,
)
_DROPPED = frozenset("'\"`.?!,:;-。，、；：？！…")
_PLAIN = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014", "''\"\"--")
_ORDER = 4  # the longest n-grams
_SIGMA = 6.0  # of CIDEr-D's penalty, in words

Gram = tuple[str, ...]


def caption_tokens(text: str) -> list[str]:
    """Lower-case words without punctuation, as the COCO caption evaluation has them from its Penn Treebank tokenizer.

    Contractions are separated (``do n't``, ``dog 's``), hyphenated words and numbers stay whole, brackets and symbols
    are tokens. Of Flickr8k's 40,000 captions 14 differ from that tokenizer's output: it keeps the full stop of
    abbreviations ("Mr.") and the apostrophes of "'n'". A Chinese or Japanese character is a token of its own.
    """
    return [token for token in _TOKEN.findall(text.lower().translate(_PLAIN)) if token not in _DROPPED]


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]], order: int = _ORDER) -> float:
    """Corpus-level BLEU: n-gram matches and lengths are summed over all captions before they are divided.

    A match counts at most as often as the n-gram occurs in one of the references. The reference length of a caption is
    the closest one, the shorter on a tie.

    Args:
        candidates: one caption an image.
        references: the captions of each image.
        order: the longest n-grams.

    Returns:
        0 to 1; 0 if no n-gram of the highest order matches (where pycocoevalcap gives up to 2e-4).

    Raises:
        ValueError: candidates and references differ in number, none at all, an image without a reference.
    """
    _check(candidates, references)
    matches, totals = [0] * order, [0] * order
    length = reference_length = 0
    for candidate, group in zip(candidates, references, strict=True):
        words, others = caption_tokens(candidate), [caption_tokens(each) for each in group]
        length += len(words)
        reference_length += min((abs(len(each) - len(words)), len(each)) for each in others)[1]
        for n in range(1, order + 1):
            most: Counter[Gram] = Counter()
            for each in others:
                most |= _grams(each, n)
            found = _grams(words, n)
            matches[n - 1] += (found & most).total()
            totals[n - 1] += found.total()
    if not all(matches):
        return 0.0
    mean = sum(math.log(part / whole) for part, whole in zip(matches, totals, strict=True)) / order
    return math.exp(mean + min(0.0, 1 - reference_length / length))


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, 0 to 10; the figure of a set is their mean.

    For n = 1 to 4, the tf-idf vectors of caption and reference are compared by a cosine whose products are clipped to
    the reference's weight, times ``exp(-(difference of lengths)^2 / (2 * 6^2))``; averaged over n and references, times
    10. Document frequencies are those of the references given here, so figures of different sets do not compare, and
    those of one image alone are 0.

    Args:
        candidates: one caption an image.
        references: the captions of each image.

    Raises:
        ValueError: candidates and references differ in number, none at all, an image without a reference.
    """
    _check(candidates, references)
    groups = [[_all_grams(caption_tokens(each)) for each in group] for group in references]
    documents = Counter(gram for group in groups for gram in {gram for grams in group for gram in grams})
    idf = {gram: math.log(len(groups)) - math.log(count) for gram, count in documents.items()}
    unseen = math.log(len(groups))
    scores = []
    for candidate, group in zip(candidates, groups, strict=True):
        own = _Weighted(_all_grams(caption_tokens(candidate)), idf, unseen)
        scores.append(10 * sum(own.similarity(_Weighted(each, idf, unseen)) for each in group) / len(group))
    return scores


class _Weighted:
    """A caption's n-grams with their tf-idf weights, and the norm of each order."""

    def __init__(self, grams: Counter[Gram], idf: dict[Gram, float], unseen: float) -> None:
        self.weights = {gram: count * idf.get(gram, unseen) for gram, count in grams.items()}
        squares = [0.0] * _ORDER
        for gram, weight in self.weights.items():
            squares[len(gram) - 1] += weight**2
        self.norms = [math.sqrt(each) for each in squares]
        self.length = sum(count for gram, count in grams.items() if len(gram) == 2)  # of pairs, as in pycocoevalcap

    def similarity(self, reference: _Weighted) -> float:
        """Equation 9 of the paper, averaged over n."""
        products = [0.0] * _ORDER
        for gram, weight in self.weights.items():
            if other := reference.weights.get(gram):
                products[len(gram) - 1] += min(weight, other) * other
        norms = [one * two for one, two in zip(self.norms, reference.norms, strict=True)]
        cosines = [product / norm for product, norm in zip(products, norms, strict=True) if norm]
        difference = self.length - reference.length
        return sum(cosines) / _ORDER * math.exp(-(difference**2) / (2 * _SIGMA**2))


def _grams(words: Sequence[str], n: int) -> Counter[Gram]:
    return Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))


def _all_grams(words: Sequence[str]) -> Counter[Gram]:
    return Counter(gram for n in range(1, _ORDER + 1) for gram in _grams(words, n).elements())


def _check(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(candidates) != len(references) or not len(candidates):
        raise ValueError(f"{len(candidates)} captions and references of {len(references)} images; give as many of each")
    if bare := [place for place, group in enumerate(references) if isinstance(group, str) or not len(group)]:
        raise ValueError(f"image {bare[0]} has no list of reference captions ({len(bare)} of {len(references)} images)")
