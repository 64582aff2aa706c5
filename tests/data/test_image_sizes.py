"""Sizes from headers are those of the decoded images: of every format, orientation and scale."""

from __future__ import annotations

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile
from tiny import image_bytes, random_image

from mllm_vision.data.images import decoding
from mllm_vision.data.images.decoding import image_size, load_image
from mllm_vision.data.images.files import FORMATS, BadImage

XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


def same(value, **options):
    width, height = load_image(value, **options).size
    assert image_size(value, **options) == (height, width)
    return height, width


def exif(turned):
    block = Image.Exif()
    block[0x0112] = turned
    return block


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_every_format_and_orientation(kind):
    turns = range(9) if kind in ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF") else [0]
    for turned in turns:
        stream = io.BytesIO()
        random_image(turned, (24, 16)).save(stream, kind, **({"exif": exif(turned)} if turned else {}))
        assert same(stream.getvalue()) == ((24, 16) if turned >= 5 else (16, 24))


def png_with(late, chunk):
    """A PNG with a chunk in front of its pixels, or behind them."""
    data = image_bytes(random_image(0, (24, 16)), "PNG")
    place = len(data) - 12 if late else data.index(b"IDAT") - 4
    kind, body = chunk
    whole = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data[:place] + whole + data[place:]


@pytest.mark.parametrize("late", [False, True])
def test_blocks_of_a_png_before_and_behind_its_pixels(late, monkeypatch):
    block = exif(6).tobytes()[6:]
    said = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n%8d\n%s\n" % (len(block), block.hex().encode()))
    text = b"XML:com.adobe.xmp\0\0\0\0\0" + XMP % 6
    for chunk in ((b"eXIf", block), (b"zTXt", said), (b"iTXt", text)):
        assert same(png_with(late, chunk)) == (24, 16), chunk[0]
    plain = png_with(late, (b"tEXt", b"date:create\0today"))
    assert same(plain) == (16, 24)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("no pixels are needed"))
    assert image_size(plain) == (16, 24)


def test_a_tiff_with_two_orientations():
    for tag, xmp, compression in itertools.product((None, 1, 3, 6, 8), (None, 1, 3, 6), (None, "tiff_lzw")):
        tags = {} if xmp is None else {700: XMP % xmp}
        if tag is not None:
            tags[0x0112] = tag
        stream = io.BytesIO()
        random_image(0, (24, 16)).save(stream, "TIFF", tiffinfo=tags, compression=compression)
        same(stream.getvalue())


def test_images_that_are_decoded_at_a_smaller_scale():
    image = random_image(1, (97, 63))
    turned = io.BytesIO()
    image.save(turned, "JPEG", exif=exif(6))
    for limit in (97 * 63 * 4, 97 * 63 * 2, 97 * 63):
        assert same(image_bytes(image, "JPEG"), max_bytes=limit)[1] <= 97
        same(turned.getvalue(), max_bytes=limit)
        same(image_bytes(image.convert("L"), "PNG"), max_bytes=limit * 2)
    assert same(image_bytes(image, "JPEG"), max_bytes=97 * 63 * 2)[1] == 49
    with pytest.raises(BadImage, match="above the limit"):
        image_size(image_bytes(image, "PNG"), max_bytes=97 * 63)


def test_values_of_every_form_and_what_is_not_an_image(tmp_path):
    data = image_bytes(random_image(1, (20, 12)), "JPEG")
    file = tmp_path / "a.jpg"
    file.write_bytes(data)
    for value in (data, str(file), file, {"bytes": data, "path": "x"}, {"bytes": None, "path": str(file)}):
        assert same(value) == (12, 20)
    opened = Image.open(file)
    assert same(opened) == same(np.zeros((12, 20, 3), np.uint8)) == (12, 20)
    broken = data[:-20]  # a whole header: refused when it is decoded, not before
    assert image_size(broken) == (12, 20)
    with pytest.raises(BadImage, match="truncated"):
        load_image(broken)
    for value, message in ((data[:20], "cannot be decoded"), (None, "missing"), (tmp_path / "b.jpg", "does not exist")):
        with pytest.raises(BadImage, match=message):
            image_size(value)


def test_no_pixels_are_decoded(monkeypatch):
    data = {kind: image_bytes(random_image(1, (20, 12)), kind) for kind in FORMATS}
    monkeypatch.setattr(decoding, "_to_rgb", lambda *_: pytest.fail("no pixels are needed"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("no pixels are needed"))
    assert {image_size(value) for value in data.values()} == {(12, 20)}
