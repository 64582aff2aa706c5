"""Prismatic (arXiv:2402.07865): the channels of several towers joined token by token, an MLP of three layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from mllm_vision.encoder import VisionEncoder
from mllm_vision.vlm.connectors.fused import PrismaticForConditionalGeneration
from mllm_vision.vlm.language_model import JoinedLanguageModel
from mllm_vision.vlm.systems.own import OwnSystem, SeveralTowers


class Prismatic(OwnSystem):
    """Prismatic: one token for each patch, with the channels of every tower (published: SigLIP and DINOv2)."""

    @dataclasses.dataclass
    class Config(SeveralTowers):
        """Settings: the towers."""

    name: ClassVar[str] = "prismatic"
    model_class: ClassVar[type] = PrismaticForConditionalGeneration

    def num_tokens(self, encoders: Sequence[VisionEncoder]) -> int:
        tokens = [each.num_tokens for each in encoders]
        if len(set(tokens)) != 1:
            sizes = [f"{each.image_size} pixels by {each.patch_size}" for each in encoders]
            raise ValueError(
                f"system=prismatic joins towers patch by patch, but they give {tokens} patches ({', '.join(sizes)}); "
                "choose sizes with one grid (--image_size, --more_image_sizes)"
            )
        return tokens[0]

    def fields(self, encoders: Sequence[VisionEncoder], language: JoinedLanguageModel) -> dict[str, Any]:
        return {}
