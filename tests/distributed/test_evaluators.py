"""Evaluators share their rows out over the ranks; every rank gets the figures of one process."""

from __future__ import annotations

import evaluator_work as work
import pytest
import tiny


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    return str(tiny.write_pairs_parquet(tmp_path_factory.mktemp("data") / "pairs.parquet", n=7, captions_each=2))


@pytest.mark.parametrize("world", [2, 3])
def test_retrieval_and_zero_shot(gloo, pairs, world):
    expected = work.retrieve_and_classify(pairs)
    assert 0 < expected["retrieval"]["r5"] < 1 or 0 < expected["zero_shot"]["accuracy"] < 1
    assert gloo.run(world, work.retrieve_and_classify, pairs) == [expected] * world


def test_questions(gloo, pairs, tmp_path):
    tiny.tiny_tokenizer(tmp_path)
    expected = work.answer(pairs, str(tmp_path))
    assert expected["metrics"]["count"] == 14
    assert gloo.run(2, work.answer, pairs, str(tmp_path)) == [expected] * 2


def test_a_failing_rank_fails_them_all(gloo, pairs):
    first, second = gloo.run(2, work.fail, pairs)
    assert first == "ValueError: another rank failed; rank 1: RuntimeError: out of memory"
    assert second == "RuntimeError: out of memory"
