"""Decoding: whatever users bring becomes an upright 8-bit RGB picture, or a `BadImage` that says why not."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .sampling import BadRow

MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb
_EXIF_ORIENTATION = 0x0112
_ORIENTED = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # where the orientation may stand
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(BadRow):
    """An image that cannot be decoded: corrupt, truncated, empty, missing or beyond the size limit."""

    def __init__(self, message: str, reason: str = "the image cannot be decoded") -> None:
        super().__init__(message)
        self.reason = reason


def load_image(
    value: Any,
    *,
    draft: tuple[int, int] | Callable[[int, int], tuple[int, int]] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Decode `value` to an upright 8-bit RGB picture.

    Args:
        value: a PIL image, a path, encoded bytes, an `[H, W]` or `[H, W, 3]` uint8 array, or
            `{"bytes": ..., "path": ...}` as `datasets.Image(decode=False)` gives.
        draft: (height, width), or what gives it for the upright picture's width and height. A JPEG at least twice
            as large is decoded at a half, a quarter or an eighth, never below this size: faster, but not what a
            full decode and resize would give to the last grey level.
        max_pixels: pictures with more pixels are refused before they are decoded.

    Transparency is laid over white (as transformers does), 16-bit grey is scaled to 8 bits, CMYK, palette and
    grey become RGB, the EXIF orientation is applied, and an animation gives its first frame.

    Raises:
        BadImage: naming the picture and what is wrong with it.
    """
    name = _describe(value)
    try:
        image = _open(value)
        width, height = image.size
        if width < 1 or height < 1:
            raise BadImage(f"{name} is {width}x{height}: it has no pixels", "the image is empty")
        if width * height > max_pixels:
            raise BadImage(
                f"{name} is {width}x{height} = {width * height} pixels, above the limit of {max_pixels}; "
                "shrink it beforehand or leave it out",
                "the image is too large",
            )
        if draft is not None and image.format == "JPEG":
            turned = _orientation(image) >= 5  # the file's rows are the picture's columns
            if callable(draft):
                draft = draft(height, width) if turned else draft(width, height)
            image.draft("RGB", draft if turned else draft[::-1])
        image.load()
        return _to_rgb(_upright(image))
    except BadImage:
        raise
    except Exception as error:  # the decoders raise nearly anything on broken files (struct.error, SyntaxError...)
        raise BadImage(f"{name} cannot be decoded: {type(error).__name__}: {error}") from error


def _describe(value: Any) -> str:
    if isinstance(value, str | Path):
        return f"image {str(value)[:200]!r}"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"image of {len(value)} bytes"
    if isinstance(value, dict):
        size = f" ({len(value['bytes'])} bytes)" if value.get("bytes") is not None else ""
        return f"image {value.get('path')!r}{size}"
    if isinstance(value, Image.Image):
        return f"{value.mode} image {getattr(value, 'filename', '') or ''!r}"
    return f"image of type {type(value).__name__}"


def _open(value: Any) -> Image.Image:
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if value is None:
        raise BadImage("the image is missing (null)", "the image is missing")
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, str | Path):
        if not Path(value).is_file():
            raise BadImage(f"image {str(value)!r} does not exist (folder: {Path.cwd()})", "the image does not exist")
        return Image.open(value)
    if isinstance(value, bytes | bytearray | memoryview):
        if len(value) == 0:
            raise BadImage("the image has no bytes", "the image is empty")
        return Image.open(BytesIO(value))
    if isinstance(value, np.ndarray):
        return Image.fromarray(value)
    raise BadImage(
        f"{type(value).__name__} is no image: expected a PIL image, a path, bytes or {{'bytes', 'path'}}",
        "the value is no image",
    )


def _orientation(image: Image.Image) -> int:
    """1 for upright, 2 to 4 mirrored or upside down, 5 to 8 lying on a side."""
    if image.format == "JPEG" and not any(name in image.info for name in _ORIENTED):
        return 1  # without parsing what is not there
    found = image.getexif().get(_EXIF_ORIENTATION, 1) if "exif" in image.info or image.format else 1
    return found if isinstance(found, int) else 1


def _upright(image: Image.Image) -> Image.Image:
    method = _TRANSPOSE.get(_orientation(image))
    if method is None:
        return image
    turned = image.transpose(method)
    # The tag goes, so that a picture that passes here a second time is left alone.
    turned.info = {name: value for name, value in turned.info.items() if name not in _ORIENTED}
    return turned


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        low, high = float(values.min()), float(values.max())
        if image.mode == "F" and low >= 0.0 and high <= 1.0:
            values = values * 255.0
        elif high > 255.0:
            values = values / 257.0  # 16 bits: 65535 becomes 255
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
