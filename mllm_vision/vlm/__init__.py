"""Stages one and two: systems of the literature, building, freezing, measuring, saving and loading it."""

from mllm_vision.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "LanguageTask": "task",
        "System": "systems.base",
        "load_system": "systems.registry",
        "list_systems": "systems.registry",
        "build_vlm": "build",
        "load_vlm": "export",
        "save_vlm": "export",
        "merge_adapters": "export",
        "FreezeProof": "freezing",
        "audit": "freezing",
        "freeze": "freezing",
        "by_prefix": "freezing",
        "HeldOutLoss": "measure",
        "answer": "measure",
        "supervised_loss": "measure",
    },
)
