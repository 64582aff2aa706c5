"""Conversions of vision towers: equal outputs, both ways, and what is refused."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import transformers

from mllm_vision.encoder.convert import SIGLIPS, TOWERS, VITS
from mllm_vision.vlm.towers import check_tower, convert_tower, plain_tower, plain_type

FOLDED = 2e-6  # of the largest value: a layer scale folded into a matrix rounds


def tower(kind: str, seed: int = 0, **fields):
    """A tower whose norms, biases, scales and positions all differ from their initial values."""
    if kind == "dinov2":
        model = tiny.tiny_dinov2(seed, **fields)
    elif kind in ("vit", "siglip_vision_model"):
        model = {"vit": tiny.tiny_vit, "siglip_vision_model": tiny.tiny_siglip_vision}[kind](seed, **fields)
    elif kind == "clip_vision_model":
        return tiny.tiny_clip_vision(seed, **fields)
    else:
        settings = {**tiny.SIZES, **({"use_mean_pooling": False} if kind == "internvl_vision" else {}), **fields}
        config = transformers.CONFIG_MAPPING[kind](**settings)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = TOWERS[kind](config).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def outputs(model, pixels):
    with torch.no_grad():
        found = model(pixels, output_hidden_states=True)
    return [*found.hidden_states, found.last_hidden_state]


def difference(one, other, size: int = 32, channels: int = 3) -> float:
    pixels = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(5))
    pairs = list(zip(outputs(one, pixels), outputs(other, pixels), strict=True))
    assert float(pairs[-1][0].std()) > 0.1
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


PAIRS = [(a, b) for group in (SIGLIPS, VITS) for a in group for b in group if a != b]


@pytest.mark.parametrize(("source", "to"), PAIRS)
def test_every_conversion_keeps_every_hidden_state(source, to):
    one = tower(source)
    before = {name: value.clone() for name, value in one.state_dict().items()}
    other = convert_tower(one, to)
    assert other.config.model_type == to
    folds = source in ("dinov2", "internvl_vision") and to in ("vit", "blip_2_vision_model")
    assert difference(one, other) <= (FOLDED if folds else 0.0)
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    assert not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in other.parameters()}


@pytest.mark.parametrize(
    ("source", "inside"),
    [
        ("siglip_vision_model", "idefics2_vision"),
        ("siglip_vision_model", "idefics3_vision"),
        ("vit", "internvl_vision"),
        ("dinov2", "internvl_vision"),
        ("vit", "blip_2_vision_model"),
    ],
)
def test_there_and_back_is_the_same_encoder(source, inside):
    one = tower(source, seed=3, layer_norm_eps=1e-5, hidden_act="relu")
    one.config.mllm_vision = {"select_layer": -1, "select_feature": "patch"}
    back = plain_tower(convert_tower(one, inside))
    assert back.config.model_type == source
    assert (back.config.layer_norm_eps, back.config.hidden_act) == (1e-5, "relu")
    assert back.config.mllm_vision == one.config.mllm_vision
    mine, theirs = one.state_dict(), back.state_dict()
    assert not [name for name in theirs if not torch.equal(theirs[name], mine[name])]
    assert not [
        name for name in mine if name not in theirs and not name.startswith(("head.", "pooler.", "embeddings.mask"))
    ]


def test_a_tuned_layer_scale_comes_out_as_dinov2():
    inside = convert_tower(tower("vit"), "internvl_vision")
    assert plain_type(inside) == "vit"
    with torch.no_grad():
        inside.encoder.layer[1].lambda_2[3] = 0.9
    assert plain_type(inside) == "dinov2"
    assert difference(inside, plain_tower(inside)) == 0.0


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
@pytest.mark.parametrize("to", ["internvl_vision", "blip_2_vision_model"])
def test_attention_without_bias(kind, to):
    one = tower(kind, qkv_bias=False)
    other = convert_tower(one, to)
    assert difference(one, other) <= FOLDED
    assert difference(other, plain_tower(other)) <= FOLDED


def test_a_size_that_the_patches_do_not_divide():
    one = tower("siglip_vision_model", image_size=35)  # as so400m's 384 by 14: the convolution drops the rest
    assert difference(one, convert_tower(one, "idefics2_vision"), size=35) == 0.0


def test_grids_that_idefics_rounds_are_refused():
    """At 25 patches a side transformers' Idefics2 gives several rows of patches the position of a neighbour."""
    one = tower("siglip_vision_model", image_size=100, patch_size=4)
    with pytest.raises(ValueError, match="25 patches a side.*image_size=96 or 104"):
        convert_tower(one, "idefics2_vision")
    for size in (96, 104):
        good = tower("siglip_vision_model", image_size=size, patch_size=4)
        assert difference(good, convert_tower(good, "idefics2_vision"), size=size) == 0.0
    inside = tower("idefics2_vision", image_size=100, patch_size=4)
    assert difference(inside, plain_tower(inside), size=100) == 0.0  # back out, it is what the system saw


