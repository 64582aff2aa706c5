"""FSDP2 around our models: scalars stay whole, parts can be called, and the trained model comes out plain."""

from __future__ import annotations

import pytest
import sharding_work
import torch

from mllm_vision.training.trainer.sharding import layer_classes


def test_a_sharded_copy_trains_as_a_plain_model_and_is_gathered_into_it(gloo):
    results = gloo.run(2, sharding_work.train_sharded)
    for found in results:
        assert found["layers"] == ["Layer"]
        assert found["reduce"] == torch.float32
        assert found["groups"][-1] == [()] and () not in found["groups"][0]
        assert found["released"] and found["plain"] and found["tied"]
        assert found["kinds"] == (True, False, True)
        assert found["apart"] < 1e-6
    assert max(*results[0]["part"], results[0]["again"], results[0]["score"]) < 1e-6
    assert results[0]["saved"] == sorted(sharding_work.Scaled().state_dict())


def test_the_trainer_shards_as_ddp_trains_and_resumes(gloo, tmp_path):
    """Evaluation, gradient caching and a checkpoint on the way; accelerate is led to shard on the CPU."""
    plain, other = gloo.run(2, sharding_work.through_the_trainer, str(tmp_path / "ddp"), False)
    sharded = gloo.run(2, sharding_work.through_the_trainer, str(tmp_path / "fsdp"), True)
    assert plain["kinds"] == [False] * 3 and other["kinds"] == [False] * 3
    cached = gloo.run(2, sharding_work.through_the_trainer, str(tmp_path / "cached"), True, None, 2)
    whole = str(tmp_path / "fsdp" / "checkpoint-2")
    resumed = gloo.run(2, sharding_work.through_the_trainer, str(tmp_path / "resumed"), True, whole)
    for rank in range(2):
        assert sharded[rank]["kinds"] == [True] * 3 and sharded[rank]["whole"]
        for found, tolerance in ((sharded, 1e-6), (cached, 1e-6)):
            for name, value in plain["parameters"].items():
                torch.testing.assert_close(found[rank]["parameters"][name], value, rtol=1e-5, atol=tolerance)
        for name, value in sharded[rank]["parameters"].items():
            assert torch.equal(resumed[rank]["parameters"][name], value), name
    for found, expected in zip(sharded[0]["logs"], plain["logs"], strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_the_layers_of_our_models_are_found():
    import tiny
    from pairs_for_tests import make_objective

    assert "CLIPEncoderLayer" in layer_classes(make_objective("clip"))
    assert layer_classes(tiny.tiny_llama()) == ["LlamaDecoderLayer"]
