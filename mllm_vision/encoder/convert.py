"""Exact conversions between the vision tower types of transformers.

Some vision-language classes accept one tower type only (InternVL, BLIP-2, Idefics2, Idefics3, SmolVLM). Their towers
are the layers of a ViT, a DINOv2 or a SigLIP under other names, so an encoder moves into such a class, and the tuned
tower comes back out, without a change of its outputs. Everything else is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

from mllm_vision.encoder.families import FAMILIES, _side

State = dict[str, Tensor]

# Towers without a class token: equal layers and equal parameter names.
SIGLIPS: dict[str, type[PreTrainedModel]] = {
    "siglip_vision_model": transformers.SiglipVisionModel,
    "idefics2_vision": Idefics2VisionTransformer,
    "idefics3_vision": Idefics3VisionTransformer,
    "smolvlm_vision": SmolVLMVisionTransformer,
}
# Towers with a class token: equal layers, other parameter names.
VITS: dict[str, type[PreTrainedModel]] = {
    "vit": transformers.ViTModel,
    "dinov2": transformers.Dinov2Model,
    "internvl_vision": transformers.InternVLVisionModel,
    "blip_2_vision_model": transformers.Blip2VisionModel,
}
TOWERS: dict[str, type[PreTrainedModel]] = {**SIGLIPS, **VITS}

_PATCHED = {"cls": "embeddings.cls_token", "positions": "embeddings.position_embeddings"}
_PATCHED |= {"patch": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
_QKV = {letter: f"attention.{letter}_proj" for letter in "qkv"}
_MLP = {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
# For each type: where its layers are, the parameters outside the layers, those inside.
_NAMES: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {
    "vit": (
        "layers",
        _PATCHED,
        {**_QKV, **_MLP, "out": "attention.o_proj", "norm1": "layernorm_before", "norm2": "layernorm_after"},
    ),
    "dinov2": (
        "encoder.layer",
        _PATCHED,
        {**_QKV, **_MLP, "out": "attention.o_proj", "norm1": "norm1", "norm2": "norm2"}
        | {"scale1": "layer_scale1.lambda1", "scale2": "layer_scale2.lambda1"},
    ),
    "internvl_vision": (
        "encoder.layer",
        _PATCHED,
        {**_QKV, **_MLP, "out": "attention.projection_layer", "norm1": "layernorm_before", "norm2": "layernorm_after"}
        | {"scale1": "lambda_1", "scale2": "lambda_2"},
    ),
    "blip_2_vision_model": (
        "encoder.layers",
        {"cls": "embeddings.class_embedding", "positions": "embeddings.position_embedding"}
        | {"patch": "embeddings.patch_embedding", "norm": "post_layernorm"},
        {**_MLP, "qkv": "self_attn.qkv", "out": "self_attn.projection", "norm1": "layer_norm1", "norm2": "layer_norm2"},
    ),
}


@dataclass(frozen=True)
class _Settings:
    """What the config of a tower says, under one set of names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    attention_dropout: float
    qkv_bias: bool = True
    dropout: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """After the embeddings, the attention and the MLP."""


@torch.no_grad()
def convert_tower(backbone: PreTrainedModel, to: str) -> PreTrainedModel:
    """A copy of a vision tower as another tower type, with the same outputs for images of its native size.

    Hidden states and the last hidden state are equal bit for bit, except where a layer scale has to be folded into the
    matrices before it (from `dinov2`, or from an `internvl_vision` with trained scales, to `vit` or
    `blip_2_vision_model`), which rounds. Pooling heads, which the system's towers do not have, are left out.

    Args:
        backbone: a tower of one of the types below.
        to: another type of the same group: `siglip_vision_model`, `idefics2_vision`, `idefics3_vision`,
            `smolvlm_vision`; or `vit`, `dinov2`, `internvl_vision`, `blip_2_vision_model`.

    Returns:
        PreTrainedModel: a new model; `backbone` itself if it is of that type.

    Raises:
        ValueError: types without an exact conversion, or a setting that the target does not have.
    """
    source = _type_of(backbone)
    if source == to:
        return backbone
    check_tower(backbone, to)
    if to in SIGLIPS:
        state = {name: value for name, value in backbone.state_dict().items() if not name.startswith("head.")}
        state["embeddings.position_embedding.weight"] = state["embeddings.position_embedding.weight"][_rows(backbone)]
    else:
        state = _write(_read(backbone), to)
    config = _target_config(backbone.config, to)
    config.mllm_vision = getattr(backbone.config, "mllm_vision", None) or {}
    attention = backbone.config._attn_implementation
    config._attn_implementation = attention if attention in ("eager", "sdpa") else None
    arguments: dict[str, Any] = {"add_pooling_layer": False} if to == "vit" else {}
    with torch.random.fork_rng(devices=[]):  # the random weights are overwritten; they are not to cost random numbers
        model = TOWERS[to](config, **arguments)
    model.load_state_dict(state)
    return model.to(device=backbone.device, dtype=backbone.dtype).train(backbone.training)  # type: ignore[call-arg]


