"""CLIP's transformer layers without unused work: same parameters, same results, fewer operations.

A contrastive step needs neither the last layer's output for unpooled tokens nor any layer's output for padding. Both
are skipped here by running the parts of a `CLIPEncoderLayer`. Wrapped layers (sharding, hooks, activation
checkpointing) are run whole, see `is_plain`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


def is_plain(layer: Any) -> bool:
    """Whether the layer's parts may be run one by one: a `CLIPEncoderLayer` with SDPA attention and without wrappers.

    Sharding, activation checkpointing and hooks need a call of the layer's `forward`.
    """
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    if type(layer) is not CLIPEncoderLayer:  # FSDP2 changes the class
        return False
    attention: Any = layer.self_attn
    return (
        attention.config._attn_implementation == "sdpa"
        and not (layer.training and (attention.dropout > 0 or getattr(layer, "gradient_checkpointing", False)))
        and not any(m._forward_hooks or m._forward_pre_hooks for m in (layer, attention, layer.mlp))
    )


def pooled_layer(layer: Any, hidden: Tensor) -> Tensor:
    """The layer's output for token 0: `[B, D]` of hidden states `[B, N, D]`, with a sixth of the products."""
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    keys, values = _heads(attention, attention.k_proj(normed)), _heads(attention, attention.v_proj(normed))
    return _one_token(layer, hidden[:, 0], normed[:, 0], keys, values, None)


class Packing:
    """Right-padded texts concatenated without padding, and back.

    The number of tokens is read back from the device once per batch.

    Args:
        lengths: `[B]`, tokens of each text that are not padding; at least one.
        width: columns of the padded texts.

    Attributes:
        place: `[M]`, position of each of the M tokens among the `B * width`.
        last: `[B]`, position of each text's last token among the M.
        mask: `[B, 1, 1, width]`, True for tokens.
    """

    def __init__(self, lengths: Tensor, width: int) -> None:
        self.rows, self.width = len(lengths), width
        mask = torch.arange(self.width, device=lengths.device) < lengths[:, None]
        self.place = mask.flatten().nonzero().flatten()
        self.last = lengths.cumsum(0) - 1
        self.mask = mask[:, None, None]

    def pack(self, padded: Tensor) -> Tensor:
        """`[B, width, ...]` to `[M, ...]`."""
        return padded.flatten(0, 1).index_select(0, self.place)

    def pad(self, packed: Tensor) -> Tensor:
        """`[M, D]` to `[B, width, D]`, with zeros as padding."""
        empty = packed.new_zeros(self.rows * self.width, packed.shape[-1])
        return empty.index_copy(0, self.place, packed).view(self.rows, self.width, -1)


def packed_layer(layer: Any, hidden: Tensor, packing: Packing) -> Tensor:
    """The layer over packed tokens `[M, D]`, with causal attention within each text."""
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    queries, keys, values = (_heads(attention, packing.pad(projection(normed))) for projection in projections)
    mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=attention.scale)
    hidden = hidden + attention.out_proj(packing.pack(mixed.transpose(1, 2).flatten(2)))
    return hidden + layer.mlp(layer.layer_norm2(hidden))


def packed_pooled_layer(layer: Any, hidden: Tensor, packing: Packing) -> Tensor:
    """The layer's output for the last token of each text: `[B, D]` of packed tokens `[M, D]`."""
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    keys, values = (
        _heads(attention, packing.pad(projection(normed))) for projection in (attention.k_proj, attention.v_proj)
    )
    return _one_token(layer, hidden[packing.last], normed[packing.last], keys, values, packing.mask)


_PACKINGS = WeakTensorKeyDictionary()  # input_ids of live batches -> (key, packing)


def packed_text(model: Any, input_ids: Tensor, ends: Tensor) -> Tensor:
    """`pooler_output` `[B, D]` of a plain `CLIPTextModel`: texts `[B, T]` whose end tokens stand at `ends` `[B]`."""
    # a momentum tower receives the same tensor as the tower; its version shows that it was not modified since
    key = model.config.eos_token_id, 0 if input_ids.is_inference() else input_ids._version
    made_for, packing = _PACKINGS.get(input_ids, (None, None))
    if packing is None or made_for != key:
        packing = Packing(ends + 1, input_ids.shape[1])
        _PACKINGS[input_ids] = key, packing
    hidden = packing.pack(model.embeddings(input_ids=input_ids))
    *layers, last = model.encoder.layers
    for layer in layers:
        hidden = packed_layer(layer, hidden, packing)
    return model.final_layer_norm(packed_pooled_layer(last, hidden, packing))


def _heads(attention: Any, states: Tensor) -> Tensor:
    """`[B, T, H * d]` to `[B, H, T, d]`."""
    return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def _one_token(
    layer: Any, residual: Tensor, normed: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
) -> Tensor:
    """The rest of a layer for one token per row: `[B, D]` each, keys and values `[B, H, T, d]`."""
    attention = layer.self_attn
    queries = _heads(attention, attention.q_proj(normed)[:, None])
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=attention.scale)
    hidden = residual + attention.out_proj(mixed.flatten(1))
    return hidden + layer.mlp(layer.layer_norm2(hidden))
