"""Stage-zero methods: an `Objective` owns an encoder and returns a loss. One method, one file."""

from __future__ import annotations

from mllm_vision.objectives.base import ImageObjective, Objective, ObjectiveOutput
from mllm_vision.objectives.image_text import ImageTextConfig, ImageTextObjective
from mllm_vision.objectives.registry import list_objectives, load_objective

__all__ = [
    "ImageObjective",
    "ImageTextConfig",
    "ImageTextObjective",
    "Objective",
    "ObjectiveOutput",
    "list_objectives",
    "load_objective",
]
