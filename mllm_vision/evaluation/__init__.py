"""Evaluators: callables ``(model, step) -> dict`` that say whether an encoder got better, and against
what.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Evaluation": "base",
    "Evaluator": "base",
    "ZeroShot": "zero_shot",
    "Retrieval": "retrieval",
    "QuestionAnswering": "question_answering",
    "LabelledImages": "labelled",
    "KnnAccuracy": "knn",
    "LinearProbe": "linear_probe",
    "ClassifierAccuracy": "classifier",
    "Geometry": "collapse",
    "Maps": "maps",
    "Attention": "attention",
    "normalize_answer": "answers",
    "consensus": "answers",
    "load_model": "models",
    "reinitialise": "models",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names are {', '.join(_HOMES)}")
