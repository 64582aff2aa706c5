"""Megabytes of text are cut before they are tokenised, and what is kept are the tokens of the whole text."""

from __future__ import annotations

import pytest
from tiny import random_image, tiny_image_processor, tiny_tokenizer

from mllm_vision.data import ImageTransform, PairCollator
from mllm_vision.data.text_length import cut_text, most_characters

TEXTS = ["a red circle on the left, ", "what\nis\n\nthis? ", "naïve 红色的圆 привет ", "x", "  \n "]


class Counting:
    """A tokenizer that notes how long the texts are that it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.seen = tokenizer, []

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts, **options):
        self.seen += [len(text) for text in texts]
        return self.tokenizer(texts, **options)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_kept_tokens_are_those_of_the_whole_text(tokenizer, side):
    tokenizer.truncation_side = side
    try:
        for text in TEXTS:
            long = text * 20_000
            whole, cut = (
                tokenizer(each, truncation=True, max_length=32).input_ids
                for each in (long, cut_text(long, tokenizer, 32))
            )
            assert whole == cut and len(cut_text(long, tokenizer, 32)) <= most_characters(tokenizer, 32) < 5000
    finally:
        tokenizer.truncation_side = "right"
    assert cut_text("short", tokenizer, 32) == "short"


def test_captions_and_queries_are_cut(tokenizer):
    counting = Counting(tokenizer)
    collator = PairCollator(ImageTransform(tiny_image_processor()), counting, max_length=16)
    rows = [{"image": random_image(k), "caption": "a star " * n} for k, n in enumerate((1_000_000, 1))]
    batch = collator(rows)
    assert batch["input_ids"].shape == (2, 16) and max(counting.seen) < 5000
    assert batch["caption_ids"].unique().numel() == 2, "captions are told apart by all of their words"
