"""Systems by name and by the model type of their checkpoints. A new system is its file and one line here."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import sys
from collections.abc import Mapping
from typing import Any

from mllm_vision.errors import unknown_name
from mllm_vision.vlm.systems.base import System

logger = logging.getLogger(__name__)
# name -> (module of this folder, class, model_type of its checkpoints)
SYSTEMS: dict[str, tuple[str, str, str]] = {
    "blip2": ("blip2", "BLIP2", "blip-2"),
    "cambrian": ("cambrian", "Cambrian", "mllm_vision_cambrian"),
    "idefics2": ("idefics2", "Idefics2", "idefics2"),
    "internvl": ("internvl", "InternVL", "internvl"),
    "llava": ("llava", "LLaVA", "llava"),
    "llava15": ("llava", "LLaVA15", "llava"),
    "llava_next": ("llava_next", "LLaVANeXT", "llava_next"),
    "paligemma": ("paligemma", "PaliGemma", "paligemma"),
    "prismatic": ("prismatic", "Prismatic", "mllm_vision_prismatic"),
    "qwen_vl": ("qwen_vl", "QwenVL", "mllm_vision_qwen_vl"),
}


def list_systems() -> list[str]:
    """The names that `load_system` knows, in alphabetical order."""
    return sorted(SYSTEMS)


def load_system(name: str) -> type[System]:
    """A system by name, or a class of one's own as `package.module:Class`.

    Raises:
        ValueError: an unknown name (the nearest is named), or a class that is not a `System`.
        ImportError: the module of one's own class cannot be imported.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        found = getattr(importlib.import_module(module), attribute, None)
        if not (isinstance(found, type) and issubclass(found, System)):
            raise ValueError(f"system={name}: {attribute} is not a subclass of mllm_vision.vlm.systems.System")
        return found
    if name not in SYSTEMS:
        raise ValueError(f"{unknown_name('system', name, SYSTEMS)}; a class of your own is package.module:Class")
    module, attribute, _ = SYSTEMS[name]
    return getattr(importlib.import_module(f"mllm_vision.vlm.systems.{module}"), attribute)


def model_types() -> set[str]:
    """The `model_type` of every system's checkpoints."""
    return {model_type for _, _, model_type in SYSTEMS.values()}


def system_of(config: Any, path: str = "the model") -> System:
    """The system that a checkpoint's config belongs to, with its settings.

    Args:
        config: the native config, as `AutoConfig` reads it. Checkpoints of this package name their system in
            `config.mllm_vision`; others are recognised by `model_type`.
        path: for the error.

    Raises:
        ValueError: not a model type of any system.
    """
    settings = dict(getattr(config, "mllm_vision", None) or {})
    named = settings.pop("system", None)
    module = str(named).partition(":")[0]
    if named and ":" in named and module not in sys.modules:  # a downloaded config imports nothing
        logger.warning("%s is of the system %s; import %s first to load it as such", path, named, module)
    elif named:
        return _with_settings(load_system(named), settings)
    found = [name for name, (_, _, model_type) in SYSTEMS.items() if model_type == config.model_type]
    if not found:
        raise ValueError(
            f"{path} contains a {config.model_type!r} model, not one of the systems {', '.join(list_systems())}; use "
            "the folder 'model' saved by recipes/align.py or recipes/instruct.py"
        )
    chosen = next((name for name in found if load_system(name).recognises(config)), found[-1])
    return _with_settings(load_system(chosen), settings)


def _with_settings(kind: type[System], settings: Mapping[str, Any]) -> System:
    """A system with what ``config.mllm_vision`` says of its settings."""
    names = {field.name for field in dataclasses.fields(kind.Config)}
    return kind(kind.Config(**{name: value for name, value in settings.items() if name in names}))
