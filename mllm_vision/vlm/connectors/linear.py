"""A linear connector in the parameter names of transformers' ``LlavaMultiModalProjector``."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Identity(nn.Module):
    """An identity that is written to a checkpoint as a linear layer: eye as weight, zero as bias.

    The two tensors are buffers: nothing trains them, and ``forward`` does not spend a multiplication on them.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", torch.eye(dim))
        self.register_buffer("bias", torch.zeros(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens


class LinearConnector(nn.Module):
    """One linear layer (LLaVA, arXiv:2304.08485, equation 1).

    transformers' LLaVA has no linear connector, but its two layers with ``projector_hidden_act="linear"`` and an
    identity as the second one are exactly that: the identity is stored, so plain ``LlavaForConditionalGeneration``
    loads the checkpoint with equal outputs.

    Shapes: ``[..., in_dim]`` -> ``[..., out_dim]``.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.linear_2 = Identity(out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear_2(self.linear_1(tokens))
