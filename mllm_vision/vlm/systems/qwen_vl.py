"""Qwen-VL (arXiv:2308.12966): any tower, one cross-attention of 256 learned queries, any language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from mllm_vision.encoder import VisionEncoder
from mllm_vision.vlm.connectors.base import grid_side
from mllm_vision.vlm.connectors.resampler import QwenVLForConditionalGeneration
from mllm_vision.vlm.language_model import JoinedLanguageModel
from mllm_vision.vlm.systems.own import OwnSystem


class QwenVL(OwnSystem):
    """Qwen-VL: every image becomes `num_queries` tokens between `<img>` and `</img>`, whatever its tower and size."""

    @dataclasses.dataclass
    class Config:
        """Settings of the resampler (section 2.1)."""

        num_queries: int = dataclasses.field(default=256, metadata={"help": "Tokens an image, a square number."})
        connector_heads: int | None = dataclasses.field(
            default=None, metadata={"help": "Heads of the resampler; by default one per 128 channels.", "rare": True}
        )

    name: ClassVar[str] = "qwen_vl"
    model_class: ClassVar[type] = QwenVLForConditionalGeneration
    brackets: ClassVar[tuple[str, str]] = ("<img>", "</img>")
    tokens: ClassVar[tuple[str, ...]] = brackets

    def num_tokens(self, encoders: Sequence[VisionEncoder]) -> int:
        grid_side(self.config.num_queries)
        grid_side(encoders[0].num_tokens)
        return self.config.num_queries

    def fields(self, encoders: Sequence[VisionEncoder], language: JoinedLanguageModel) -> dict[str, Any]:
        return {"num_queries": self.config.num_queries, "connector_heads": self.config.connector_heads}
