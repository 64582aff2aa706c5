"""Text towers: small ones built here, and any text model of transformers by path.

A text tower built here is a small `CLIPTextModel` or `SiglipTextModel`, so that the trained pair is a native
`CLIPModel` or `SiglipModel`. Tokenizers are in `tokenizers`, pooling in `pooling`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mllm_vision.encoder.text.tokenizers import CLIP_TEXT, SIGLIP_TEXT, check_tokenizer, prepare_tokenizer
from mllm_vision.errors import reading, unknown_name

# Trains in minutes on two CPU cores; every field can be overridden by name.
SMALL_TEXT_TOWER = {"hidden_size": 256, "num_hidden_layers": 4, "hidden_act": "gelu"}
DEFAULT_LENGTH = {CLIP_TEXT: 77, SIGLIP_TEXT: 64}


def text_sizes(vision: Any) -> dict[str, Any]:
    """Config fields of a text tower in proportion to an image tower.

    For SigLIP image towers: the same width, layers, heads and MLP (arXiv:2303.15343). For other transformers CLIP's
    proportion: two thirds of the width in steps of 128, heads of 64, at most 12 layers (512 for 768, 768 for 1024;
    arXiv:2103.00020, table 20); the same shape up to a width of 128. For ResNets with 1024 channels or more: width 512,
    12 layers; for smaller ones `SMALL_TEXT_TOWER`.

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
    """A text tower and a copy of the tokenizer prepared for it.

    Args:
        spec: `"clip_text_model"` or `"siglip_text_model"` for a small tower with random weights, or the path or Hub id
            of any transformers text model (of a CLIP or SigLIP model: its text tower).
        tokenizer: any transformers tokenizer; not changed.
        overrides: config fields of a tower built here, for example `{"hidden_size": 512}`; see `text_sizes`.
        max_length: longest text in tokens, the end token included. Default 77 (CLIP), 64 (SigLIP), or the positions
            of a pretrained tower.
        projection_size: width of a SigLIP tower's head: the width of the image tower.
        revision: Hub revision of a pretrained tower.
        token: Hub token of a pretrained tower.

    Returns:
        The model and the tokenizer.

    Raises:
        ValueError: a tokenizer without end token, a vocabulary larger than the tower's, a length beyond the tower's
            positions, or an unknown config field.
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
    # Pipelines do not truncate CLIP's prompts to a shorter length, and always pad SigLIP's to exactly 64.
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
        ValueError: not a text model.
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
    """Number of positions of the tower; `None` if the config does not define it."""
    positions = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    # RoBERTa and its variants count positions from padding_idx + 1
    if positions and model.config.model_type in ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl"):
        positions -= model.config.pad_token_id + 1
    return positions
