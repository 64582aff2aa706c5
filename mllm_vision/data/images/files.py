"""Opening: a value of an image column becomes an opened, undecoded PIL image of a format on one list, or a `BadImage`.

Every file of a user is opened here. Excluded are formats that start another program (EPS calls Ghostscript), that
contain an image of another size than declared (ICO) or that are rare, and metadata that need far more memory than
their bytes.
"""

from __future__ import annotations

import base64
import binascii
import functools
import os
import re
import struct
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np
from PIL import Image, UnidentifiedImageError

from mllm_vision.data.records.sampling import BadRow

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")  # MPO comes with JPEG
_BASE64 = re.compile(r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR)[\w+/]{80}")  # how JPEG, PNG, GIF and WebP begin
ORIENTED = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # where the orientation may stand
_LATE = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # of the texts in a PNG
_FIELD_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_ORIENTATION = 0x0112
_SLACK = 2**20  # bytes that metadata may claim beyond what there is: cameras write wrong offsets
_JPEG = b"\xff\xd8\xff"
_MAX_JPEG = 2**28  # bytes of a file
_MAX_SCANS = 100  # of a progressive JPEG; encoders write about ten, and each one costs a pass over the image


class BadImage(BadRow):
    """An image that cannot be decoded: corrupt, truncated, empty, missing or beyond the size limit."""

    def __init__(self, message: str, reason: str = "the image cannot be decoded") -> None:
        super().__init__(message)
        self.reason = reason


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has; AVIF came with 11.3."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def first_image(value: Any) -> Any:
    """The image of a cell that holds one image, or a list of them of which the first one is meant; nulls do not count.

    Raises:
        BadImage: there is none.
    """
    found = images_of(value)
    if not found:
        raise BadImage("the row has no image", "the image is missing")
    return found[0]


def images_of(value: Any) -> list[Any]:
    """The images of a cell of an image column: one, several in a list (nulls do not count), or none."""
    return [each for each in (value if isinstance(value, list | tuple) else [value]) if not is_missing(each)]


def is_missing(value: Any) -> bool:
    """Whether a value is a missing image: None, blank text, NaN, or {"bytes", "path"} with neither."""
    if isinstance(value, dict):
        return value.get("bytes") is None and all(is_missing(value.get(name)) for name in ("path", "url", "image_url"))
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and value != value)


def describe(value: Any) -> str:
    """A short description of a value, for messages."""
    if isinstance(value, str | Path):
        return f"image {str(value)[:200]!r}"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"image of {len(value)} bytes"
    if isinstance(value, dict):
        data = value.get("bytes")
        size = f" ({len(data)} bytes)" if isinstance(data, bytes | bytearray | memoryview | str) else ""
        where = next((value[name] for name in ("path", "url", "image_url") if value.get(name) is not None), None)
        return f"image {str(where)[:200]!r}{size}" if where is not None else f"image{size or ' of no bytes'}"
    if isinstance(value, Image.Image):
        return f"{value.mode} image {str(getattr(value, 'filename', '') or '')[:200]!r}"
    if isinstance(value, np.ndarray):
        return f"array {list(value.shape)} of {value.dtype}"
    return f"image of type {type(value).__name__}"


def image_source(value: Any) -> bytes | Path | Image.Image | np.ndarray:
    """Where the image of a value comes from: its encoded bytes, a path, or the decoded image that it is.

    Args:
        value: a PIL image, an array, encoded bytes; a path, a `file://` address, a data URI or Base64 text; or a dict
            with "bytes" and "path" (as `datasets.Image(decode=False)` gives) or "url" (as OpenAI's messages have it).

    Raises:
        BadImage: for a missing value, a web address, and anything that is not an image.
    """
    if is_missing(value):
        raise BadImage("the image is missing (null)", "the image is missing")
    if isinstance(value, dict):
        value = next(value[name] for name in ("bytes", "path", "url", "image_url") if value.get(name) is not None)
        if isinstance(value, dict):  # {"image_url": {"url": ...}}
            value = value.get("url")
    if isinstance(value, bytes | bytearray | memoryview):
        if len(value) == 0:
            raise BadImage("the image has no bytes", "the image is empty")
        return bytes(value)
    if isinstance(value, os.PathLike):
        return Path(value)
    if isinstance(value, str):
        return _of_text(value)
    if isinstance(value, Image.Image | np.ndarray):
        return value
    raise BadImage(
        f"{type(value).__name__} is not an image: expected a PIL image, a path, bytes or {{'bytes', 'path'}}",
        "the value is not an image",
    )


def is_path(text: str) -> bool:
    """Whether a text in an image column is a path, and not an address or the image itself."""
    return not re.match(r"(?i)(data:|[a-z][a-z0-9+.-]*://)", text) and not _BASE64.match(text)


