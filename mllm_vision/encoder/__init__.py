"""Vision encoders: any transformers backbone behind one small interface, saved as plain transformers checkpoints."""

from mllm_vision.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "VisionEncoder": "encoder",
        "VisionFeatures": "features",
        "extract_features": "features",
        "build_backbone": "build",
        "build_processor": "build",
        "DualEncoder": "dual",
    },
)