def test_training_mode_draws_the_same_dropout():
    one = tower("vit", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2).train()
    other = convert_tower(one, "internvl_vision")
    assert other.training
    pixels = torch.randn(2, 3, 32, 32)
    seen = []
    for model in (one, other):
        torch.manual_seed(7)
        seen.append(model(pixels).last_hidden_state)
    assert torch.equal(*seen)


def test_type_device_and_random_state_stay():
    one = tower("vit").to(torch.bfloat16)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    other = convert_tower(one, "internvl_vision")
    assert torch.equal(torch.get_rng_state(), before)
    assert other.dtype == torch.bfloat16
    assert difference_of_bf16(one, other) == 0.0
    assert convert_tower(one, "vit") is one


def difference_of_bf16(one, other) -> float:
    pixels = torch.randn(1, 3, 32, 32).to(torch.bfloat16)
    with torch.no_grad():
        return float((one(pixels).last_hidden_state - other(pixels).last_hidden_state).abs().max())


REFUSED = [
    ("clip_vision_model", "internvl_vision", {}, "norm before its first layer.*vit or dinov2"),
    ("clip_vision_model", "idefics2_vision", {}, "siglip_vision_model"),
    ("siglip_vision_model", "internvl_vision", {}, "no class token.*Idefics3"),
    ("siglip_vision_model", "blip_2_vision_model", {}, "no class token.*vit or dinov2"),
    ("vit", "idefics3_vision", {}, "class token.*siglip_vision_model"),
    ("vit", "clip_vision_model", {}, "conversions to siglip_vision_model"),
    ("dinov2", "internvl_vision", {"use_swiglu_ffn": True}, "SwiGLU.*plain MLP"),
    ("dinov2", "internvl_vision", {"drop_path_rate": 0.1}, "drop_path_rate=0.1.*set drop_path_rate to 0"),
    ("dinov2", "internvl_vision", {"hidden_dropout_prob": 0.1}, "dropout 0.1 after the embeddings.*to 0"),
    ("vit", "blip_2_vision_model", {"hidden_dropout_prob": 0.1}, "cannot become blip_2_vision_model"),
    ("vit", "blip_2_vision_model", {"num_channels": 1}, "num_channels=1.*3 channels"),
    ("vit", "internvl_vision", {"image_size": [32, 48]}, "square"),
    ("internvl_vision", "vit", {"use_mean_pooling": True}, "use_mean_pooling=True"),
    ("internvl_vision", "vit", {"use_qk_norm": True}, "use_qk_norm=True"),
    ("internvl_vision", "dinov2", {"intermediate_size": 80}, "intermediate_size=80.*convert_tower"),
]


@pytest.mark.parametrize(("source", "to", "fields", "message"), REFUSED)
def test_what_is_refused(source, to, fields, message):
    one = tower(source, **fields)
    with pytest.raises(ValueError, match=message):
        convert_tower(one, to)
    with pytest.raises(ValueError, match=message):
        check_tower(one.config, to)  # before any weight is loaded


def test_registers_are_refused():
    config = transformers.Dinov2WithRegistersConfig(num_register_tokens=2)
    with pytest.raises(ValueError, match="register tokens"):
        check_tower(config, "internvl_vision")


def test_the_way_out_of_an_odd_width():
    one = tower("internvl_vision", intermediate_size=80)
    assert difference(one, convert_tower(one, "vit")) <= FOLDED


@pytest.mark.parametrize("to", ["internvl_vision", "blip_2_vision_model"])
def test_gradients_reach_every_weight_of_a_converted_tower(to):
    other = convert_tower(tower("vit"), to)
    other(torch.randn(1, 3, 32, 32)).last_hidden_state.pow(2).sum().backward()
    assert not [name for name, parameter in other.named_parameters() if parameter.grad is None]


def test_the_config_of_the_source_is_not_shared():
    one = tower("vit")
    kept = copy.deepcopy(one.config.to_dict())
    convert_tower(one, "internvl_vision").config.mllm_vision["select_layer"] = -3
    assert one.config.to_dict() == kept
