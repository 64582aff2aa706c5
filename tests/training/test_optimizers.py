"""Which parameters decay, and which learning rate each gets."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn

from mllm_vision.modules.heads import NormalizedLinear
from mllm_vision.training.optim.optimizers import decays, parameter_groups, plain_name


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


def test_what_decays_beside_matrices_where_it_is_asked_for() -> None:
    """A method names tokens or the norms of its prototypes; `all` means every parameter, `matrices` none of these."""
    model = nn.ModuleDict({"tower": tiny.tiny_vit(), "last_layer": NormalizedLinear(4, 3, learn_norm=True)})

    def decayed(where: str) -> set[str]:
        names = {id(value): name for name, value in model.named_parameters()}
        also = ("cls_token", "last_layer.norm")
        groups = parameter_groups(
            model, weight_decay=0.1, learning_rate=1.0, weight_decay_on=where, also_decays=also, muon_learning_rate=2.0
        )
        assert not any(group["muon"] and value.ndim != 2 for group in groups for value in group["params"])
        return {names[id(value)] for group in groups if group["weight_decay"] for value in group["params"]}

    matrices, method = decayed("matrices"), decayed("method")
    assert method - matrices == {"tower.embeddings.cls_token", "last_layer.norm"}
    assert decayed("all") == {name for name, _ in model.named_parameters()} > method


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


def test_a_module_has_a_weight_decay_of_its_own_with_or_without_a_rate() -> None:
    model = Pair()
    model.logit_scale.requires_grad_(False)
    given = {"learning_rates": {"vision": 1e-3}, "weight_decays": {"vision.encoder": 0.0, "head": 0.5, "vision": None}}
    groups = parameter_groups(model, weight_decay=0.1, learning_rate=1e-2, **given)
    found = named(model, groups)
    assert found["head.weight"]["weight_decay"] == 0.5 and found["head.weight"]["lr"] == 1e-2
    assert found["head.bias"]["weight_decay"] == 0, "a bias does not decay, whatever its module does"
    inner = found["vision.encoder.layers.0.mlp.fc1.weight"]
    assert inner["weight_decay"] == 0 and inner["decays"] and inner["lr"] == 1e-3
    outer = found["vision.embeddings.patch_embedding.weight"]
    assert outer["weight_decay"] == 0.1 and outer["lr"] == 1e-3
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.AdamW(groups, lr=1e-2).step()  # with a gradient of 0 AdamW only decays, by rate times weight decay
    for name, p in model.named_parameters():
        factor = 1 - found[name]["lr"] * found[name]["weight_decay"] if name in found else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)
    with pytest.raises(ValueError, match="weight decay for unknown parameter prefix 'haed'"):
        parameter_groups(model, weight_decay=0.1, learning_rate=1e-2, weight_decays={"haed": 0.1})
    with pytest.raises(ValueError, match="weight decay -1.0 of 'head' must not be negative"):
        parameter_groups(model, weight_decay=0.1, learning_rate=1e-2, weight_decays={"head": -1.0})


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


# ---- rates by depth --------------------------------------------------------------------------------------------


def rates_of(model: nn.Module, **settings) -> dict[str, float]:
    groups = parameter_groups(model, weight_decay=0.1, learning_rate=1.0, **settings)
    return {name: group["lr"] for name, group in named(model, groups).items()}


def test_layer_decay_by_hand() -> None:
    model = Pair()
    model.vision = tiny.tiny_clip_vision(num_hidden_layers=3)
    found = rates_of(model, layer_decay=0.5, patch_embedding_lr_scale=0.2)
    expected = {
        "vision.embeddings.class_embedding": 1 / 16,
        "vision.embeddings.position_embedding.weight": 1 / 16,
        "vision.embeddings.patch_embedding.weight": 0.2 / 16,
        "vision.pre_layrnorm.weight": 1 / 16,
        "vision.encoder.layers.0.mlp.fc1.weight": 1 / 8,
        "vision.encoder.layers.1.layer_norm1.bias": 1 / 4,
        "vision.encoder.layers.2.self_attn.q_proj.weight": 1 / 2,
        "vision.post_layernorm.weight": 1.0,
        "head.weight": 1.0,
        "logit_scale": 1.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert set(found.values()) == {0.2 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0}
    first = parameter_groups(model, weight_decay=0.1, learning_rate=1.0, layer_decay=0.5)[0]
    assert first["lr"] == 1.0 and first["decays"]  # the rate the Trainer logs is the peak


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = tiny.tiny_clip_vision(num_hidden_layers=2)
        self.text = tiny.tiny_clip().text_model
        self.logit_scale = nn.Parameter(torch.tensor(1.0))


def test_towers_may_decay_apart_and_module_rates_stay() -> None:
    model = TwoTowers()
    found = rates_of(model, layer_decay={"vision": 0.5})
    assert found["vision.encoder.layers.0.mlp.fc1.weight"] == 0.25
    assert found["vision.embeddings.class_embedding"] == 0.125
    assert all(rate == 1.0 for name, rate in found.items() if not name.startswith("vision"))
    both = rates_of(model, layer_decay={"vision": 0.5, "text": 0.1}, learning_rates={"text": 10.0})
    assert both["text.encoder.layers.1.mlp.fc1.weight"] == pytest.approx(1.0)
    assert both["text.embeddings.token_embedding.weight"] == pytest.approx(0.01)
    assert both["text.final_layer_norm.weight"] == 10.0 and both["vision.encoder.layers.1.mlp.fc1.weight"] == 0.5
    with pytest.raises(ValueError, match="unknown tower 'vison'; the nearest known one is 'vision'"):
        rates_of(model, layer_decay={"vison": 0.5})
    with pytest.raises(ValueError, match="needs repeated layers"):
        rates_of(nn.Linear(2, 2), layer_decay=0.5)


def test_a_frozen_copy_is_no_second_tower() -> None:
    """What stands before the one tower that trains, a method's own mask token too, is its deepest layer."""
    model = nn.Module()
    model.encoder, model.head = tiny.tiny_vit(), nn.Linear(4, 4)
    model.teacher = copy.deepcopy(model.encoder).requires_grad_(False)
    model.mask_token = nn.Parameter(torch.zeros(4))
    found = rates_of(model, layer_decay=0.5)
    assert found["mask_token"] == found["encoder.embeddings.cls_token"] == 0.125 and found["head.weight"] == 1.0
    model.encoder.embeddings.requires_grad_(False)
    model.encoder.layers[0].requires_grad_(False)  # a part of a tower that stands still counts as depth all the same
    assert rates_of(model, layer_decay=0.5)["encoder.layers.1.layernorm_before.weight"] == 0.5


