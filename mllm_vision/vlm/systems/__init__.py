"""Multimodal LLMs of the literature over transformers' own classes, one file each."""

from mllm_vision.vlm.systems.base import System
from mllm_vision.vlm.systems.registry import list_systems, load_system, system_of

__all__ = ["System", "list_systems", "load_system", "system_of"]
