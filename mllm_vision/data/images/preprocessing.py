"""The settings of a saved image processor as geometry and one multiplication and addition a channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

TORCH_MODES = {int(Image.Resampling.BILINEAR): "bilinear", int(Image.Resampling.BICUBIC): "bicubic"}


@dataclass(frozen=True)
class Preprocessing:
    """What a processor does, reduced to geometry and one multiplication and addition a channel."""

    height: int
    width: int
    shortest: int | None  # resize the shorter side to this, then crop the centre; None: resize to `resize`
    resize: tuple[int, int]
    resample: int
    multiply: tuple[float, ...]
    add: tuple[float, ...]


def three(value: Any) -> list[float]:
    values = [float(v) for v in value] if isinstance(value, list | tuple) else [float(value)] * 3
    return values * 3 if len(values) == 1 else values


def height_width(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if height < 1 or width < 1:
        raise ValueError(f"image_size={size} must be positive")
    return height, width


def _field(size: Any, name: str) -> int | None:
    value = size.get(name) if isinstance(size, dict) else getattr(size, name, None)
    return int(value) if value else None


def _sides(size: Any) -> tuple[int, int] | None:
    height, width = _field(size, "height"), _field(size, "width")
    return (height, width) if height and width else None


def _family(processor: Any) -> str | None:
    """ "standard", "convnext" or "efficientnet"; None when the class does anything else with an image."""
    from transformers import image_processing_backends as backends

    name = type(processor).__name__.replace("ImageProcessor", "|").split("|")[0]
    if name in ("ConvNext", "EfficientNet"):
        return name.lower()
    base = next((b for b in (backends.PilBackend, backends.TorchvisionBackend) if isinstance(processor, b)), None)
    if base is None:
        return None
    steps = ("preprocess", "_preprocess", "process_image", "resize", "center_crop", "rescale", "normalize")
    changed = [step for step in steps if getattr(type(processor), step, None) is not getattr(base, step, None)]
    return None if changed else "standard"


def read_preprocessing(processor: Any, override: tuple[int, int] | None) -> Preprocessing | None:
    """The processor's settings, or None if they cannot be followed exactly."""
    family = _family(processor)
    resample = getattr(processor, "resample", None)
    if family is None or resample is None or not getattr(processor, "do_resize", False):
        return None
    if int(resample) not in (*TORCH_MODES, int(Image.Resampling.LANCZOS)) or getattr(processor, "do_pad", False):
        return None
    size, crop_size = processor.size, getattr(processor, "crop_size", None)
    shortest = _field(size, "shortest_edge")
    sides, crop = _sides(size), None
    if getattr(processor, "do_center_crop", False):
        crop = _sides(crop_size)
        if crop is None:
            return None
    if any(_field(size, name) for name in ("longest_edge", "max_height", "max_width")):
        return None
    if family == "convnext":
        if not shortest or crop:
            return None
        if override is not None:
            if override[0] != override[1]:
                return None
            shortest = override[0]
        if shortest < 384:
            crop, shortest = (shortest, shortest), int(shortest / (getattr(processor, "crop_pct", None) or 224 / 256))
        else:
            sides, shortest = (shortest, shortest), None
        override = None
    if shortest:
        if crop is None:
            return None  # images would come out in different sizes
        if override is not None:
            shortest, crop = max(round(shortest * max(override) / max(crop)), *override), override
        if shortest < max(crop):
            return None  # the processor pads here
        resize, target = (0, 0), crop
    elif sides is not None:
        resize = sides
        target = crop or resize
        if override is not None:
            resize = (
                max(round(sides[0] * override[0] / target[0]), override[0]),
                max(round(sides[1] * override[1] / target[1]), override[1]),
            )
            target = override
        if target[0] > resize[0] or target[1] > resize[1]:
            return None
    else:
        return None
    multiply, add = _affine(processor, family)
    if len(multiply) != 3:
        return None
    return Preprocessing(int(target[0]), int(target[1]), shortest, resize, int(resample), multiply, add)


def _affine(processor: Any, family: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Rescaling and normalising as one multiplication and one addition of a 0..255 value a channel."""
    factor = float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else 1.0
    mean, std = three(processor.image_mean or 0.0), three(processor.image_std or 1.0)
    multiply, add = [factor] * len(mean), [0.0] * len(mean)
    if family == "efficientnet" and processor.rescale_offset and processor.do_rescale:
        add = [-1.0] * len(mean)
    if getattr(processor, "do_normalize", False):
        multiply = [m / s for m, s in zip(multiply, std, strict=True)]
        add = [(a - mu) / s for a, mu, s in zip(add, mean, std, strict=True)]
    if family == "efficientnet" and processor.include_top:  # divides by the deviation once more
        multiply = [m / s for m, s in zip(multiply, std, strict=True)]
        add = [a / s for a, s in zip(add, std, strict=True)]
    return tuple(multiply), tuple(add)
