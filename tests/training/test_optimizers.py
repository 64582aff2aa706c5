"""Which parameters decay, and which learning rate each gets."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from mllm_vision.training.optimizers import decays, parameter_groups, plain_name


class Pair(nn.Module):
    """A dual encoder's parameters by hand: the expected sets below are written out, not computed."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = tiny.tiny_clip_vision(num_hidden_layers=1)
        self.head = nn.Linear(32, 16)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = nn.Parameter(torch.full((1, 1), -10.0))


def named(model: nn.Module, groups: list[dict]) -> dict[str, dict]:
    """Parameter name -> its group, checking that each is in exactly one."""
    by_id = {}
    for group in groups:
        for parameter in group["params"]:
            assert id(parameter) not in by_id
            by_id[id(parameter)] = group
    return {name: by_id[id(parameter)] for name, parameter in model.named_parameters() if id(parameter) in by_id}


def test_only_matrices_decay() -> None:
    model = Pair()
    found = named(model, parameter_groups(model, weight_decay=0.1, learning_rate=1.0))
    assert set(found) == {name for name, _ in model.named_parameters()}
    decayed = {name for name, group in found.items() if group["weight_decay"] == 0.1}
    layer = "vision.encoder.layers.0"
    assert decayed == {
        "vision.embeddings.patch_embedding.weight",
        *(f"{layer}.self_attn.{part}_proj.weight" for part in ("q", "k", "v", "out")),
        f"{layer}.mlp.fc1.weight",
        f"{layer}.mlp.fc2.weight",
        "head.weight",
    }
    assert all(group["weight_decay"] == 0 for name, group in found.items() if name not in decayed)


@pytest.mark.parametrize(
    ("model", "free"),
    [
        (tiny.tiny_dinov2, ["embeddings.cls_token", "embeddings.position_embeddings", "embeddings.mask_token"]),
        (tiny.tiny_vit, ["embeddings.cls_token", "embeddings.position_embeddings"]),
        (tiny.tiny_siglip_vision, ["embeddings.position_embedding.weight"]),
    ],
)
def test_class_and_position_embeddings_do_not_decay(model, free: list[str]) -> None:
    parameters = dict(model().named_parameters())
    for name in free:
        assert parameters[name].ndim > 1 and not decays(name, parameters[name])
    assert decays("embeddings.patch_embeddings.weight", torch.zeros(2, 3, 4, 4))
    assert decays("model.embed_tokens.weight", torch.zeros(3, 4))


def test_the_longest_prefix_wins_and_frozen_ones_are_left_out() -> None:
    model = Pair()
    model.vision.embeddings.requires_grad_(False)
    rates = {"vision": 1e-3, "vision.encoder.layers.0.mlp": 1e-4, "head": None}
    found = named(model, parameter_groups(model, weight_decay=0.1, learning_rate=1e-2, learning_rates=rates))
    assert not any(name.startswith("vision.embeddings") for name in found)
    assert found["vision.encoder.layers.0.mlp.fc1.weight"]["lr"] == 1e-4
    assert found["vision.encoder.layers.0.self_attn.q_proj.bias"]["lr"] == 1e-3
    assert found["head.weight"]["lr"] == 1e-2 and found["logit_scale"]["lr"] == 1e-2
    groups = parameter_groups(model, weight_decay=0.1, learning_rate=1e-2, learning_rates=rates)
    assert groups[0]["group_name"] == "default"  # the Trainer logs the rate of the first group


def test_prefixes_hold_under_peft_and_ddp() -> None:
    assert plain_name("module.base_model.model.model.vision_tower.x") == "model.vision_tower.x"
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny.tiny_llama(64), LoraConfig(target_modules=["q_proj"], r=2))
    found = named(
        model, parameter_groups(model, weight_decay=0.0, learning_rate=1.0, learning_rates={"model.layers": 0.5})
    )
    assert found and all("lora_" in name and group["lr"] == 0.5 for name, group in found.items())


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"vison": 1e-3}, "unknown parameter prefix 'vison'; the nearest known one is 'vision'"),
        ({"head": -1.0}, "negative"),
    ],
)
def test_what_is_refused(rates: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_groups(Pair(), weight_decay=0.0, learning_rate=1.0, learning_rates=rates)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="every parameter is frozen"):
        parameter_groups(Pair().requires_grad_(False), weight_decay=0.0, learning_rate=1.0)