def _of_text(text: str) -> bytes | Path:
    if is_path(text):
        return Path(text)
    if _BASE64.match(text):
        return _from_base64(text, text)
    scheme = text.split(":", 1)[0].lower()
    if scheme == "data":
        head, comma, body = text.partition(",")
        if not comma:
            raise BadImage(f"data URI {text[:60]!r} has no comma before its data", "the data URI is broken")
        found = _from_base64(body, text) if head.lower().endswith(";base64") else unquote_to_bytes(body)
        if not found:
            raise BadImage("the image has no bytes", "the image is empty")
        return found
    if scheme == "file":
        return Path(unquote(urlsplit(text).path))
    raise BadImage(
        f"image {text[:200]!r} is an address; nothing is fetched while training: download it and give its path",
        "the image is an address",
    )


def _from_base64(body: str, text: str) -> bytes:
    try:
        return base64.b64decode(re.sub(r"\s", "", unquote(body)).encode("ascii"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadImage(f"image {text[:60]!r} is not valid Base64: {error}", "the data URI is broken") from None


def open_image(value: Any) -> Image.Image:
    """The image of a value, opened and not yet decoded; a PIL image is itself.

    Raises:
        BadImage: see `image_source`; for a file that is not there, another format than those of `FORMATS`, and
            metadata that would take far more memory than the file.
    """
    source = image_source(value)
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Path):
        if not source.is_file():
            what = f"image {str(source)[:300]!r}"
            kind = "is a folder" if source.is_dir() else f"does not exist (folder: {Path.cwd()})"
            raise BadImage(f"{what} {kind}", "the image does not exist")
        with source.open("rb") as file:
            jpeg = file.read(3) == _JPEG
            file.seek(0)
            if jpeg or os.fstat(file.fileno()).st_size <= _MAX_JPEG:
                source = file.read(_MAX_JPEG + 1)  # all of it is needed anyway, and Pillow leaves files open
            else:
                wrong = _wrong_metadata(file)
    if isinstance(source, bytes):
        wrong = _wrong_jpeg(source) if source[:3] == _JPEG else _wrong_metadata(BytesIO(source))
    if wrong is not None:
        raise BadImage(f"{describe(value)} {wrong[0]}", wrong[1])
    try:
        return Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=known_formats())
    except UnidentifiedImageError:
        raise BadImage(
            f"{describe(value)} cannot be decoded: it is not one of {', '.join(FORMATS)}, or damaged from the start"
        ) from None


