"""mllm_vision: train vision encoders by contrast, connect them to a language model, measure every stage.

The public names are imported when first used: `import mllm_vision` itself costs no torch import.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> the module it lives in
_HOMES = {
    "VisionEncoder": "mllm_vision.encoder",
    "VisionFeatures": "mllm_vision.encoder",
    "DualEncoder": "mllm_vision.encoder.dual",
    "Objective": "mllm_vision.objectives",
    "ObjectiveOutput": "mllm_vision.objectives",
    "load_objective": "mllm_vision.objectives",
    "list_objectives": "mllm_vision.objectives",
    "VisionLanguageModel": "mllm_vision.vlm",
    "build_vlm": "mllm_vision.vlm",
    "load_vlm": "mllm_vision.vlm",
    "list_projectors": "mllm_vision.modules.projectors",
    "build_projector": "mllm_vision.modules.projectors",
    "load_records": "mllm_vision.data.records",
    "bind_columns": "mllm_vision.data.records",
    "load_image": "mllm_vision.data.images",
    "ImageTransform": "mllm_vision.data.images",
    "parse_recipe": "mllm_vision.training.recipe",
    "recipe_dict": "mllm_vision.training.recipe",
    "run_recipe": "mllm_vision.training.recipe",
    "RecipeArguments": "mllm_vision.training.arguments",
    "Run": "mllm_vision.training.run",
    "RecipeTrainer": "mllm_vision.training.recipe_trainer",
    "ObjectiveTrainer": "mllm_vision.training.trainer",
    "hash_weights": "mllm_vision.lineage",
    "read_lineage": "mllm_vision.lineage",
    "check_lineage": "mllm_vision.lineage",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'mllm_vision' has no attribute {name!r}; public names are {', '.join(_HOMES)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
