"""Pooling of text towers to one vector per text."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_vision.encoder.clip_layers import is_plain, packed_text
from mllm_vision.encoder.text.tokenizers import CLIP_TEXT, SIGLIP_TEXT

POOLINGS = ("pooler", "mean", "last")


def default_pooling(model: Any) -> str:
    """The pooling of a text tower: its own pooler, else the last token (decoders) or the mean."""
    if model.config.model_type in (CLIP_TEXT, SIGLIP_TEXT) or getattr(model, "pooler", None) is not None:
        return "pooler"
    decoder_only = getattr(model.config, "is_decoder", False) or hasattr(model.config, "rope_parameters")
    return "last" if decoder_only or model.config.model_type in ("gpt2", "gpt_neo", "opt") else "mean"


def pool_text(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, *, pooling: str = "pooler"
) -> Tensor:
    """One vector per text.

    CLIP towers run on packed texts without padding, and their last layer computes the end tokens only
    (encoder/clip_layers.py): with causal attention, right padding and pooling at the end token, padding is never used.

    SigLIP towers pool the last of their fixed number of positions. Without a mask (published checkpoints) that
    position attends to padding, so texts are padded to the fixed length. With a mask (towers built here) it attends to
    tokens only, so a single padding column at the last position gives the same vector at a fraction of the cost.

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
    """Whether a CLIP tower may run packed (not under compilation)."""
    hooked = model._forward_hooks or model._forward_pre_hooks
    return not (hooked or torch.compiler.is_compiling()) and all(is_plain(layer) for layer in model.encoder.layers)


def _ends(model: Any, input_ids: Tensor) -> Tensor:
    """`[B]` pooled position of each text in a CLIP tower: the first end token; the highest id for legacy configs."""
    legacy = model.config.eos_token_id == 2
    return (input_ids if legacy else (input_ids == model.config.eos_token_id).int()).argmax(dim=-1)