def _from_array(array: np.ndarray) -> Image.Image:
    """`[H, W]` or `[H, W, 1 to 4]`: uint8, uint16 (65535 is white), bool, or floats from 0 to 1."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and not 1 <= array.shape[2] <= 4) or 0 in array.shape:
        raise BadImage(
            f"an array of shape {list(array.shape)} is not an image: expected [H, W] or [H, W, C] with 1 to 4 channels",
            "the value is not an image",
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8:
        array = eight_bits(array)
    return Image.fromarray(np.ascontiguousarray(array))


def eight_bits(values: np.ndarray, *, whole: bool = False) -> np.ndarray:
    """Values as uint8 by their type alone: bool, 16 bits (65535 is white), floats (1.0 is white).

    Args:
        values: any shape.
        whole: 32-bit integers too, on the 16-bit scale, as Pillow gives 16-bit files that have no mode of their own.

    Raises:
        BadImage: integers of an unknown range, floats far from 0 to 1 or not finite.
    """
    kind = values.dtype
    if kind == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if kind.kind == "f":
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
        if not -0.5 <= low <= high <= 1.5:  # some overshoot of a resize is clipped; False for NaN, too
            raise BadImage(
                f"an image of floats has values from {low:.4g} to {high:.4g}: 0 is black and 1 is white; rescale it",
                "floats of an unknown range",
            )
        return np.clip(np.rint(values.astype(np.float32) * 255.0), 0, 255).astype(np.uint8)
    if whole and kind.kind in "iu" and values.size and (int(values.min()) < 0 or int(values.max()) > 65535):
        raise BadImage(
            f"an image of 32-bit integers has values from {values.min()} to {values.max()}: integers are read up to "
            "65535 (white); rescale it to 8 or 16 bits",
            "integers of an unknown range",
        )
    if not whole and kind != np.uint16:
        raise BadImage(
            f"an array of {kind} has no known range: pass uint8 (0 to 255), uint16 (0 to 65535) or floats (0 to 1)",
            "integers of an unknown range",
        )
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


# -- metadata -----------------------------------------------------------------------------------------------------


def orientation_of(image: Image.Image) -> int:
    """The orientation of an opened image: 1 upright, 2 to 4 mirrored or upside down, 5 to 8 on a side.

    Read from the EXIF block's first directory alone. (Pillow's `getexif` reads every field; one may point at the whole
    block, and so may five thousand.) A TIFF is turned by Pillow itself.
    """
    info = image.info
    if not any(name in info for name in ORIENTED):
        return 1
    exif = info.get("exif")
    if exif is None and "Raw profile type exif" in info:  # of a PNG by ImageMagick: three lines, then hexadecimal
        try:
            exif = bytes.fromhex("".join(str(info["Raw profile type exif"]).split("\n")[3:]))
        except ValueError:
            exif = None
    if isinstance(exif, bytes):
        for tag, _, _, value in _directory(BytesIO(_bare(exif))):
            if tag == _ORIENTATION:
                return value if 1 <= value <= 8 else 1
    xmp = next((info[name] for name in ("xmp", "XML:com.adobe.xmp") if info.get(name)), b"")
    found = re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp if isinstance(xmp, bytes) else str(xmp).encode())
    return int(found[1]) if found else 1


def late_orientation(image: Image.Image) -> bool:
    """Whether the orientation of an opened image may only be known when its pixels are decoded: it is in a chunk of a
    PNG behind them, or a TIFF has two that may contradict each other."""
    if image.format == "TIFF":
        return "xmp" in image.info
    file = getattr(image, "fp", None)
    if image.format != "PNG" or file is None:
        return False
    place, pixels, found = file.tell(), False, False
    file.seek(8)
    while not found and len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        end = file.tell() + length + 4  # its checksum is behind it
        found = pixels and (kind == b"eXIf" or (kind[1:] in (b"EXt", b"TXt") and file.read(24).startswith(_LATE)))
        pixels |= kind == b"IDAT"
        file.seek(end)
    file.seek(place)
    return found


def _bare(exif: bytes) -> bytes:
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    return exif


def _directory(file: BinaryIO) -> Iterator[tuple[int, int, int, int]]:
    """(tag, bytes of its value, their offset or 0, the value if it is one small number) of the first directory."""
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 8:
        return
    big = struct.unpack_from(order + "H", head, 2)[0] == 43
    if big and len(head) < 16:
        return
    file.seek(struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)[0])
    count, entry = (order + "Q", order + "HHQQ") if big else (order + "H", order + "HHII")
    data = file.read(struct.calcsize(count))
    if len(data) < struct.calcsize(count):
        return
    size, inline = struct.calcsize(entry), 8 if big else 4
    table = file.read(min(struct.unpack(count, data)[0], 65536) * size)
    for start in range(0, len(table) - size + 1, size):
        tag, kind, number, where = struct.unpack_from(entry, table, start)
        length = number * _FIELD_BYTES.get(kind, 1)
        small = {1: "B", 3: "H", 4: "I"}.get(kind) if number == 1 else None
        value = struct.unpack_from(order + small, table, start + size - inline)[0] if small else 0
        yield tag, length, where if length > inline else 0, value


def _wrong_metadata(file: BinaryIO) -> tuple[str, str] | None:
    """(what, reason) of an empty file, or of a TIFF whose fields claim more bytes than there are: they overlap, and
    each of them is read."""
    head = file.read(4)
    if not head:
        return "is empty (0 bytes)", "the image is empty"
    return _wrong_directory(file) if head[:2] in (b"II", b"MM") else None


def _wrong_jpeg(data: bytes) -> tuple[str, str] | None:
    """(what, reason) of a JPEG that takes far more memory or time to open and decode than it is large: EXIF and MPF
    as of a TIFF; a hundred progressive scans, each of which is a pass over the whole image."""
    if len(data) > _MAX_JPEG:
        return f"is a JPEG of more than {_MAX_JPEG >> 20} MiB", "the image is too large"
    exif, wrong, progressive = b"", None, False
    for marker, segment in _jpeg_segments(data):
        progressive |= marker == 0xC2
        if segment.startswith(b"Exif\0\0"):
            exif += segment[6:]  # as Pillow joins them
        elif segment.startswith(b"MPF\0"):
            wrong = wrong or _wrong_directory(BytesIO(segment[4:]))
    # FF is stuffed inside of coded data, so that a marker is one anywhere.
    if progressive and data.count(b"\xff\xda") > _MAX_SCANS:
        return f"is a progressive JPEG of more than {_MAX_SCANS} scans", "the image is too large"
    return wrong or (_wrong_directory(BytesIO(_bare(exif))) if exif else None)


def _wrong_directory(file: BinaryIO) -> tuple[str, str] | None:
    there = file.seek(0, os.SEEK_END)
    file.seek(0)
    claimed = sum(min(length, max(0, there - where)) for _, length, where, _ in _directory(file) if where)
    if claimed <= there + _SLACK:
        return None
    return f"has metadata that claim {claimed} bytes of {there}", "broken image metadata"


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, data) of the segments before the first scan."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] not in (0xDA, 0xD9):
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        yield marker, data[position + 4 : position + 2 + length] if marker in (0xE1, 0xE2) else b""
        position += 2 + max(2, length)
