"""Decoding: any supported image becomes an upright 8-bit RGB image, or raises `BadImage`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from mllm_vision.data.images.files import (
    ORIENTED,
    BadImage,
    describe,
    eight_bits,
    late_orientation,
    open_image,
    orientation_of,
)

__all__ = ["MAX_BYTES", "BadImage", "image_size", "in_threads", "load_image"]

_T = TypeVar("_T")
_R = TypeVar("_R")

MAX_BYTES = 224 * 2**20  # of memory while an image is decoded: 58 million RGB pixels
_STRIP = 2**18  # pixels that are converted at once where a conversion needs several times the image
_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
_STORED = {"1": 1, "L": 1, "P": 1} | dict.fromkeys(_SIXTEEN, 2)  # bytes a pixel in Pillow, of other modes 4
_FACTORS = (1, 2, 4, 8)  # by which a large grey image is reduced before it becomes RGB
_BESIDE = {"WEBP": 12, "JPEG2000": 16, "AVIF": 8}  # bytes a pixel that a decoder keeps beside the image
_MOST_THREADS = 16  # beyond which Python's own share of decoding leaves them waiting for one another
_DEAREST = 24  # bytes a pixel that nothing exceeds
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(
    value: Any,
    *,
    draft: tuple[int, int] | Callable[[int, int], tuple[int, int]] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Image.Image:
    """Decode `value` to an upright 8-bit RGB image.

    Args:
        value: a PIL image, a path, a `file://` address or a data URI, encoded bytes, an `[H, W]` or `[H, W, C]`
            array (uint8, uint16, bool, or floats from 0 to 1), or `{"bytes": ..., "path": ...}` as
            `datasets.Image(decode=False)` gives. Formats: `FORMATS`.
        draft: (height, width), or what gives it for the upright image's width and height. A JPEG at least twice
            as large is decoded at a half, a quarter or an eighth, never below this size: faster, but not what a
            full decode and resize would give to the last grey level.
        max_bytes: memory that decoding may take. A JPEG that would take more is decoded at a half, a quarter or an
            eighth, a grey image is reduced before it becomes RGB; any other is refused before it is decoded.

    Transparency is laid over white (as transformers does), CMYK, palette and grey become RGB, the EXIF orientation is
    applied, and an animation gives its first frame. More than 8 bits are scaled by the mode, whatever the values are:
    16 bits by 65535 (and Pillow's 32-bit integers, in which it gives such files), floats by 1.0.

    Raises:
        BadImage: naming the image and what is wrong with it.
    """
    try:
        image, factor = _scaled(value, draft, max_bytes)
        image.load()
        return _upright(_to_rgb(image, factor))
    except BadImage:
        raise
    except Exception as error:  # the decoders raise nearly anything on broken files (struct.error, SyntaxError...)
        raise _undecodable(value, error) from error


def image_size(value: Any, *, max_bytes: int = MAX_BYTES) -> tuple[int, int]:
    """(height, width) of what `load_image(value)` gives, from the file's header: no pixels are decoded.

    Raises:
        BadImage: as `load_image`, but not for damage behind the header.
    """
    try:
        image, factor = _scaled(value, None, max_bytes)
        if late_orientation(image):
            image.load()
        width, height = (-(-side // factor) for side in image.size)
        return (width, height) if orientation_of(image) >= 5 else (height, width)
    except BadImage:
        raise
    except Exception as error:
        raise _undecodable(value, error) from error


def _undecodable(value: Any, error: Exception) -> BadImage:
    return BadImage(f"{describe(value)} cannot be decoded: {type(error).__name__}: {str(error)[:200]}")


def _scaled(
    value: Any, draft: tuple[int, int] | Callable[[int, int], tuple[int, int]] | None, max_bytes: int
) -> tuple[Image.Image, int]:
    """(the opened image, a JPEG at the scale it is decoded at; the factor by which a grey one is reduced then)."""
    image = open_image(value)
    width, height = image.size
    if width < 1 or height < 1:
        raise BadImage(f"{describe(value)} is {width}x{height}: it has no pixels", "the image is empty")
    turned = orientation_of(image)
    cost = _Cost(image, turned in _TRANSPOSE) if width * height * _DEAREST > max_bytes else None
    if image is not value and image.format in ("JPEG", "MPO"):
        if callable(draft):
            draft = draft(height, width) if turned >= 5 else draft(width, height)
        if draft is not None and turned >= 5:  # the file's rows are the image's columns
            draft = draft[::-1]
        _scale_jpeg(image, draft, cost, max_bytes)
    factor = 1
    if cost is not None:
        factor = next((each for each in _FACTORS if cost.bytes(image.size, each) <= max_bytes), 0)
    if cost is not None and not factor:
        raise BadImage(
            f"{describe(value)} is {width}x{height} = {width * height} pixels of mode {image.mode}: decoding takes "
            f"{cost.bytes(image.size) / 2**20:.3g} MiB, above the limit of {max_bytes / 2**20:.3g}; shrink it "
            "beforehand or leave it out",
            "the image is too large",
        )
    return image, factor


def in_threads(function: Callable[[_T], _R], values: Sequence[_T]) -> list[_R]:
    """`[function(value) for value in values]` on as many threads as torch uses here: one in a loader's worker process.

    Pillow lets other threads run while it decodes and resizes, so that a batch takes all cores. Operations of torch
    take one core each inside, and wait for no other. The threads end with the call: a process forked later inherits
    none.

    Raises:
        Exception: that of the first value, in their order, for which `function` raises one.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(values), _MOST_THREADS)
    if workers < 2:
        return [function(value) for value in values]
    try:
        with ThreadPoolExecutor(workers, "images", torch.set_num_threads, (1,)) as pool:
            return list(pool.map(function, values))
    finally:
        torch.set_num_threads(threads)  # the number of this thread stayed, that for threads to come did not


