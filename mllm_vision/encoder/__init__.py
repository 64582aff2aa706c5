"""Vision encoders: any transformers backbone behind one small interface, saved as plain transformers checkpoints."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm_vision.encoder.build import build_backbone, build_processor
    from mllm_vision.encoder.card import model_card
    from mllm_vision.encoder.dual import DualEncoder
    from mllm_vision.encoder.encoder import VisionEncoder
    from mllm_vision.encoder.features import VisionFeatures, extract_features
    from mllm_vision.encoder.hub import push_directory

_HOMES = {
    "VisionEncoder": "encoder",
    "VisionFeatures": "features",
    "extract_features": "features",
    "build_backbone": "build",
    "build_processor": "build",
    "DualEncoder": "dual",
    "model_card": "card",
    "push_directory": "hub",
}

__all__ = [
    "DualEncoder",
    "VisionEncoder",
    "VisionFeatures",
    "build_backbone",
    "build_processor",
    "extract_features",
    "model_card",
    "push_directory",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
