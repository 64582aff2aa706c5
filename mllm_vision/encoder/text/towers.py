"""Text towers and the tokenizers that go with them.

Our own small text tower is a `CLIPTextModel` or `SiglipTextModel` built small from its config, so that the
trained pair is a native `CLIPModel` or `SiglipModel`. Any other text model of transformers works by path.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_vision.encoder.clip_layers import is_plain, packed_text
from mllm_vision.errors import reading, unknown_name

CLIP_TEXT, SIGLIP_TEXT = "clip_text_model", "siglip_text_model"
# A tower that two CPU cores train in minutes; every field can be overridden by name.
SMALL_TEXT_TOWER = {"hidden_size": 256, "num_hidden_layers": 4, "hidden_act": "gelu"}
DEFAULT_LENGTH = {CLIP_TEXT: 77, SIGLIP_TEXT: 64}
END_OF_TEXT = "<|endoftext|>"
POOLINGS = ("pooler", "mean", "last")


def text_sizes(vision: Any) -> dict[str, Any]:
    """Config fields of a text tower in proportion to an image tower.

    Beside SigLIP's image towers: the same width, layers, heads and MLP (arXiv:2303.15343). Beside other transformers
    CLIP's proportion: two thirds of the width in steps of 128, heads of 64, at most 12 layers (512 beside 768, 768
    beside 1024; arXiv:2103.00020, table 20); the same shape up to a width of 128. Beside a ResNet of 1024 channels or
    more CLIP's own, 512 wide with 12 layers; beside a smaller one `SMALL_TEXT_TOWER`.

    Args:
        vision: config of the image tower.
    """
    width, layers = getattr(vision, "hidden_size", None), getattr(vision, "num_hidden_layers", None)
    heads = getattr(vision, "num_attention_heads", None)
    if width is None or layers is None or heads is None:
        channels = (getattr(vision, "hidden_sizes", None) or [getattr(vision, "hidden_dim", 0)])[-1]
        return {"hidden_size": 512, "num_hidden_layers": 12} if channels >= 1024 else {}
    mlp = getattr(vision, "intermediate_size", None) or 4 * width
    if vision.model_type == "siglip_vision_model" or width <= 128:
        sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": mlp}
        return sizes | {"num_hidden_layers": layers if vision.model_type == "siglip_vision_model" else min(12, layers)}
    return {"hidden_size": -(-width * 2 // 3 // 128) * 128, "num_hidden_layers": min(12, layers)}


def build_text_tower(
    spec: str,
    tokenizer: Any,
    *,
    overrides: dict[str, Any] | None = None,
    max_length: int | None = None,
    projection_size: int | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[Any, Any]:
    """A text tower and a copy of the tokenizer that fits it.

    Args:
        spec: `"clip_text_model"` or `"siglip_text_model"` for our own small tower with random weights, or the
            path or Hub id of any transformers text model (of a whole CLIP or SigLIP model: its text tower).
        tokenizer: any transformers tokenizer; it is copied, never changed.
        overrides: config fields of a tower built here, for example `{"hidden_size": 512}`; see `text_sizes`.
        max_length: longest text in tokens, the end token included. Default 77 (CLIP), 64 (SigLIP), or what
            a pretrained tower has positions for.
        projection_size: width of a SigLIP tower's own head: the width of the image tower.
        revision: Hub revision of a pretrained tower.
        token: Hub token of a pretrained tower.

    Returns:
        The model (its `pooler_output` is one vector per text where it has one) and the tokenizer.

    Raises:
        ValueError: a tokenizer that cannot end its texts, a vocabulary larger than the tower's, a length the
            tower has no positions for, or an unknown config field.
    """
    if spec in (CLIP_TEXT, SIGLIP_TEXT):
        length = max_length or DEFAULT_LENGTH[spec]
        if spec == SIGLIP_TEXT and length > DEFAULT_LENGTH[spec]:
            raise ValueError(
                f"max_length={length}: a SigLIP text tower pools its last position, and transformers' pipelines pad "
                f"its texts to {DEFAULT_LENGTH[spec]} tokens; use {DEFAULT_LENGTH[spec]} or less, or {CLIP_TEXT}"
            )
        tokenizer = prepare_tokenizer(tokenizer, spec, length)
        return _build_small(spec, tokenizer, dict(overrides or {}), length, projection_size), tokenizer
    if overrides:
        raise ValueError(
            f"config overrides {sorted(overrides)} only apply to a tower built here ({CLIP_TEXT} or "
            f"{SIGLIP_TEXT}), not to the pretrained text tower {spec!r}"
        )
    model = load_text_tower(spec, revision=revision, token=token)
    positions = text_positions(model)
    length = min(max_length or positions or 512, positions or 512)
    if max_length and positions and max_length > positions:
        raise ValueError(f"max_length={max_length} but the text tower {spec!r} has {positions} positions")
    tokenizer = prepare_tokenizer(tokenizer, model.config.model_type, length, adapt_end=False)
    check_tokenizer(model, tokenizer)
    return model, tokenizer


def _build_small(spec: str, tokenizer: Any, overrides: dict[str, Any], length: int, projection_size: int | None) -> Any:
    import transformers

    prefix = "CLIP" if spec == CLIP_TEXT else "Siglip"
    config_class = getattr(transformers, f"{prefix}TextConfig")
    known = {field.name for field in dataclasses.fields(config_class)}
    for name in overrides:
        if name not in known:
            raise ValueError(unknown_name(f"{spec} config field", name, sorted(known)))
    fields: dict[str, Any] = {**SMALL_TEXT_TOWER, **overrides}
    fields.setdefault("intermediate_size", 4 * fields["hidden_size"])
    fields.setdefault("num_attention_heads", max(1, fields["hidden_size"] // 64))
    # Pipelines do not cut CLIP's prompts at a shorter length, and always pad SigLIP's to exactly 64.
    fields["max_position_embeddings"] = max(length, DEFAULT_LENGTH[spec])
    fields["vocab_size"] = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    fields |= {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if spec == SIGLIP_TEXT and projection_size is not None:
        fields.setdefault("projection_size", projection_size)
    model = getattr(transformers, f"{prefix}TextModel")(config_class(**fields))
    check_tokenizer(model, tokenizer)
    return model


def load_text_tower(path_or_id: str, *, revision: str | None = None, token: str | None = None) -> Any:
    """A pretrained text model: the text tower of a CLIP or SigLIP model, or any model of `AutoModel`.

    Raises:
        ValueError: a model that is no text model.
    """
    from transformers import AutoConfig, AutoModel, CLIPTextModel, SiglipTextModel

    hub: dict[str, Any] = {"revision": revision, "token": token}
    with reading(path_or_id):
        config = AutoConfig.from_pretrained(path_or_id, **hub)
    towers: dict[str, Any] = {"clip": CLIPTextModel, CLIP_TEXT: CLIPTextModel}
    towers |= {"siglip": SiglipTextModel, SIGLIP_TEXT: SiglipTextModel}
    with reading(path_or_id):
        model = towers.get(config.model_type, AutoModel).from_pretrained(path_or_id, use_safetensors=True, **hub)
    modalities = getattr(model, "input_modalities", ("text",))
    if "text" not in modalities or getattr(model.config, "hidden_size", None) is None:
        raise ValueError(
            f"{path_or_id!r} is a {config.model_type!r} model ({type(model).__name__}), not a text model; a text "
            "tower reads input_ids and has a hidden_size"
        )
    return model


def text_positions(model: Any) -> int | None:
    """How many tokens the tower has learnt positions for; `None` where the config does not say."""
    positions = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    # RoBERTa and its kin count positions from padding_idx + 1
    if positions and model.config.model_type in ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl"):
        positions -= model.config.pad_token_id + 1
    return positions


def prepare_tokenizer(tokenizer: Any, text_type: str, max_length: int, *, adapt_end: bool = True) -> Any:
    """A copy of the tokenizer set up for a text tower, in a way that survives saving and plain loading.

    Texts are padded and cut on the right and cut at `max_length`. For a CLIP or SigLIP tower every text ends
    with the end token, also when cut. CLIP's transformers class treats end id 2 as a legacy mark and pools at
    the highest id instead, so a tokenizer whose end id is 2 (or that has none) is given a new end token.

    Args:
        tokenizer: any transformers tokenizer; not changed.
        text_type: the text tower's `model_type`.
        max_length: longest text in tokens, the end token included.
        adapt_end: whether an end token may be added (a tower built here), or the tokenizer has to have it.

    Raises:
        ValueError: `max_length` too small, or the end token cannot be appended.
    """
    if max_length < 2:
        raise ValueError(f"max_length={max_length} leaves no room for a word and the end token; use at least 2")
    tokenizer = copy.deepcopy(tokenizer)
    settings: dict[str, Any] = {"padding_side": "right", "truncation_side": "right"}
    if text_type == SIGLIP_TEXT and adapt_end:
        # A tower built here masks its padding; the tokenizer then has to hand the mask to pipelines too.
        settings["model_input_names"] = ["input_ids", "attention_mask"]
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    if text_type in (CLIP_TEXT, SIGLIP_TEXT):
        _end_with_token(tokenizer, text_type, adapt_end)
    tokenizer.model_max_length = settings["model_max_length"] = max_length
    tokenizer.init_kwargs |= settings  # this is what save_pretrained writes
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither a padding nor an end token; set tokenizer.pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _end_with_token(tokenizer: Any, text_type: str, adapt: bool) -> None:
    def ids(text: str, **settings: Any) -> list[int]:
        return tokenizer(text, **settings)["input_ids"]

    probe = "a red circle on the left of a blue square"
    starts_with_bos = tokenizer.bos_token_id is not None and ids(probe)[:1] == [tokenizer.bos_token_id]
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token  # BERT's texts end with [SEP]
    if adapt and (tokenizer.eos_token_id is None or (text_type == CLIP_TEXT and tokenizer.eos_token_id == 2)):
        tokenizer.add_tokens([END_OF_TEXT], special_tokens=True)
        tokenizer.eos_token = END_OF_TEXT
    if ids(probe)[-1] != tokenizer.eos_token_id and hasattr(tokenizer, "update_post_processor"):
        tokenizer.add_bos_token = starts_with_bos
        tokenizer.add_eos_token = True
    whole, cut = ids(probe), ids(probe, truncation=True, max_length=3)
    if tokenizer.eos_token_id is None or whole[-1] != tokenizer.eos_token_id or cut[-1] != tokenizer.eos_token_id:
        raise ValueError(
            f"{type(tokenizer).__name__} does not end its texts with its end token ({tokenizer.eos_token!r}, id "
            f"{tokenizer.eos_token_id}): {probe!r} became {whole}; a CLIP or SigLIP tower needs it. Use a "
            "tokenizer with an end token in its post-processor (for example one with add_eos_token)"
        )


def check_tokenizer(model: Any, tokenizer: Any) -> None:
    """Raises `ValueError` where a tokenizer would feed the text tower ids it cannot read or pool at."""
    highest = max(len(tokenizer) - 1, tokenizer.pad_token_id or 0, tokenizer.eos_token_id or 0)
    if highest >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {highest} but the text tower's vocab_size is {model.config.vocab_size}; "
            "use the tokenizer that belongs to the tower, or build a new tower for this tokenizer"
        )
    if model.config.model_type != CLIP_TEXT:
        return
    expected = model.config.eos_token_id
    if expected == 2 and tokenizer.eos_token_id != len(tokenizer) - 1:
        raise ValueError(
            "the CLIP text tower has the legacy eos_token_id=2 and pools at the highest id, but the tokenizer's end "
            f"token has id {tokenizer.eos_token_id} of {len(tokenizer)}; use the tokenizer of that checkpoint"
        )
    if expected not in (2, tokenizer.eos_token_id):
        raise ValueError(
            f"the CLIP text tower pools at eos_token_id={expected} but the tokenizer ends texts with id "
            f"{tokenizer.eos_token_id}; use the tokenizer of that checkpoint"
        )


def default_pooling(model: Any) -> str:
    """How a text tower becomes one vector: its own pooler, else the last token (decoders) or the mean."""
    if model.config.model_type in (CLIP_TEXT, SIGLIP_TEXT) or getattr(model, "pooler", None) is not None:
        return "pooler"
    decoder_only = getattr(model.config, "is_decoder", False) or hasattr(model.config, "rope_parameters")
    return "last" if decoder_only or model.config.model_type in ("gpt2", "gpt_neo", "opt") else "mean"


def pool_text(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, *, pooling: str = "pooler"
) -> Tensor:
    """One vector per text.

    CLIP towers are run without the padding mask: attention is causal, padding is on the right and pooling is
    at the end token, so nothing that is pooled ever sees padding. It is left out altogether: the texts run packed
    end to end, and the last layer works for the end tokens alone (encoder/clip_layers.py).

    SigLIP towers pool the last of their fixed number of positions. Without a mask (the published checkpoints) that
    position attends to padding, and texts are padded here to the fixed length. With a mask (towers built here) it
    attends to the words alone, so one column with the last position stands for all the padding: the same vector at
    a fraction of the cost.

    Args:
        model: a text tower.
        input_ids: `[B, T]`, padded on the right.
        attention_mask: `[B, T]`, 1 for tokens; unused by CLIP towers.
        pooling: "pooler" (the model's own), "mean" of the unmasked tokens, or the "last" of them.

    Returns:
        `[B, D]`.
    """
    kind = model.config.model_type
    if kind == CLIP_TEXT:
        if _runs_packed(model):
            return packed_text(model, input_ids, _ends(model, input_ids))
        return model(input_ids=input_ids).pooler_output
    if kind == SIGLIP_TEXT:
        length, positions = input_ids.shape[1], model.config.max_position_embeddings
        pad = model.config.pad_token_id
        if attention_mask is None or length >= positions:
            input_ids = F.pad(input_ids, (0, max(0, positions - length)), value=pad)
            return model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        index = torch.arange(length + 1, device=input_ids.device)
        index[-1] = positions - 1
        return model(
            input_ids=F.pad(input_ids, (0, 1), value=pad),
            attention_mask=F.pad(attention_mask, (0, 1), value=0),
            position_ids=index[None],
        ).pooler_output
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    output = model(input_ids=input_ids, attention_mask=attention_mask)
    if pooling == "pooler":
        return output.pooler_output
    states = output.last_hidden_state
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), attention_mask.sum(1) - 1]
    weights = attention_mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp_min(1)


def _runs_packed(model: Any) -> bool:
    """Whether a CLIP tower may be run part by part (not while its shapes are being compiled)."""
    hooked = model._forward_hooks or model._forward_pre_hooks
    return not (hooked or torch.compiler.is_compiling()) and all(is_plain(layer) for layer in model.encoder.layers)


def _ends(model: Any, input_ids: Tensor) -> Tensor:
    """Where a CLIP tower pools each text, `[B]`: its first end token; the highest id where the config is legacy."""
    legacy = model.config.eos_token_id == 2
    return (input_ids if legacy else (input_ids == model.config.eos_token_id).int()).argmax(dim=-1)
