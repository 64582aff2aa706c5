"""Stages one and two on two ranks: text-only batches keep ranks in step, and losses are those of one process."""

from __future__ import annotations

import pytest
import tiny
import torch
import vlm_work as work


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tiny_tokenizer(folder)
    return str(folder)


@pytest.mark.parametrize("train", [("connector",), ("encoder", "connector", "language_model")])
@pytest.mark.parametrize("images", [[True, False], [False, False], [True, True]])
def test_a_rank_without_images_neither_hangs_nor_bends_the_gradient(gloo, tokenizer, train, images):
    expected = work.gradients(tokenizer, train, images)
    for found in gloo.run(2, work.gradients, tokenizer, train, images):
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.allclose(found[name], expected[name], atol=1e-6), name


@pytest.mark.parametrize("name", work.SYSTEMS)
@pytest.mark.parametrize("train", [("connector",), ("encoder", "connector", "language_model=lora")])
def test_two_ranks_give_the_gradients_of_one_for_every_kind_of_system(gloo, tokenizer, name, train):
    """Other numbers of tiles and words on the ranks, a rank with text alone, and weighted tokens."""
    expected = work.system_gradients(tokenizer, name, train)
    for found in gloo.run(2, work.system_gradients, tokenizer, name, train):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.keys() == theirs.keys() and any(gradient.any() for gradient in theirs.values())
            for parameter, gradient in theirs.items():
                torch.testing.assert_close(ours[parameter], gradient, atol=1e-6, rtol=1e-4, msg=parameter)


def test_held_out_loss_is_shared_out(gloo, tokenizer):
    expected = work.held_out(tokenizer, 8)
    for found in gloo.run(2, work.held_out, tokenizer, 8):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)
        assert found["baselines"]["no_image"] == pytest.approx(expected["baselines"]["no_image"], rel=1e-6)


def test_ranks_share_the_computation_of_cached_features(gloo, tokenizer, tmp_path):
    count, seen, expected = work.cached(tokenizer, str(tmp_path / "one"))
    assert (count, seen) == (9, 9)
    found = gloo.run(2, work.cached, tokenizer, str(tmp_path / "two"))
    assert [(each[0], each[1]) for each in found] == [(9, 5), (9, 4)]
    for _, _, features in found:
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    again = gloo.run(2, work.cached, tokenizer, str(tmp_path / "two"))
    assert [(each[0], each[1]) for each in again] == [(9, 0), (9, 0)]