def check_tower(backbone: Any, to: str) -> None:
    """Raises ValueError where `convert_tower(backbone, to)` would; reads the config only (a model, or its config)."""
    config = getattr(backbone, "config", backbone)
    source = config.model_type
    if source == to:
        return
    group = SIGLIPS if to in SIGLIPS else VITS
    if to not in TOWERS or source not in group:
        raise ValueError(f"a {source} tower cannot become {to}: {_remedy(source, to)}")
    _target_config(config, to)


def plain_type(tower: PreTrainedModel) -> str:
    """The type of plain encoder that holds a tower exactly; its own type if it is one.

    `siglip_vision_model` for the towers of Idefics2, Idefics3 and SmolVLM, `vit` for BLIP-2's, and for InternVL's
    `vit` where all layer scales are 1, else `dinov2`. (DINOv2's MLP is a whole multiple of the width; others become a
    `vit`, with a rounding.)

    Raises:
        ValueError: a type that is neither an encoder nor one of these towers.
    """
    source = _type_of(tower)
    if source in FAMILIES:
        return source
    if source in SIGLIPS:
        return "siglip_vision_model"
    if source not in VITS:
        raise ValueError(f"a {source} tower has no plain encoder; towers of {', '.join(TOWERS)} have one")
    scales = [value for name, value in tower.state_dict().items() if name.endswith(("lambda_1", "lambda_2"))]
    config: Any = tower.config
    whole = config.intermediate_size % config.hidden_size == 0
    return "dinov2" if whole and not all(bool((value == 1).all()) for value in scales) else "vit"


def plain_tower(tower: PreTrainedModel) -> PreTrainedModel:
    """`convert_tower` to `plain_type`: what was tuned inside a system, as an encoder's backbone."""
    return convert_tower(tower, plain_type(tower))


def _type_of(tower: Any) -> str:
    return str(tower.config.model_type)


def _remedy(source: str, to: str) -> str:
    """Why there is no conversion, and which encoders fit."""
    if to not in TOWERS:
        return f"there are conversions to {', '.join(TOWERS)} only"
    fits = ["siglip_vision_model"] if to in SIGLIPS else ["vit", "dinov2"]
    reasons = {
        "clip_vision_model": "CLIP has a norm before its first layer, which the target does not have",
        "dinov2_with_registers": "the target has no register tokens",
        "dinov3_vit": "DINOv3 has rotary positions, the target learned ones",
    }
    convolutional = source in FAMILIES and FAMILIES[source].convolutional
    reason = "a convolutional network has no patches" if convolutional else reasons.get(source)
    if reason is None:
        reason = (
            "SigLIP has no class token, which the target has; Idefics3 joins SigLIP with a pixel shuffle"
            if source in SIGLIPS
            else "it has a class token, which the target does not have"
        )
    return f"{reason}. Train an encoder of {' or '.join(fits)} for it, or use a system that takes any tower (LLaVA)"


