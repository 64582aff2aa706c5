"""Cambrian-1: the spatial vision aggregator over several towers, before and inside the language model.

Queries lie on a square grid. Each attends to its own window in the feature map of every tower, so that towers of
different resolution are joined place by place. The same aggregation may follow chosen layers of the language model,
where the hidden states of the image tokens are the queries.

Every image has the same number of tokens: Cambrian's removal of padding and its newline tokens are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm_vision.vlm.connectors.base import (
    ConnectorForConditionalGeneration,
    ConnectorModel,
    TowersConfig,
    grid_side,
    register,
)


def resize_map(tokens: Tensor, side: int) -> Tensor:
    """Tokens `[n, S * S, C]` of another square grid `[n, side * side, C]`, by bilinear interpolation."""
    old = grid_side(tokens.shape[1])
    if old == side:
        return tokens
    grid = tokens.transpose(1, 2).unflatten(2, (old, old))
    grid = F.interpolate(grid.float(), size=(side, side), mode="bilinear", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(tokens.dtype)


def windows(tokens: Tensor, side: int) -> Tensor:
    """The window of each place of a grid: `[n, S * S, C]` to `[n * side * side, m * m, C]` with `m = S / side`."""
    factor = grid_side(tokens.shape[1]) // side
    grid = tokens.reshape(len(tokens), side, factor, side, factor, -1)
    return grid.transpose(2, 3).reshape(len(tokens) * side * side, factor * factor, -1)


class AggregatorLayer(nn.Module):
    """One query a window attends to the windows of all towers together.

    `q = in([query, context])`, `q = LN(q + attention(q, windows))`, `query + MLP(q)`. Keys and values have projections
    of their own for each tower, with learned positions inside a window.

    Reference:
        Tong et al., 2024, "Cambrian-1: A Fully Open, Vision-Centric Exploration of Multimodal LLMs", section 4
        (https://arxiv.org/abs/2406.16860).

    Args:
        query_dim: width of the queries.
        dim: width of the maps and of the attention.
        factors: for each tower, the side of its windows.
        num_heads: heads of the attention.
    """

    def __init__(self, query_dim: int, dim: int, factors: Sequence[int], num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.proj_context = nn.Linear(dim, dim, bias=False)
        self.proj_in = nn.Linear(query_dim + dim, dim, bias=False)
        self.norm_q, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q_proj, self.o_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.norm_k, self.norm_v = (nn.ModuleList([nn.LayerNorm(dim) for _ in factors]) for _ in range(2))
        self.k_proj, self.v_proj = (nn.ModuleList([nn.Linear(dim, dim, bias=False) for _ in factors]) for _ in range(2))
        # a window of one place needs no position
        sizes = {str(tower): factor**2 for tower, factor in enumerate(factors) if factor > 1}
        self.positions = nn.ParameterDict(
            {tower: nn.Parameter(torch.randn(size, dim)) for tower, size in sizes.items()}
        )
        self.mlp = nn.Sequential(nn.Linear(dim, dim, bias=False), nn.GELU(), nn.Linear(dim, query_dim, bias=False))

    def forward(self, queries: Tensor, context: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """`[W, query_dim]` from queries `[W, query_dim]`, context `[W, dim]`, each tower's windows `[W, m^2, dim]`."""
        inner = self.proj_in(torch.cat([queries, self.proj_context(context)], dim=-1))
        keys, values = [], []
        for tower, part in enumerate(parts):
            if str(tower) in self.positions:
                part = part + self.positions[str(tower)]
            keys.append(self.k_proj[tower](self.norm_k[tower](part)))
            values.append(self.v_proj[tower](self.norm_v[tower](part)))
        query, key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states in (self.q_proj(self.norm_q(inner))[:, None], torch.cat(keys, 1), torch.cat(values, 1))
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(1)
        return queries + self.mlp(self.norm(inner + self.o_proj(attended)))


class SpatialAggregator(nn.Module):
    """The aggregator before the language model, and its counterparts for layers inside it.

    Args:
        in_dims: width of each tower's tokens.
        sides: side of each tower's map after resizing, a multiple of `side`.
        side: side of the grid of queries.
        dim: width of the aggregator (1024).
        text_dim: width of the language model.
        depth: cross-attention layers before the language model (3).
        inner: layers inside the language model that are followed by an aggregation.
        num_heads: heads of every attention (16).
    """

    def __init__(
        self,
        in_dims: Sequence[int],
        sides: Sequence[int],
        *,
        side: int,
        dim: int,
        text_dim: int,
        depth: int,
        inner: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        factors = [each // side for each in sides]
        self.side, self.sides = side, list(sides)
        self.initial_std = {"query": text_dim**-0.5}
        self.query = nn.Parameter(torch.randn(dim) * text_dim**-0.5)
        self.tower_projections = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, dim), nn.LayerNorm(dim))
                for width in in_dims
            ]
        )
        self.layers = nn.ModuleList([AggregatorLayer(dim, dim, factors, num_heads) for _ in range(depth)])
        self.projection = nn.Sequential(nn.Linear(dim, text_dim), nn.GELU(), nn.Linear(text_dim, text_dim))
        self.inner_layers = nn.ModuleList([AggregatorLayer(text_dim, dim, factors, num_heads) for _ in range(inner)])

    def maps(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The tower's tokens `[n, N, C]` as maps `[n, S * S, dim]` of the aggregator's sides and width."""
        dtype = self.query.dtype
        return [
            project(resize_map(tokens, side).to(dtype))
            for project, tokens, side in zip(self.tower_projections, features, self.sides, strict=True)
        ]

    def surroundings(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """`context [n * side^2, dim]`, the mean of the first tower's map, and the windows of every tower."""
        context = maps[0].mean(dim=1).repeat_interleave(self.side**2, dim=0)
        return context, [windows(each, self.side) for each in maps]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Tokens `[n, side * side, text_dim]` from the maps."""
        context, parts = self.surroundings(maps)
        queries = self.query.expand(len(context), -1)
        for layer in self.layers:
            queries = layer(queries, context, parts)
        return self.projection(queries).unflatten(0, (len(maps[0]), -1))


@dataclass
class _Seen:
    """What the inner layers need in one forward pass."""

    mask: Tensor  # [B, T], True at image tokens
    context: Tensor
    parts: list[Tensor]
    used: int = 0


class _Inner:
    """A forward hook of a decoder layer: its output at the image tokens is the query of one more aggregation.

    The images travel as a keyword argument through the language model to its layers, so nothing is kept between two
    forward passes, and a copy of the model has hooks of its own.
    """

    def __init__(self, aggregator: AggregatorLayer) -> None:
        self.aggregator = aggregator

    def __call__(self, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        seen: _Seen | None = kwargs.get("seen_images")
        if seen is None:
            return output
        seen.used += 1
        hidden = output[0] if isinstance(output, tuple) else output
        weight = self.aggregator.proj_in.weight
        queries = hidden[seen.mask].to(device=weight.device, dtype=weight.dtype)
        queries = self.aggregator(queries, seen.context, seen.parts)
        hidden = hidden.masked_scatter(seen.mask[..., None], queries.to(device=hidden.device, dtype=hidden.dtype))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@strict
class CambrianConfig(TowersConfig):
    """Config of `CambrianForConditionalGeneration`.

    Args:
        query_side: side of the grid of queries (24: 576 tokens an image).
        vision_tokens: tokens of each tower's own map, for caches of them.
        vision_sides: side to which each tower's map is resized, a multiple of `query_side`; required (published: 24
            for SigLIP, CLIP and DINOv2, 96 for ConvNeXt-XXL at 1024 pixels).
        connector_hidden_size: width of the aggregator.
        connector_depth: cross-attention layers before the language model.
        connector_heads: heads of every cross-attention.
        inner_layers: aggregations inside the language model; 0 for none (published: 10).
        inner_start: the decoder layer followed by the first of them.
        inner_stride: decoder layers from one to the next.
    """

    model_type = "mllm_vision_cambrian"
    query_side: int = 24
    vision_tokens: list[int] | None = None
    vision_sides: list[int] | None = None
    connector_hidden_size: int = 1024
    connector_depth: int = 3
    connector_heads: int = 16
    inner_layers: int = 0
    inner_start: int = 0
    inner_stride: int = 3

    @property
    def inner_places(self) -> list[int]:
        """The decoder layers that are followed by an aggregation."""
        return [self.inner_start + self.inner_stride * index for index in range(self.inner_layers)]


class CambrianModel(ConnectorModel):
    """Several vision towers, the spatial vision aggregator and a language model."""

    config_class = CambrianConfig

    def __init__(self, config: CambrianConfig) -> None:
        super().__init__(config)
        self.place_inner_layers()

    def place_inner_layers(self) -> None:
        """Lets the inner layers follow their decoder layers; again where the language model was replaced.

        Raises:
            ValueError: a language model without such layers.
        """
        config = self.config
        places = config.inner_places
        if not places:
            return
        layers: Any = getattr(self.language_model, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise ValueError(
                f"inner_layers={config.inner_layers}: {type(self.language_model).__name__} has no list of decoder "
                "layers called `layers`; use inner_layers=0, or a language model such as Llama or Qwen"
            )
        if not 0 <= places[0] <= places[-1] < len(layers):
            raise ValueError(
                f"aggregations after the decoder layers {places} do not fit a language model of {len(layers)} layers; "
                f"lower inner_layers={config.inner_layers}, inner_start={config.inner_start} or "
                f"inner_stride={config.inner_stride}"
            )
        for place, aggregator in zip(places, self.multi_modal_projector.inner_layers, strict=True):
            layers[place].register_forward_hook(_Inner(aggregator), with_kwargs=True)

    def build_connector(self, config: Any) -> nn.Module:
        if config.connector_hidden_size % config.connector_heads:
            raise ValueError(
                f"connector_hidden_size={config.connector_hidden_size} is not divisible by "
                f"connector_heads={config.connector_heads}"
            )
        sides = config.vision_sides
        if sides is None:
            raise ValueError("vision_sides=None: give the side of each tower's map, a multiple of query_side")
        if len(sides) != len(config.vision_configs) or any(side % config.query_side or side < 1 for side in sides):
            raise ValueError(
                f"vision_sides={sides} must have one side for each of {len(config.vision_configs)} towers, all "
                f"multiples of query_side={config.query_side}"
            )
        return SpatialAggregator(
            config.tower_widths,
            sides,
            side=config.query_side,
            dim=config.connector_hidden_size,
            text_dim=config.text_config.hidden_size,
            depth=config.connector_depth,
            inner=config.inner_layers,
            num_heads=config.connector_heads,
        )

    @property
    def _widths(self) -> list[int]:
        """Channels of the parts of a token: the language model's, the context's, each tower's window."""
        config: Any = self.config
        dim = config.connector_hidden_size
        factors = [side // config.query_side for side in config.vision_sides]
        return [config.text_config.hidden_size, dim, *(factor**2 * dim for factor in factors)]

    def connect(self, features: Sequence[Tensor]) -> Tensor:
        """As of `ConnectorModel`; with inner layers, each token is followed by what these attend to at its place.

        That is the context and the window of each tower, in one row `[D + dim + sum of m^2 * dim]`. `forward` takes
        the rows apart. So whatever is done to the tokens of an image (chosen, repeated for beams) is done to both.
        """
        projector = self.multi_modal_projector
        maps = projector.maps(features)
        tokens = projector(maps)
        if not self.config.inner_layers:
            return tokens
        context, parts = projector.surroundings(maps)
        seen = torch.cat([context, *(part.flatten(1) for part in parts)], dim=-1)
        return torch.cat([tokens, seen.unflatten(0, tokens.shape[:2]).to(tokens.dtype)], dim=-1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As of `LlavaModel`; the image tokens meet the towers again after the chosen layers.

        Raises:
            ValueError: image outputs that are not from `connect`, or a language model that does not hand keyword
                arguments to its layers.
        """
        if pixel_values is not None and mm_encoder_outputs:
            raise ValueError("give pixel_values or mm_encoder_outputs, not both")
        if pixel_values is not None:
            chosen = {name: kwargs.get(name) for name in ("vision_feature_layer", "vision_feature_select_strategy")}
            mm_encoder_outputs = {"image": self.get_image_features(pixel_values, **chosen)}
        image = (mm_encoder_outputs or {}).get("image")
        seen = None
        if image is not None and self.config.inner_layers:
            tokens, seen = self._taken_apart(input_ids, inputs_embeds, image.pooler_output)
            mm_encoder_outputs = {"image": BaseModelOutputWithPooling(pooler_output=[tokens])}  # type: ignore[arg-type]
            kwargs["seen_images"] = seen
        output = super().forward(
            input_ids=input_ids, inputs_embeds=inputs_embeds, mm_encoder_outputs=mm_encoder_outputs, **kwargs
        )
        if seen is not None and seen.used != self.config.inner_layers:
            raise ValueError(
                f"{type(self.language_model).__name__} handed the images to {seen.used} of {self.config.inner_layers} "
                "decoder layers; use inner_layers=0, or a language model such as Llama or Qwen"
            )
        if seen is None and self.training and self.config.inner_layers:
            # Without images the inner layers still get a gradient (of zero): other ranks wait for it.
            weights = self.multi_modal_projector.inner_layers.parameters()
            nothing = 0.0 * torch.stack([weight.sum() for weight in weights]).sum()
            output.last_hidden_state = output.last_hidden_state + nothing.to(output.last_hidden_state)
        return output

    def _taken_apart(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, rows: Sequence[Tensor]
    ) -> tuple[Tensor, _Seen]:
        """The tokens for the language model, and what the inner layers attend to."""
        joined = torch.cat([each.flatten(0, -2) for each in rows])
        widths = self._widths
        if joined.shape[-1] != sum(widths):
            raise ValueError(
                f"the image outputs have {joined.shape[-1]} channels; with inner_layers={self.config.inner_layers} "
                f"they have {sum(widths)}, the towers' windows behind each token: use get_image_features or connect"
            )
        tokens, context, *parts = joined.split(widths, dim=-1)
        if input_ids is not None:
            mask = input_ids == self.config.image_token_id
        else:
            assert inputs_embeds is not None
            token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        return tokens, _Seen(mask, context, [part.unflatten(1, (-1, context.shape[-1])) for part in parts])


class CambrianForConditionalGeneration(ConnectorForConditionalGeneration):
    """Cambrian-1 (arXiv:2406.16860): any towers, the spatial vision aggregator, any language model."""

    config_class = CambrianConfig
    model_class = CambrianModel


register(CambrianConfig, CambrianModel, CambrianForConditionalGeneration)
