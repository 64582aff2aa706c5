"""Qwen-VL: one layer of cross-attention from learned queries to the tokens of the tower.

The `<img>` and `</img>` around an image are words of the prompt and need no code here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from mllm_vision.vlm.connectors.base import (
    ConnectorForConditionalGeneration,
    ConnectorModel,
    TowersConfig,
    grid_side,
    register,
)


def sincos_positions(side: int, dim: int, device: Any = None) -> Tensor:
    """Two-dimensional sine-cosine positions of a square grid: `[side * side, dim]`, row by row.

    The first half of the channels encodes the column, the second half the row; each half has `dim / 4` sines and as
    many cosines of frequencies `10000^(-4 i / dim)`.

    Raises:
        ValueError: `dim` is not divisible by 4.

    Reference:
        He et al., 2021, "Masked Autoencoders Are Scalable Vision Learners" (https://arxiv.org/abs/2111.06377), code.
    """
    if dim % 4:
        raise ValueError(f"dim={dim} is not divisible by 4: half for each axis, half of it sines")
    places = torch.arange(side, dtype=torch.float32, device=device)
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float32, device=device) / (dim // 4))
    angles = places[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [side, dim / 2]
    columns, rows = axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Positions `[S * S, D]` of another square grid `[side * side, D]`, by bicubic interpolation."""
    old = grid_side(len(positions))
    if old == side:
        return positions
    grid = positions.T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return grid[0].flatten(1).T


class Resampler(nn.Module):
    """A fixed number of tokens from any square grid: learned queries attend to the image's tokens.

    `out = LN(attention(LN(queries) + positions, kv + positions, kv)) @ proj` with `kv = LN(project(tokens))`. The
    positions are those of the queries' grid, interpolated to the tokens' grid for the keys.

    Reference:
        Bai et al., 2023, "Qwen-VL: A Versatile Vision-Language Model", section 2.1
        (https://arxiv.org/abs/2308.12966).

    Args:
        in_dim: width of the tower's tokens.
        dim: width of the language model.
        num_queries: a square number.
        num_heads: heads of the attention.

    Raises:
        ValueError: a number of queries that is not a square, or heads that do not divide `dim`.
    """

    def __init__(self, in_dim: int, dim: int, num_queries: int = 256, num_heads: int = 32) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"connector_heads={num_heads} does not divide the language model's width of {dim}")
        self.side, self.num_heads = grid_side(num_queries), num_heads
        self.initial_std = {"query": 0.02, "proj": dim**-0.5}
        self.query = nn.Parameter(torch.randn(num_queries, dim) * 0.02)
        self.kv_proj: nn.Module = nn.Linear(in_dim, dim, bias=False) if in_dim != dim else nn.Identity()
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.proj = nn.Parameter(torch.randn(dim, dim) * dim**-0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """`[n, num_queries, dim]` from the tokens `[n, N, in_dim]` of one tower (a list of one)."""
        (tokens,) = features
        values = self.ln_kv(self.kv_proj(tokens.to(self.proj.dtype)))
        own = sincos_positions(self.side, values.shape[-1], values.device)
        others = resize_positions(own, grid_side(values.shape[1]))
        queries = self.ln_q(self.query) + own.to(values.dtype)
        query, key, value = (
            project(states).unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
            for project, states in (
                (self.q_proj, queries[None].expand(len(values), -1, -1)),
                (self.k_proj, values + others.to(values.dtype)),
                (self.v_proj, values),
            )
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(-3, -2).flatten(-2)
        return self.ln_post(self.out_proj(attended)) @ self.proj


@strict
class QwenVLConfig(TowersConfig):
    """Config of `QwenVLForConditionalGeneration`.

    Args:
        num_queries: tokens an image, a square number.
        connector_heads: heads of the resampler; None is one per 128 channels (Qwen-VL's 32 of 4096).
    """

    model_type = "mllm_vision_qwen_vl"
    num_queries: int = 256
    connector_heads: int | None = None


class QwenVLModel(ConnectorModel):
    """A vision tower, the resampler and a language model."""

    config_class = QwenVLConfig

    def build_connector(self, config: Any) -> nn.Module:
        width = config.text_config.hidden_size
        heads = config.connector_heads or max(1, width // 128)
        return Resampler(config.tower_widths[0], width, config.num_queries, heads)


class QwenVLForConditionalGeneration(ConnectorForConditionalGeneration):
    """Qwen-VL (arXiv:2308.12966): any tower, the resampler, any language model."""

    config_class = QwenVLConfig
    model_class = QwenVLModel


register(QwenVLConfig, QwenVLModel, QwenVLForConditionalGeneration)
