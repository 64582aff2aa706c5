"""Data: records of any common format, decoding and transforming pictures, pairs, conversations, the scenes generator.

The names are imported lazily: `python -m mllm_vision.data.scenes --help` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "load_records": "records",
    "bind_columns": "records",
    "BadImage": "images",
    "ImageTransform": "images",
    "load_image": "images",
    "BadRow": "sampling",
    "BadSamples": "sampling",
    "EpochCallback": "sampling",
    "PairCollator": "pairs",
    "PairDataset": "pairs",
    "PictureCollator": "pictures",
    "PictureDataset": "pictures",
    "ViewArguments": "views",
    "ViewMaker": "views",
    "CHAT_TEMPLATES": "chat",
    "ConversationCollator": "conversations",
    "ConversationDataset": "conversations",
    "PackedConversations": "packing",
    "bind_conversations": "forms",
    "preview_labels": "conversations",
    "to_messages": "forms",
    "Stream": "streams",
    "StreamArguments": "stream_flags",
    "StreamDataset": "streams",
    "StreamLoader": "stream_loader",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
