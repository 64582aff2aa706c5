"""Stage-zero methods: an `Objective` owns an encoder and returns a loss. One method, one file."""

from mllm_vision.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ImageObjective": "base",
        "Objective": "base",
        "ObjectiveOutput": "base",
        "ImageTextConfig": "image_text",
        "ImageTextObjective": "image_text",
        "list_objectives": "registry",
        "load_objective": "registry",
    },
)
