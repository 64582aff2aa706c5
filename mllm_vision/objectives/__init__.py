"""Stage-zero methods: an `Objective` owns an encoder and returns a loss. One method, one file."""

from __future__ import annotations

from mllm_vision.objectives.base import (
    ImageTextObjective,
    Objective,
    ObjectiveOutput,
    list_objectives,
    load_objective,
)

__all__ = ["ImageTextObjective", "Objective", "ObjectiveOutput", "list_objectives", "load_objective"]
