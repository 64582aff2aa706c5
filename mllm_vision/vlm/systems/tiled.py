"""What the systems with tiles or native aspects ask of an encoder: a square size, and how its pixels are normalised."""

from __future__ import annotations

from typing import Any

from mllm_vision.data.images.preprocessing import three
from mllm_vision.encoder import VisionEncoder


def square_side(encoder: VisionEncoder, system: str) -> int:
    """The side of the encoder's images in pixels.

    Raises:
        ValueError: images that are not squares, or not of the size in the tower's config, by which the native class
            cuts and counts.
    """
    size, config = encoder.image_size, encoder.backbone.config
    sides = {size} if isinstance(size, int) else set(size)
    own: Any = getattr(config, "image_size", None)
    sides |= {own} if isinstance(own, int) else set(own or ())
    if len(sides) > 1:
        raise ValueError(
            f"{system} takes squares of the tower's own size, but the encoder has images of {size} and its tower "
            f"image_size={own}; load the encoder with --image_size {max(sides)}"
        )
    return sides.pop()


def pixels_of(image_processor: Any) -> dict[str, Any]:
    """How an encoder's image processor resamples, rescales and normalises, as settings of another processor."""
    names = ("resample", "do_rescale", "rescale_factor", "do_normalize")
    settings = {name: value for name in names if (value := getattr(image_processor, name, None)) is not None}
    for name in ("image_mean", "image_std"):
        if getattr(image_processor, name, None) is not None:
            settings[name] = three(getattr(image_processor, name))
    return settings