def test_layers_of_other_families() -> None:
    """Outermost blocks count: a ResNet's stages, DINOv2's layers, a language model's; inputs are the deepest."""
    from transformers import ResNetConfig, ResNetModel

    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"))
    found = rates_of(resnet, layer_decay=0.5, patch_embedding_lr_scale=0.1)
    assert found["embedder.embedder.convolution.weight"] == pytest.approx(0.125 * 0.1)
    assert {rate for name, rate in found.items() if ".stages.1." in name} == {0.5}
    assert {rate for name, rate in found.items() if ".stages.0." in name} == {0.25}
    for model, deepest, last in (
        (tiny.tiny_dinov2(), "embeddings.cls_token", "layernorm.weight"),
        (tiny.tiny_siglip_vision(), "embeddings.patch_embedding.weight", "head.probe"),
        (tiny.tiny_vit(), "embeddings.patch_embeddings.projection.weight", "layernorm.weight"),
        (tiny.tiny_llama(64), "model.embed_tokens.weight", "lm_head.weight"),
    ):
        found = rates_of(model, layer_decay=0.5)
        assert found[deepest] == 0.125 and found[last] == 1.0, type(model).__name__
        assert sorted(set(found.values())) == [0.125, 0.25, 0.5, 1.0], type(model).__name__


def test_a_rate_for_biases_and_norms() -> None:
    """Barlow Twins: 0.2 for weights, 0.0048 for biases and norms; beside a module's own rate in the same ratio."""
    found = rates_of(Pair(), bias_learning_rate=0.024, learning_rates={"head": 0.5})
    assert found["vision.encoder.layers.0.mlp.fc1.weight"] == 1.0
    assert found["vision.encoder.layers.0.mlp.fc1.bias"] == found["logit_scale"] == 0.024
    assert found["head.weight"] == 0.5 and found["head.bias"] == pytest.approx(0.012)


def test_what_decays_in_every_family() -> None:
    """Rule 2 over whole models: of all that is more than 1-D, just these take no decay."""
    from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel, Siglip2VisionConfig, Siglip2VisionModel

    sizes = {**tiny.SIZES, "image_size": 32}
    bert = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    siglip2 = Siglip2VisionConfig(**{name: value for name, value in sizes.items() if name != "image_size"})
    expected = {
        tiny.tiny_clip_vision: {"embeddings.position_embedding.weight"},
        tiny.tiny_vit: {"embeddings.cls_token", "embeddings.position_embeddings"},
        tiny.tiny_dinov2: {"embeddings.cls_token", "embeddings.position_embeddings", "embeddings.mask_token"},
        tiny.tiny_llama: set(),
        lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])): set(),
        lambda: BertModel(bert): {"embeddings.position_embeddings.weight"},
        lambda: Siglip2VisionModel(siglip2): {"embeddings.position_embedding.weight"},
    }
    for make, free in expected.items():
        parameters = dict(make().named_parameters())
        found = {name for name, value in parameters.items() if value.ndim > 1 and not decays(name, value)}
        assert found == free
        assert not any(decays(name, value) for name, value in parameters.items() if value.ndim <= 1)
