"""Scenes, the embedded generator of images with captions, questions and answers."""

from mllm_vision.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {"main": "scenes", "class_names": "objects", "draw_scene": "objects", "sample_scene": "objects"},
)
