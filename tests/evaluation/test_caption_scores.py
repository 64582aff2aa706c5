"""BLEU and CIDEr-D against values worked out by hand, and against figures of pycocoevalcap 1.2."""

from __future__ import annotations

import math

import pytest

from mllm_vision.evaluation.language.caption_scores import bleu, caption_tokens, cider_d

# Figures of pycocoevalcap's scorers (BleuScorer with option="closest", CiderScorer) on these captions, whose words were
# separated by its own PTBTokenizer (Stanford CoreNLP 3.4.1).
REFERENCES = [
    ["A black dog runs on the grass.", "A dog is running across a field.", "the dog runs"],
    ["Two children play football in a park", "children are playing with a ball", "two kids play football"],
    ["A woman rides a bicycle down the street .", "a woman on a red bicycle"],
    ["a man is cooking fish over a fire on the beach", "The man doesn't look at the camera!"],
]
CAPTIONS = [
    "a dog runs on the grass",
    "two children play with a ball in the park",
    "a woman on the street",
    "A man is sitting on the beach, isn't he?",
]
BLEUS = [0.8382539536951883, 0.706354768239336, 0.559859255051965, 0.3705777997280761]
CIDERS = [3.5457624972657005, 1.932345048833335, 2.6352289095889407, 1.6154219162082442]


def test_figures_of_pycocoevalcap() -> None:
    # It adds 1e-15 to the matches and 1e-9 to the counts.
    assert [bleu(CAPTIONS, REFERENCES, order) for order in (1, 2, 3, 4)] == pytest.approx(BLEUS, rel=1e-8)
    assert cider_d(CAPTIONS, REFERENCES) == pytest.approx(CIDERS, rel=1e-12)


@pytest.mark.parametrize(
    ("caption", "tokens"),  # PTBTokenizer's, brackets written as such
    [
        ("A man's dog doesn't run; it's sleeping, isn't it?", "a man 's dog does n't run it 's sleeping is n't it"),
        ("The dogs' ball, 3.5 metres, at 10:30 on 12/25/2001.", "the dogs ball 3.5 metres at 10:30 on 12/25/2001"),
        ("black/white cat & dog - playing -- here...", "black/white cat & dog playing here"),
        ("a t-shirt-like, well-known, up-to-date thing", "a t-shirt-like well-known up-to-date thing"),
        ("I'm you're we've they'll he'd can't cannot", "i 'm you 're we 've they 'll he 'd ca n't can not"),
        ("''quoted'' ``so`` \u201cand so\u201d", "quoted so and so"),
        ("five o'clock (1,000 people) #1", "five o'clock ( 1,000 people ) # 1"),
        ("café naïve", "café naïve"),
        ("50% off, $5", "50 % off $ 5"),
    ],
)
def test_tokens_of_the_coco_caption_evaluation(caption: str, tokens: str) -> None:
    assert caption_tokens(caption) == tokens.split()


def test_a_chinese_character_is_a_token() -> None:
    assert caption_tokens("一只black狗。") == ["一", "只", "black", "狗"]
    assert 0 < bleu(["一只黑色的狗在跑"], [["一只黑色的狗在草地上"]]) < 1


def test_bleu_by_hand() -> None:
    # Papineni et al., example 2: "the" counts at most twice, as in the first reference.
    references = [["the cat is on the mat", "there is a cat on the mat"]]
    assert bleu(["the the the the the the the"], references, 1) == pytest.approx(2 / 7)
    # 5 words against 6 and 4: the shorter is the closest on a tie, so there is no brevity penalty
    assert bleu(["a b c d e"], [["a b c d e f", "a b c d"]]) == pytest.approx(1.0)
    assert bleu(["a b c d e"], [["a b c d e f"]]) == pytest.approx(math.exp(1 - 6 / 5))
    # Matches are summed over the set before dividing: (3 + 1) of (4 + 2) words, not the mean of 3/4 and 1/2.
    assert bleu(["a b c x", "d y"], [["a b c z"], ["d z"]], 1) == pytest.approx(4 / 6)
    assert bleu(["a b c"], [["a b c"]]) == 0.0  # without a 4-gram
    assert bleu(["", "a"], [["a b"], ["a b"]], 1) == pytest.approx(math.exp(1 - 4 / 1))


def test_cider_by_hand() -> None:
    # "red" is in the references of both images, so its weight is log 2 - log 2 = 0; "dog" and the pair have log 2.
    references = [["red dog"], ["red cat"]]
    perfect, other = cider_d(["red dog", "red dog"], references)
    assert perfect == pytest.approx(10 * (1 + 1) / 4) and other == 0.0  # n = 1 and 2 of four
    penalty = math.exp(-1 / 72)  # one pair of words fewer, or more
    [short, _] = cider_d(["dog", ""], references)
    assert short == pytest.approx(10 / 4 * penalty)
    [repeated, _] = cider_d(["dog dog dog", ""], references)  # min(3, 1) * 1 / (3 * 1): clipped
    assert repeated == pytest.approx(10 / 4 / 3 * penalty)
    # Two references of an image: the mean of their similarities, here of a match and none.
    assert cider_d(["red dog", "x"], [["red dog", "blue fox"], ["red cat"]])[0] == pytest.approx(
        cider_d(["red dog", "x"], [["red dog"], ["red cat", "blue fox"]])[0] / 2
    )
    assert cider_d(["a dog"], [["a dog"]]) == [0.0]  # no document frequencies in one image


def test_bad_input() -> None:
    for score in (bleu, cider_d):
        with pytest.raises(ValueError, match="2 captions and references of 1 images"):
            score(["a", "b"], [["a"]])
        with pytest.raises(ValueError, match="image 1 has no list of reference captions"):
            score(["a", "b"], [["a"], []])
        with pytest.raises(ValueError, match="image 0 has no list"):
            score(["a"], ["a"])
