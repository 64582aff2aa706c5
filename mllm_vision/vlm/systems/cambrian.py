"""Cambrian-1 (arXiv:2406.16860): several towers under a spatial vision aggregator, before and inside the LLM."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mllm_vision.encoder import VisionEncoder
from mllm_vision.vlm.connectors.base import grid_side
from mllm_vision.vlm.connectors.spatial_aggregator import CambrianForConditionalGeneration
from mllm_vision.vlm.language_model import JoinedLanguageModel
from mllm_vision.vlm.systems.own import OwnSystem, SeveralTowers


class Cambrian(OwnSystem):
    """Cambrian-1: a grid of queries, each attending to its own window in the map of every tower."""

    @dataclasses.dataclass
    class Config(SeveralTowers):
        """Settings of the aggregator (section 4; the defaults are Cambrian-1-8B's)."""

        query_side: int = dataclasses.field(default=24, metadata={"help": "Side of the grid of queries: 576 tokens."})
        vision_sides: list[int] = dataclasses.field(
            default_factory=list,
            metadata={
                "help": "Side to which each encoder's map is resized; by default the multiple nearest to its own."
            },
        )
        connector_hidden_size: int = dataclasses.field(default=1024, metadata={"help": "Width of the aggregator."})
        connector_depth: int = dataclasses.field(default=3, metadata={"help": "Its layers before the language model."})
        connector_heads: int = dataclasses.field(default=16, metadata={"help": "Its heads.", "rare": True})
        inner_layers: int = dataclasses.field(
            default=0, metadata={"help": "Aggregations inside the language model (Cambrian-1-8B: 10)."}
        )
        inner_start: int = dataclasses.field(
            default=0, metadata={"help": "The decoder layer before the first of them.", "rare": True}
        )
        inner_stride: int = dataclasses.field(
            default=3, metadata={"help": "Decoder layers from one to the next.", "rare": True}
        )

    name: ClassVar[str] = "cambrian"
    model_class: ClassVar[type] = CambrianForConditionalGeneration

    def num_tokens(self, encoders: Sequence[VisionEncoder]) -> int:
        return self.config.query_side**2

    def fields(self, encoders: Sequence[VisionEncoder], language: JoinedLanguageModel) -> dict[str, Any]:
        query = self.config.query_side
        tokens = [each.num_tokens for each in encoders]
        nearest = [max(1, round(grid_side(each) / query)) * query for each in tokens]
        towers = {each.name for each in dataclasses.fields(SeveralTowers)} | {"vision_sides"}
        settings = {name: value for name, value in vars(self.config).items() if name not in towers}
        return {**settings, "vision_tokens": tokens, "vision_sides": self.config.vision_sides or nearest}

    def build(self, encoder: VisionEncoder, language: JoinedLanguageModel, processor: Any) -> PreTrainedModel:
        model: Any = super().build(encoder, language, processor)
        model.model.place_inner_layers()
        return model

    def features(self, model: Any, images: Mapping[str, Tensor]) -> Tensor:
        """The maps of all towers in one row, `[n, 1, sum of N * C]`: their sizes differ."""
        return torch.cat([each.flatten(1) for each in model.model.tower_features(images["pixel_values"])], dim=1)[
            :, None
        ]

    def connect(self, model: Any, features: Tensor, images: Mapping[str, Tensor]) -> Tensor:
        """With inner layers a token is followed by what these attend to, see `CambrianModel.connect`."""
        config = model.config
        shapes = list(zip(config.vision_tokens, config.tower_widths, strict=True))
        maps = features[:, 0].split([tokens * width for tokens, width in shapes], dim=1)
        rows = model.model.connect([each.unflatten(1, shape) for each, shape in zip(maps, shapes, strict=True)])
        return rows.flatten(0, 1)
