"""Prismatic: the tokens of several towers joined channel by channel, and a wide MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from mllm_vision.vlm.connectors.base import (
    ConnectorForConditionalGeneration,
    ConnectorModel,
    TowersConfig,
    register,
)


class FusedMLP(nn.Module):
    """Three linear layers with GELU over the joined channels; the first is four times as wide as its input.

    Reference:
        Karamcheti et al., 2024, "Prismatic VLMs: Investigating the Design Space of Visually-Conditioned Language
        Models", section 4.2 (https://arxiv.org/abs/2402.07865).

    Args:
        in_dims: width of each tower's tokens.
        dim: width of the language model.
    """

    def __init__(self, in_dims: Sequence[int], dim: int) -> None:
        super().__init__()
        joined = sum(in_dims)
        self.linear_1 = nn.Linear(joined, 4 * joined)
        self.linear_2 = nn.Linear(4 * joined, dim)
        self.linear_3 = nn.Linear(dim, dim)
        self.act = nn.GELU()

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """`[n, N, dim]` from the tokens `[n, N, C]` of each tower.

        Raises:
            ValueError: towers with different numbers of tokens.
        """
        if len({each.shape[1] for each in features}) != 1:
            raise ValueError(
                f"the towers give {[each.shape[1] for each in features]} tokens an image; channels are joined token by "
                "token, so choose image sizes with one grid"
            )
        joined = torch.cat(list(features), dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_3(self.act(self.linear_2(self.act(self.linear_1(joined)))))


@strict
class PrismaticConfig(TowersConfig):
    """Config of `PrismaticForConditionalGeneration`: `vision_config` and `more_vision_configs`, layer -2 of each."""

    model_type = "mllm_vision_prismatic"


class PrismaticModel(ConnectorModel):
    """Several vision towers of one token grid, the fused MLP and a language model."""

    config_class = PrismaticConfig

    def build_connector(self, config: Any) -> nn.Module:
        return FusedMLP(config.tower_widths, config.text_config.hidden_size)


class PrismaticForConditionalGeneration(ConnectorForConditionalGeneration):
    """Prismatic (arXiv:2402.07865): SigLIP and DINOv2, or any towers of one grid; the fused MLP; any language model."""

    config_class = PrismaticConfig
    model_class = PrismaticModel


register(PrismaticConfig, PrismaticModel, PrismaticForConditionalGeneration)
