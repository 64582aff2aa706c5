"""MAE from the official code (facebookresearch/mae: models_mae.py, engine_pretrain.py).

The noise of the masks is input; as documented, positions have the rows first, which permutes their channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mllm_vision.functional.random import uniform

from . import named, set_rate, warm_cosine


class Block(nn.Module):
    """A pre-norm block, with the names of torch's own layer."""

    def __init__(self, width, heads):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads)  # for its weights alone
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.heads = heads

    def forward(self, x):
        attention, rows = self.self_attn, self.norm1(x)
        q, k, v = F.linear(rows, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))


def decoder(width, inner, layers, heads, pixels):
    parts = {
        "embed": nn.Linear(width, inner), "blocks": nn.ModuleList(Block(inner, heads) for _ in range(layers)),
        "norm": nn.LayerNorm(inner, eps=1e-6), "predict": nn.Linear(inner, pixels),
    }  # fmt: skip
    made = nn.ModuleDict(parts)
    made.register_parameter("mask_token", nn.Parameter(torch.zeros(1, 1, inner)))
    return made


def sines(side, width):
    """`get_2d_sincos_pos_embed`, of the rows first, then of the columns; zeros for the class token."""
    angles = torch.arange(side, dtype=torch.float64)[:, None] / 10000 ** (
        torch.arange(width // 4, dtype=torch.float64) / (width // 4)
    )
    one = torch.cat([angles.sin(), angles.cos()], 1)
    grid = torch.cat([one.repeat_interleave(side, 0), one.repeat(side, 1)], 1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), grid])


def train(start, batches, given):
    encoder = start.load(start.backbone, "encoder.backbone.")
    size, side = given["patch_size"], given["image_size"] // given["patch_size"]
    inner, heads = given["decoder_width"], given["decoder_heads"]
    small = start.load(decoder(given["width"], inner, given["decoder_layers"], heads, 3 * size**2), "decoder.")
    positions, places = encoder.embeddings.position_embeddings, sines(side, inner).float().double()
    assert torch.allclose(positions[0], sines(side, given["width"]).float().double())
    kept = int(side * side * (1 - given["mask_ratio"]))
    trained = [(n, p) for part in (encoder, small) for n, p in part.named_parameters() if p.requires_grad]
    plain = [p for n, p in trained if p.ndim == 1 or n.endswith("bias")]
    optimizer = torch.optim.AdamW(
        [{"params": [p for n, p in trained if p.ndim > 1]}, {"params": plain, "weight_decay": 0.0}],
        given["rate"], betas=(0.9, 0.95), weight_decay=given["weight_decay"],
    )  # fmt: skip
    losses = []
    for step, batch in enumerate(batches):
        set_rate(optimizer, warm_cosine(step, len(batches), given["warmup"], given["rate"]))
        images = batch["views"][:, 0]
        order = uniform(batch["seeds"], 1400, side * side).argsort(dim=1, stable=True)
        restore, rows = order.argsort(dim=1), torch.arange(len(images))[:, None]
        x = encoder.embeddings.patch_embeddings(images) + positions[:, 1:]
        token = (encoder.embeddings.cls_token + positions[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([token, x[rows, order[:, :kept]]], 1)
        for layer in encoder.layers:
            x = layer(x)
        x = small["embed"](encoder.layernorm(x))
        filled = torch.cat([x[:, 1:], small.mask_token.expand(len(x), side * side - kept, -1)], 1)
        x = torch.cat([x[:, :1], filled[rows, restore]], 1) + places
        for block in small["blocks"]:
            x = block(x)
        said = small["predict"](small["norm"](x))[:, 1:]
        cut = images.unflatten(2, (side, size)).unflatten(4, (side, size))
        target = cut.permute(0, 2, 4, 3, 5, 1).reshape(said.shape)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        hidden = torch.ones_like(said[..., 0]).scatter(1, order[:, :kept], 0.0)
        loss = ((said - target).square().mean(-1) * hidden).sum() / hidden.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, named(encoder__backbone=encoder, decoder=small)
