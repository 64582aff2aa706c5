"""Stages one and two: the LLaVA-style model, building, freezing, measuring, saving and loading it."""

from mllm_vision.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
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
    },
)
