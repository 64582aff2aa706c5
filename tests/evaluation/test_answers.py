"""Answer comparison against the VQA evaluation's rules, worked out by hand."""

from __future__ import annotations

import pytest

from mllm_vision.evaluation.language.answers import (
    MajorityBaseline,
    consensus,
    exact_match,
    normalize_answer,
    says_no,
    vqa_answer,
    yes_no_scores,
)


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


def test_consensus_is_the_official_vqa_accuracy() -> None:
    """Worked by hand: of ten annotators leave one out at a time, min(agreeing of nine / 3, 1), mean over the ten.

    k agree: k times the k - 1 others that agree are left, and 10 - k times all k.
    """
    for agreeing, expected in ((0, 0.0), (1, (1 * 0 + 9 * 1 / 3) / 10), (2, (2 * 1 / 3 + 8 * 2 / 3) / 10),
                               (3, (3 * 2 / 3 + 7 * 1) / 10), (4, 1.0), (10, 1.0)):  # fmt: skip
        answers = ["dark red"] * agreeing + ["blue", "red", "green"] * 4
        assert consensus("Dark red.", answers[:10]) == pytest.approx(expected)
    # The definition itself, over all choices of nine: the closed form above is not what is tested.
    answers = ["red"] * 2 + ["dark red"] * 3 + ["blue"] * 4 + ["green"]
    for said in ("red", "dark red", "blue", "green", "grey"):
        nine = [answers[:place] + answers[place + 1 :] for place in range(10)]
        assert consensus(said, answers) == pytest.approx(sum(min(rest.count(said) / 3, 1) for rest in nine) / 10)


def test_consensus_of_few_annotators() -> None:
    assert consensus("red", ["red"]) == 1.0 and consensus("blue", ["red"]) == 0.0
    assert consensus("red", ["red", "blue"]) == 0.5  # of the two choices of one annotator
    assert consensus("red", ["red", "red", "blue"]) == pytest.approx((1 / 2 + 1 / 2 + 2 / 2) / 3)


@pytest.mark.parametrize(
    ("given", "expected"),  # from the official evaluation's rules, applied by hand
    [
        ("The Two red\tcars", "2 red cars"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("its", "its"),  # not in the official list, as "it's" would be another word
        ("t-shirt", "t shirt"),
        ("left - hand", "left hand"),
        ("black/white", "black white"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("yes.", "yes"),
        ("50%", "50%"),
        ("10:30", "10:30"),
        ("C++", "c"),
        ("a", "a"),
    ],
)
def test_vqa_answers_are_normalised_as_officially(given: str, expected: str) -> None:
    assert vqa_answer(given) == expected


def test_yes_and_no_are_read_as_pope_reads_them() -> None:
    no = ["no", "No, there is not.", "There is not a dog. Yes", "I see no dog"]
    yes = ["yes", "Yes, there is. No doubt", "", "a dog", "nothing", "NO", "no!", "isn't"]
    assert all(map(says_no, no)) and not any(map(says_no, yes))


def test_yes_no_scores_by_hand() -> None:
    answers = ["yes", "Yes, it is.", "no", "a dog", "no", "No."]
    labels = [True, False, True, True, False, False]
    # said yes: 1, 2 and 4, of which 1 and 4 are right; labelled yes: 1, 3, 4
    assert yes_no_scores(answers, labels) == pytest.approx(
        {"accuracy": 4 / 6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 0.5, "neither": 1 / 6}
    )
    assert yes_no_scores(["yes"] * 4, [True, False] * 2)["f1"] == pytest.approx(2 / 3)  # POPE's constant yes
    never = yes_no_scores(["no"] * 2, [True, False])
    assert never["f1"] == never["precision"] == never["recall"] == 0.0 and never["accuracy"] == 0.5
    with pytest.raises(ValueError, match="1 answers and 2 labels"):
        yes_no_scores(["no"], [True, False])


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
