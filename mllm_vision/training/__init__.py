"""Training: recipes parsed from flags and YAML, the run folder with its lineage, and the trainers.

Names are imported when first used: parsing a recipe does not load the Trainer.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "parse_recipe": "recipe",
    "peek_recipe": "recipe",
    "recipe_dict": "recipe",
    "run_recipe": "recipe",
    "RecipeArguments": "arguments",
    "Run": "run",
    "RecipeTrainer": "trainer",
    "ObjectiveTrainer": "trainer",
    "parameter_groups": "optimizers",
    "LARS": "lars",
    "LAMB": "lamb",
    "WeightAverage": "ema",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names are {', '.join(_HOMES)}")
