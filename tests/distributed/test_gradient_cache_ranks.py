"""Gradient caching over ranks: two ranks in chunks are one rank at once, and gradients are reduced once a step."""

from __future__ import annotations

import cache_work
import pytest
import torch


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda told, name=name: f"{name}: {told}")


@pytest.mark.parametrize(
    ("kind", "chunk", "sizes", "find_unused"),
    [
        ("clip", 2, [6, 6], False),
        ("clip", 2, [6, 6], True),
        ("clip", 4, [8, 3], False),  # two chunks on one rank, one on the other
        ("siglip", 2, [5, 7], False),  # three chunks and four
        ("simclr", 4, [6, 6], False),
    ],
)
def test_two_ranks_in_chunks_are_one_at_once(gloo, kind, chunk, sizes, find_unused):
    alone, parameters, _ = cache_work.steps(kind, None, [sum(sizes)])
    for seen, found, reductions in gloo.run(2, cache_work.steps, kind, chunk, sizes, find_unused):
        for (loss, metrics), (expected, expected_metrics) in zip(seen, alone, strict=True):
            assert loss == pytest.approx(expected, rel=1e-5)
            for name in {"logit_scale", "logit_bias", "width"} & metrics.keys():
                assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-5)
            assert metrics.keys() == expected_metrics.keys()
        assert_same(found, parameters, rtol=1e-4, atol=2e-6)
        assert reductions == 1  # one bucket holds these few parameters, and it is sent once


def test_a_batchnorm_head_is_local_to_a_rank_in_chunks_as_at_once(gloo):
    whole = gloo.run(2, cache_work.steps, "batchnorm", None, [6, 6], False)
    chunked = gloo.run(2, cache_work.steps, "batchnorm", 4, [6, 6], False)
    for (seen, found, _), (expected, parameters, _) in zip(chunked, whole, strict=True):
        assert [loss for loss, _ in seen] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
        assert_same(found, parameters, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("kind", ["clip", "simclr"])
def test_the_trainer_on_two_ranks_in_chunks_is_one_at_once(gloo, kind):
    """Clipping, accumulation turned into chunks, and metrics: the logs are those of one process and the whole batch."""
    alone, parameters, negatives = cache_work.trained(kind, 1, {"per_device_train_batch_size": 12})
    assert negatives == 12
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    for history, found, negatives in gloo.run(2, cache_work.trained, kind, 2, settings):
        assert negatives == 12
        assert_same(found, parameters, rtol=1e-4, atol=2e-6)
        for mine, theirs in zip(history, alone, strict=True):
            assert mine.keys() == theirs.keys()
            for name in {"loss", "grad_norm", "logit_scale", "positive_similarity", "width"} & mine.keys():
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
