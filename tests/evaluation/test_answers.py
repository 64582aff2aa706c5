"""Answer comparison against the VQA evaluation's rules, worked out by hand."""

from __future__ import annotations

import pytest

from mllm_vision.evaluation.language.answers import MajorityBaseline, consensus, exact_match, normalize_answer


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Red", "red"),
        ("  a red   circle. ", "red circle"),
        ("Two", "2"),
        ("none", "0"),
        ("A", "a"),
        ("the", "the"),
        ("it's", "its"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("left-hand side", "left hand side"),
        ("yes!", "yes"),
        ("", ""),
        ("红色。", "红色"),
        ("cafe\u0301", "caf\u00e9"),  # decomposed and composed are one word, and not "cafe"
        ("हिन्दी", "हिन्दी"),  # vowel signs and the virama are no punctuation
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("\uff32\uff45\uff44\uff11\uff12\uff01", "red12"),  # full width
        ("三\u3000个", "三 个"),
        ("x\u00b2", "x\u00b2"),  # a superscript is no digit
        ("-5", "-5"),
        ("\u22125 °C", "-5 °c"),
        ("3-5", "3 5"),
        ("50%", "50%"),
        ("$5.50.", "$5.50"),
        (".5", ".5"),
        ("C++", "c++"),
        ("?", "?"),
        ("red\u200b", "red"),
    ],
)
def test_normalize(given: str, expected: str) -> None:
    assert normalize_answer(given) == expected


def test_answers_that_differ_in_a_sign_or_a_mark_are_different() -> None:
    for one, other in (("-5", "5"), ("10%", "10"), ("c#", "c"), ("?", ""), ("für", "fur"), ("5 €", "5"), ("की", "का")):
        assert exact_match(one, [other]) == 0.0, (one, other)


def test_consensus_is_the_vqa_formula() -> None:
    answers = ["red"] * 2 + ["dark red"] * 7 + ["blue"]
    assert consensus("dark red", answers) == 1.0
    assert consensus("Red.", answers) == pytest.approx(2 / 3)
    assert consensus("blue", answers) == pytest.approx(1 / 3)
    assert consensus("green", answers) == 0.0
    assert consensus("red", ["red"]) == 1.0  # one annotator: plain agreement
    assert consensus("red", ["red", "blue"]) == 0.5


def test_exact_match_takes_the_most_frequent_answer_and_ties() -> None:
    assert exact_match("The red", ["red", "red", "blue"]) == 1.0
    assert exact_match("blue", ["red", "red", "blue"]) == 0.0
    assert exact_match("blue", ["red", "blue"]) == 1.0


def test_majority() -> None:
    pairs = [("colour", "red"), ("colour", "Red"), ("colour", "blue"), ("count", "two"), ("count", "2"), ("count", "2")]
    majority = MajorityBaseline(pairs)
    assert majority.guess("colour") == "red"
    assert majority.guess("count") == majority.guess() == "2"
    assert majority.guess("never seen") == "2"
    assert MajorityBaseline(reversed([("x", "b"), ("x", "a")])).guess() == "a"  # ties do not depend on the order
    with pytest.raises(ValueError, match="at least one answer"):
        MajorityBaseline([])
