"""Projectors: from the vision tower's width to the language model's.

Both projectors here keep the parameter names of transformers' ``LlavaMultiModalProjector`` (``linear_1``,
``act``, ``linear_2``), so a checkpoint that holds either of them is a plain LLaVA checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mllm_vision.errors import unknown_name


class MLPProjector(nn.Module):
    """Two linear layers with a GELU between them (LLaVA-1.5, arXiv:2310.03744, section 3.3).

    Args:
        in_dim: width of the vision tokens.
        out_dim: width of the language model; also the hidden width.

    Shapes: ``[..., in_dim]`` -> ``[..., out_dim]``.
    """

    hidden_act = "gelu"  # the value of Llava's `projector_hidden_act`

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(tokens)))


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


class LinearProjector(nn.Module):
    """One linear layer (LLaVA, arXiv:2304.08485, equation 1).

    transformers' LLaVA has no linear projector, but its two layers with ``projector_hidden_act="linear"`` and
    an identity as the second one are exactly that: the identity is stored, so plain
    ``LlavaForConditionalGeneration`` loads the checkpoint with equal outputs.

    Shapes: ``[..., in_dim]`` -> ``[..., out_dim]``.
    """

    hidden_act = "linear"

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.linear_2 = Identity(out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear_2(self.linear_1(tokens))


Projector = MLPProjector | LinearProjector
PROJECTORS: dict[str, type[MLPProjector] | type[LinearProjector]] = {"linear": LinearProjector, "mlp": MLPProjector}


def list_projectors() -> list[str]:
    """The names that ``build_projector`` knows, in alphabetical order."""
    return sorted(PROJECTORS)


def build_projector(kind: str, in_dim: int, out_dim: int) -> Projector:
    """A freshly initialised projector.

    Args:
        kind: one of ``list_projectors()``.
        in_dim: width of the vision tokens, > 0.
        out_dim: width of the language model, > 0.

    Raises:
        ValueError: an unknown kind (the nearest known one is named) or a width that is not positive.
    """
    if kind not in PROJECTORS:
        raise ValueError(unknown_name("projector", kind, PROJECTORS))
    if in_dim <= 0 or out_dim <= 0:
        raise ValueError(f"a projector needs positive widths, got in_dim={in_dim} and out_dim={out_dim}")
    return PROJECTORS[kind](in_dim, out_dim)
