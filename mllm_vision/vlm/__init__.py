"""Stages one and two: the LLaVA-style model, building, freezing, measuring, saving and loading it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "VisionLanguageModel": "model",
    "build_vlm": "build",
    "load_vlm": "export",
    "save_vlm": "export",
    "merge_lora": "export",
    "FreezeProof": "freezing",
    "audit": "freezing",
    "freeze": "freezing",
    "learning_rates": "freezing",
    "add_lora": "freezing",
    "HeldOutLoss": "measure",
    "answer": "measure",
    "supervised_loss": "measure",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