def _settings(config: Any) -> _Settings:
    """The settings of a tower's config; ValueError for those that the other types of its group do not have."""
    source = config.model_type

    def refuse(what: str, remedy: str) -> None:
        raise ValueError(f"this {source} tower has {what}, which no other tower type has; {remedy}")

    width, heads = config.hidden_size, config.num_attention_heads
    if getattr(config, "head_dim", None) not in (None, width // heads):
        refuse(f"head_dim={config.head_dim}", f"use an encoder whose heads have hidden_size / heads = {width // heads}")
    if getattr(config, "use_swiglu_ffn", False):
        refuse("a SwiGLU MLP (use_swiglu_ffn)", "use a DINOv2 with the plain MLP (small, base or large), or a ViT")
    if getattr(config, "drop_path_rate", 0.0):
        refuse(
            f"drop_path_rate={config.drop_path_rate}",
            "set drop_path_rate to 0 in its config first (outputs in evaluation mode do not change)",
        )
    if source == "internvl_vision":
        if config.use_mean_pooling:
            refuse("no norm after its last layer (use_mean_pooling=True)", "use it within InternVL only")
        if config.use_qk_norm or config.norm_type != "layer_norm" or not config.use_absolute_position_embeddings:
            refuse(
                f"norm_type={config.norm_type!r}, use_qk_norm={config.use_qk_norm} and "
                f"use_absolute_position_embeddings={config.use_absolute_position_embeddings}",
                "use it within InternVL only",
            )
    hidden = getattr(config, "hidden_dropout_prob", 0.0)
    attended, mixed = {
        "vit": (hidden, hidden),
        "internvl_vision": (getattr(config, "projection_dropout", 0.0), hidden),
    }.get(source, (0.0, 0.0))
    inner = int(width * config.mlp_ratio) if source == "dinov2" else config.intermediate_size
    attention = getattr(config, "attention_dropout", getattr(config, "attention_probs_dropout_prob", 0.0))
    bias = getattr(config, "attention_bias" if source == "internvl_vision" else "qkv_bias", True)
    return _Settings(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_channels=getattr(config, "num_channels", 3),
        image_size=_side(config.image_size),
        patch_size=_side(config.patch_size),
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        attention_dropout=attention,
        qkv_bias=bias,
        dropout=(hidden, attended, mixed),
    )


def _target_config(config: Any, to: str) -> Any:
    """The config of the converted tower; ValueError for a setting that the target does not have."""
    settings = _settings(config)
    fields = {name: value for name, value in vars(settings).items() if name not in ("qkv_bias", "dropout")}
    if to in VITS:
        _check_dropout(settings.dropout, config.model_type, to)
    embedded, attended, _ = settings.dropout
    if to in ("vit", "dinov2"):
        fields |= {"hidden_dropout_prob": embedded, "qkv_bias": settings.qkv_bias}
        fields["attention_probs_dropout_prob"] = fields.pop("attention_dropout")
    if to == "dinov2":
        ratio, rest = divmod(fields.pop("intermediate_size"), settings.hidden_size)
        if rest:
            raise ValueError(
                f"a {config.model_type} tower with intermediate_size={settings.intermediate_size} cannot become "
                f"dinov2, whose MLP is a whole multiple of hidden_size={settings.hidden_size}; convert_tower(tower, "
                "'vit') holds it, with its layer scales folded into the matrices (a rounding of 1e-7)"
            )
        fields |= {"mlp_ratio": ratio, "use_mask_token": False}
    if to == "internvl_vision":
        fields |= {"hidden_dropout_prob": embedded, "projection_dropout": attended, "use_mean_pooling": False}
        fields |= {"attention_bias": settings.qkv_bias, "layer_scale_init_value": 1.0}
    if to == "blip_2_vision_model":
        if settings.num_channels != 3:
            raise ValueError(f"num_channels={settings.num_channels}: BLIP-2's tower takes 3 channels; use a ViT of 3")
        del fields["num_channels"]
        fields["qkv_bias"] = settings.qkv_bias
    if to == "siglip_vision_model":
        fields["vision_use_head"] = False
    elif to in SIGLIPS:
        _check_grid(settings.image_size, settings.patch_size, to)
    return CONFIG_MAPPING[to](**fields)


def _check_dropout(rates: tuple[float, float, float], source: str, to: str) -> None:
    """ValueError unless the target has dropout where the source has it."""
    embedded, attended, mixed = rates
    kept = {
        "vit": embedded == attended == mixed,
        "dinov2": not attended and not mixed,
        "internvl_vision": embedded == mixed,
        "blip_2_vision_model": not any(rates),
    }
    if not kept[to]:
        raise ValueError(
            f"a {source} tower with dropout {embedded} after the embeddings, {attended} after attention and {mixed} "
            f"after the MLP cannot become {to}, which has it elsewhere; set the rates to 0 in its config first "
            "(outputs in evaluation mode do not change)"
        )


def _position_rows(model_type: str, image_size: int, patch_size: int) -> Tensor:
    """The row of the position table that each patch of a native image gets, from the tower's own code."""
    make: Any = CONFIG_MAPPING[model_type]
    config = make(
        hidden_size=1, num_attention_heads=1, num_hidden_layers=0, image_size=image_size, patch_size=patch_size
    )
    with torch.random.fork_rng(devices=[]):
        embeddings: Any = TOWERS[model_type](config).embeddings
    side = image_size // patch_size
    embeddings.patch_embedding.weight.data.zero_()
    embeddings.patch_embedding.bias.data.zero_()
    embeddings.position_embedding.weight.data = torch.arange(side * side, dtype=torch.float32)[:, None]
    pixels = torch.zeros(1, config.num_channels, image_size, image_size)
    with torch.no_grad():
        rows = embeddings(pixels, patch_attention_mask=torch.ones(1, side, side, dtype=torch.bool))
    return rows.flatten().long()


def _check_grid(image_size: int, patch_size: int, to: str) -> None:
    """ValueError for a grid at which the tower gives two rows of patches the same position.

    Idefics' towers compute positions from fractional coordinates in fp32 (transformers 5.23), which rounds into the
    neighbouring row at some sizes, such as 25 or 40 patches a side.
    """

    def exact(side: int) -> bool:
        return torch.equal(_position_rows(to, side * patch_size, patch_size), torch.arange(side * side))

    side = image_size // patch_size
    if side < 1 or exact(side):
        return
    near = sorted((n for n in range(max(1, side - 4), side + 5) if exact(n)), key=lambda n: abs(n - side))[:2]
    sizes = " or ".join(str(n * patch_size) for n in sorted(near))
    raise ValueError(
        f"a siglip_vision_model with {side} patches a side (image_size={image_size}, patch_size={patch_size}) cannot "
        f"become {to}: its positions, computed in fp32, give some rows of patches the position of their neighbour; "
        f"load the encoder with image_size={sizes}"
    )


def _rows(backbone: PreTrainedModel) -> Tensor:
    """The row of the position table that each patch of a native image gets."""
    config: Any = backbone.config
    side = _side(config.image_size) // _side(config.patch_size)
    if config.model_type == "siglip_vision_model":
        return torch.arange(side * side, device=backbone.device)
    return _position_rows(config.model_type, _side(config.image_size), _side(config.patch_size)).to(backbone.device)


def _read(backbone: PreTrainedModel) -> State:
    """Weights of a tower with a class token under the common names; queries, keys and values apart."""
    layers, outside, inside = _NAMES[_type_of(backbone)]
    outside_of = {theirs: ours for ours, theirs in outside.items()}
    inside_of = {theirs: ours for ours, theirs in inside.items()}
    pattern = re.compile(rf"{re.escape(layers)}\.(\d+)\.(.+?)(\.weight|\.bias)?$")
    state: State = {}
    for name, value in backbone.state_dict().items():
        found = pattern.match(name)
        stem, _, kind = name.rpartition(".")
        if found:
            number, part, end = found.groups()
            state[f"{number}.{inside_of[part]}{end or ''}"] = value
        elif name in outside_of:
            state[outside_of[name]] = value
        elif stem in outside_of:
            state[f"{outside_of[stem]}.{kind}"] = value
    # The rest, a pooler and a mask token, has no part in the hidden states.
    for name in [name for name in state if ".qkv." in name]:
        for letter, part in zip("qkv", state.pop(name).chunk(3), strict=True):
            state[name.replace(".qkv.", f".{letter}.")] = part
    return state


def _write(state: State, to: str) -> State:
    """The state of a tower type from weights under the common names."""
    layers, outside, inside = _NAMES[to]
    state = dict(state)
    numbers = sorted({int(name.split(".")[0]) for name in state if name[0].isdigit()})
    for number in numbers:
        for scale, matrix in (("scale1", "out"), ("scale2", "fc2")):
            old = state.pop(f"{number}.{scale}", None)
            weight, bias = f"{number}.{matrix}.weight", f"{number}.{matrix}.bias"
            if scale in inside:
                state[f"{number}.{scale}"] = torch.ones_like(state[bias]) if old is None else old
            elif old is not None and not bool((old == 1).all()):
                state[weight], state[bias] = old[:, None] * state[weight], old * state[bias]
        if "qkv" in inside:
            for kind in ("weight", "bias"):
                parts = [state.pop(f"{number}.{letter}.{kind}", None) for letter in "qkv"]
                if parts[0] is not None:
                    state[f"{number}.qkv.{kind}"] = torch.cat([part for part in parts if part is not None])
    written: State = {}
    for name, value in state.items():
        first, _, rest = name.partition(".")
        part, _, kind = rest.partition(".")
        end = f".{kind}" if kind else ""
        if first.isdigit():
            written[f"{layers}.{first}.{inside[part]}{end}"] = value
        else:
            written[outside[first] + (f".{rest}" if rest else "")] = value
    return written