class _Cost:
    """The memory that decoding an opened image takes at its height, by its size and mode.

    Args:
        image: opened, not yet decoded.
        turns: whether it must be turned upright, which takes a copy.
    """

    def __init__(self, image: Image.Image, turns: bool) -> None:
        self.stored = _STORED.get(image.mode, 4)
        self.beside = _BESIDE.get(image.format or "", 0)
        self.rgb = image.mode == "RGB" and "transparency" not in image.info
        self.grey = image.mode in ("L", *_SIXTEEN)
        self.turns = turns
        # libjpeg keeps all coefficients of a progressive JPEG, two bytes each, at whatever scale it decodes.
        progressive = image.info.get("progressive")
        self.fixed = image.width * image.height * 2 * len(getattr(image, "layer", "YCC")) if progressive else 0

    def bytes(self, size: tuple[int, int], factor: int = 1) -> float:
        """At this (width, height) of the file, and reduced by a factor before it becomes RGB (grey images alone)."""
        if factor > 1 and not self.grey:
            return float("inf")
        pixels = size[0] * size[1]
        decoding = self.stored + self.beside
        converting = self.stored if self.rgb else self.stored + (self.stored != 1) * self.grey + 4 / factor**2
        turning = 8 / factor**2 if self.turns else 0
        return self.fixed + pixels * max(decoding, converting, turning)


def _scale_jpeg(image: Any, wanted: tuple[int, int] | None, cost: _Cost | None, max_bytes: int) -> None:
    """Have a JPEG decoded at a half, a quarter or an eighth: where that leaves (height, width), or where it must be."""
    width, height = image.size
    scale = 1
    if wanted is not None:
        room = min(width // max(1, wanted[1]), height // max(1, wanted[0]))
        scale = next(each for each in (8, 4, 2, 1) if room >= each or each == 1)
    while scale < 8 and cost is not None and cost.bytes((-(-width // scale), -(-height // scale))) > max_bytes:
        scale *= 2
    if scale > 1:
        image.draft("RGB", (max(1, width // scale), max(1, height // scale)))


def _upright(image: Image.Image) -> Image.Image:
    method = _TRANSPOSE.get(orientation_of(image))
    if method is None:
        return image
    turned = image.transpose(method)
    # The tag goes, so that an image that passes here a second time is left alone.
    turned.info = {name: value for name, value in turned.info.items() if name not in ORIENTED}
    return turned


def _to_rgb(image: Image.Image, factor: int) -> Image.Image:
    transparent = "transparency" in image.info
    if image.mode == "RGB" and not transparent:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image, transparent = _to_grey(image), False
    if factor > 1:
        image = image.reduce(factor)
    if transparent or "A" in image.getbands() or "a" in image.getbands():
        return _over_white(image)
    return image.convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float images as 8-bit grey, white where they are transparent."""
    width, height = image.size
    out, clear = np.empty((height, width), np.uint8), image.info.get("transparency")
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        values = np.asarray(image.crop((0, top, width, min(height, top + rows))))
        out[top : top + rows] = eight_bits(values, whole=True)
        if isinstance(clear, int):
            out[top : top + rows][values == clear] = 255
    grey = Image.fromarray(out)
    grey.info = {name: value for name, value in image.info.items() if name in ORIENTED}
    return grey


def _over_white(image: Image.Image) -> Image.Image:
    out, (width, height) = Image.new("RGB", image.size), image.size
    out.info = {name: value for name, value in image.info.items() if name in ORIENTED}
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        part = image.crop((0, top, width, min(height, top + rows))).convert("RGBA")
        white = Image.new("RGBA", part.size, (255, 255, 255, 255))
        out.paste(Image.alpha_composite(white, part).convert("RGB"), (0, top))
    return out
