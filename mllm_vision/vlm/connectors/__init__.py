"""Connectors without a class in transformers; importing this package makes their models known to its Auto classes."""

from mllm_vision.vlm.connectors.fused import PrismaticConfig, PrismaticForConditionalGeneration
from mllm_vision.vlm.connectors.processing import ConnectorProcessor, JoinedImageProcessor
from mllm_vision.vlm.connectors.resampler import QwenVLConfig, QwenVLForConditionalGeneration
from mllm_vision.vlm.connectors.spatial_aggregator import CambrianConfig, CambrianForConditionalGeneration

__all__ = [
    "CambrianConfig",
    "CambrianForConditionalGeneration",
    "ConnectorProcessor",
    "JoinedImageProcessor",
    "PrismaticConfig",
    "PrismaticForConditionalGeneration",
    "QwenVLConfig",
    "QwenVLForConditionalGeneration",
]
