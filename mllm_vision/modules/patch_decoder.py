"""A small transformer that predicts every patch of an image from the visible ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchDecoder(nn.Module):
    """Visible tokens in, the pixels of all patches out (the decoder of MAE).

    Tokens are projected to the decoder's width, a learnt mask token stands in for what was hidden, fixed positions
    are added, and pre-norm transformer blocks and a linear layer predict. Prefix tokens (class, registers) take part
    in attention and are left out of the result. Weights start as in the official code: Xavier, mask token 0.02.

    Args:
        in_features: width D of the encoder's tokens.
        positions: `[prefix + N, width]`, fixed; rows of prefix tokens first. Its width is the decoder's.
        out_features: P, numbers to predict of a patch.
        prefix: tokens before the patches.
        layers: blocks.
        heads: attention heads; their number divides the width.

    Raises:
        ValueError: heads that do not divide the width, or fewer than one block.

    Reference:
        He et al., 2022, "Masked Autoencoders Are Scalable Vision Learners", section 3
        (https://arxiv.org/abs/2111.06377).
    """

    positions: Tensor

    def __init__(
        self, in_features: int, positions: Tensor, out_features: int, *, prefix: int, layers: int, heads: int
    ) -> None:
        super().__init__()
        width = positions.shape[1]
        if heads < 1 or width % heads:
            raise ValueError(f"decoder_width={width} is not divisible by decoder_heads={heads}")
        if layers < 1:
            raise ValueError(f"decoder_layers={layers} must be at least 1")
        self.prefix = prefix
        self.embed = nn.Linear(in_features, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", positions.clone(), persistent=False)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True,
                norm_first=True,
            )
            for _ in range(layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.predict = nn.Linear(width, out_features)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # the three projections of attention count as one matrix, as there
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Predictions for every patch.

        Args:
            tokens: `[B, prefix + K, D]` of the encoder.
            visible: int64 `[B, K]`: which patch each token behind the prefix is.

        Returns:
            `[B, N, P]`.
        """
        tokens = self.embed(tokens)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        patches = self.mask_token.to(tokens.dtype).repeat(len(tokens), len(self.positions) - self.prefix, 1)
        patches = patches.index_put((rows, visible), tokens[:, self.prefix :])
        hidden = torch.cat([tokens[:, : self.prefix], patches], dim=1) + self.positions.to(tokens.dtype)
        for block in self.blocks:
            hidden = block(hidden)
        return self.predict(self.norm(hidden[:, self.prefix :]))
