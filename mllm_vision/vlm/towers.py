"""Vision towers that fit a system: exact conversions in, and back out as plain encoders."""

from mllm_vision.encoder.convert import TOWERS, check_tower, convert_tower, plain_tower, plain_type

__all__ = ["TOWERS", "check_tower", "convert_tower", "plain_tower", "plain_type"]
