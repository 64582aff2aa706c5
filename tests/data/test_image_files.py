"""Files of images: which formats are opened, every form of a value, what is refused before it is decoded."""

import ast
import base64
import contextlib
import io
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from mllm_vision.data import BadImage, load_image
from mllm_vision.data.images.decoding import _Cost
from mllm_vision.data.images.files import FORMATS, first_image, image_source, images_of, open_image, orientation_of
from tests.tiny import image_bytes, random_image

ROOT = Path(__file__).parents[2]


def pixels(value, **options):
    return np.asarray(load_image(value, **options))


def test_every_opening_of_an_image_names_its_formats():
    """`Image.open` without `formats` tries all that Pillow knows, and EPS among them starts Ghostscript."""
    found = []
    for file in [f for folder in ("mllm_vision", "recipes", "scripts") for f in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "open":
                continue
            owner = node.func.value
            if isinstance(owner, ast.Name | ast.Attribute) and "Image" in (getattr(owner, "id", "") or owner.attr):
                found.append((file.name, "formats" in {word.arg for word in node.keywords}))
    assert ("files.py", True) in found and all(named for _, named in found), found


def test_no_format_outside_the_list_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **named: pytest.fail("gs was started"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(eps)
    icon, targa = io.BytesIO(), io.BytesIO()
    random_image(0, 32).save(icon, "ICO")
    random_image(0, 32).save(targa, "TGA")
    for value in (eps, tmp_path / "a.png", icon.getvalue(), targa.getvalue()):
        with pytest.raises(BadImage, match=r"cannot be decoded: it is not one of JPEG, PNG"):
            load_image(value)
    for name in FORMATS:
        stream = io.BytesIO()
        random_image(0, 32).save(stream, name)
        assert load_image(stream.getvalue()).size == (32, 32), name


def test_every_form_of_a_value_is_the_same_image(tmp_path):
    data = image_bytes(random_image(1, (20, 12)), "PNG")
    (tmp_path / "a b#1.png").write_bytes(data)
    (tmp_path / "c.jpg").write_bytes(data)
    text = base64.b64encode(data).decode()
    forms = [
        *(data, bytearray(data), memoryview(data), tmp_path / "c.jpg", str(tmp_path / "c.jpg"), text),
        (tmp_path / "a b#1.png").as_uri(),
        f"data:image/png;base64,{text}",
        f"DATA:image/png;BASE64,{text[:40]}\n{text[40:]}",
        {"bytes": data, "path": "elsewhere.png"},
        {"path": str(tmp_path / "c.jpg")},
        {"bytes": None, "path": f"file://{tmp_path}/c.jpg"},
        {"url": f"data:image/png;base64,{text}"},
        {"image_url": {"url": f"data:image/png;base64,{text}"}},
        np.asarray(load_image(data)),
    ]
    expected = pixels(data)
    for form in forms:
        assert np.array_equal(pixels(form), expected), str(form)[:60]


@pytest.mark.parametrize(
    "value, message, reason",
    [
        ("https://example.org/a.png", "is an address.*download", "the image is an address"),
        ("data:image/png;base64,@@@@", "not valid Base64", "the data URI is broken"),
        ("data:image/png;base64", "no comma", "the data URI is broken"),
        ("data:image/png;base64,", "no bytes", "the image is empty"),
        ("   ", "missing", "the image is missing"),
        (float("nan"), "missing", "the image is missing"),
        ({"path": None}, "missing", "the image is missing"),
        ({}, "missing", "the image is missing"),
        ("/", "is a folder", "the image does not exist"),
        ("a\0b", "does not exist", "the image does not exist"),
        (7, "int is not an image", "the value is not an image"),
        (np.zeros((2, 3, 24, 24)), "shape", "the value is not an image"),
        (np.zeros((0, 4), np.uint8), "shape", "the value is not an image"),
        (np.zeros((4, 4), np.int64), "int64 has no known range", "integers of an unknown range"),
        (np.full((4, 4), 200.0), "0 is black and 1 is white", "floats of an unknown range"),
        (np.full((4, 4), np.nan), "rescale", "floats of an unknown range"),
        (Image.fromarray(np.full((4, 4), 70_000, np.int32)), "32-bit integers", "integers of an unknown range"),
        (b"x" * 400, "one of JPEG", "the image cannot be decoded"),
        ("n" * 5000, "image 'nnn", "the image cannot be decoded"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused_in_words(value, message, reason):
    with pytest.raises(BadImage, match=message) as caught:
        load_image(value)
    assert caught.value.reason == reason and len(str(caught.value)) < 600


def test_one_image_of_a_list():
    image = random_image(0, 8)
    assert first_image([None, image, None]) is image and first_image(image) is image
    assert images_of([None, "", image, {"bytes": None, "path": ""}]) == [image]
    for empty in ([], [None], None, "", {"bytes": None, "path": None}):
        with pytest.raises(BadImage, match="no image"):
            first_image(empty)


def test_many_bits_are_scaled_by_the_mode_and_not_by_the_largest_value():
    dark = np.linspace(0, 250, 64).reshape(8, 8)
    for values in (dark.astype(np.uint16), dark.astype(np.int32)):
        assert pixels(Image.fromarray(values)).max() == 1  # of 65535; never taken for 8 bits
    grey = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    expected = np.rint(grey / 257).astype(np.uint8)
    for kind in ("PNG", "TIFF", "JPEG2000"):
        stream = io.BytesIO()
        Image.fromarray(grey).save(stream, kind)
        assert np.array_equal(pixels(stream.getvalue())[..., 1], expected), kind
    pgm = b"P5 8 8 65535\n" + grey.astype(">u2").tobytes()
    assert np.array_equal(pixels(pgm)[..., 0], expected)
    for share in (0.25, 1.0, 1.2):
        floats = np.full((8, 8), share, np.float32)
        assert pixels(Image.fromarray(floats))[0, 0, 0] == pixels(floats)[0, 0, 0] == round(min(share, 1.0) * 255)
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(stream, "TIFF")
    assert pixels(stream.getvalue())[0, 0, 0] == 128
    for shape in ((8, 8), (8, 8, 1), (8, 8, 3)):
        assert pixels(np.full(shape, 32768, np.uint16))[0, 0, 2] == 128
        assert pixels(np.ones(shape, np.bool_))[0, 0, 2] == 255
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, "PNG", transparency=int(grey[3, 3]))
    assert pixels(stream.getvalue())[3, 3, 0] == 255 and pixels(stream.getvalue())[3, 4, 0] == expected[3, 4]


def test_animations_and_stereo_give_their_first_frame():
    first, second = random_image(0, 16).convert("L"), random_image(1, 16).convert("L")
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("MPO", {})):
        stream = io.BytesIO()
        first.convert("RGB" if kind in ("MPO", "WEBP") else "L").save(
            stream, kind, save_all=True, append_images=[second], **options
        )
        far = abs(pixels(stream.getvalue())[..., 0].astype(int) - np.asarray(first)).mean()
        assert far < (12 if kind == "MPO" else 1), (kind, far)
    stream = io.BytesIO()
    random_image(0, 64).save(stream, "MPO", save_all=True, append_images=[random_image(1, 64)])
    assert load_image(stream.getvalue(), draft=(16, 16)).size == (16, 16)  # scaled while decoded, as any JPEG


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_is_as_pillow_turns_it(kind):
    for turned in range(9):
        exif = Image.Exif()
        exif[0x010F], exif[0x0112], exif[0x8298] = "maker " * 40, turned, "someone"
        stream = io.BytesIO()
        random_image(turned, (24, 16)).save(stream, kind, exif=exif)
        ours = load_image(stream.getvalue())
        assert np.array_equal(np.asarray(ours), np.asarray(ImageOps.exif_transpose(Image.open(stream)))), turned
        assert np.array_equal(np.asarray(load_image(ours)), np.asarray(ours))  # once


def test_orientation_of_other_blocks():
    image = random_image(0, 8)
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    image.info["exif"] = b"Exif\0\0MM\0\x2a" + struct.pack(">IH", 8, 1) + entry + b"\0\0\0\0"
    assert orientation_of(image) == 6
    for broken in (b"", b"II", b"MM\0\x2a\0\0", b"II\x2a\0\xff\xff\xff\x7f", image.info["exif"][:-10], b"garbage" * 9):
        image.info["exif"] = broken
        assert orientation_of(image) == 1
    image.info = {"xmp": b'<rdf tiff:Orientation="3"/>'}
    assert orientation_of(image) == 3


def overlapping(fields: int, size: int) -> bytes:
    """A little TIFF directory whose fields all claim the same `size` bytes."""
    table = b"".join(struct.pack("<HHII", 0x9000 + i, 7, size, 8) for i in range(fields))
    body = b"II\x2a\0" + struct.pack("<IH", 8, fields) + table + b"\0\0\0\0"
    return body + b"\0" * max(0, size + 8 - len(body))


def test_metadata_that_multiply_are_refused_before_they_are_read():
    small = io.BytesIO()
    random_image(0, 16).save(small, "JPEG")
    block = b"Exif\0\0" + overlapping(4000, 60_000)
    head = small.getvalue()[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    began = time.process_time()
    for data in (head + small.getvalue()[2:], overlapping(4000, 60_000)):
        with pytest.raises(BadImage, match="claim 240") as caught:
            load_image(data)
        assert caught.value.reason == "broken image metadata"
    assert time.process_time() - began < 1
    few = b"Exif\0\0" + overlapping(4, 40_000)  # a camera's wrong offsets are no reason to lose an image
    fine = small.getvalue()[:2] + b"\xff\xe1" + struct.pack(">H", len(few) + 2) + few + small.getvalue()[2:]
    assert np.array_equal(pixels(fine), pixels(small.getvalue()))


def test_a_hundred_progressive_scans_are_refused():
    stream = io.BytesIO()
    random_image(0, 64).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    assert load_image(data).size == (64, 64)
    scan = data.index(b"\xff\xda")
    with pytest.raises(BadImage, match="progressive JPEG of more than 100 scans"):
        load_image(data[:scan] + data[scan:-2] * 101 + data[-2:])


def test_the_limit_counts_bytes_and_large_images_are_reduced_where_that_can_be():
    image = random_image(3, (96, 64))
    cost = 96 * 64 * 4
    assert load_image(image_bytes(image, "PNG"), max_bytes=cost).size == (96, 64)
    assert load_image(image_bytes(image, "JPEG"), max_bytes=cost // 3).size == (48, 32)  # at a half
    assert load_image(image_bytes(image.convert("L"), "PNG"), max_bytes=cost).size == (48, 32)
    sixteen = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    reduced = load_image(image_bytes(sixteen, "PNG"), max_bytes=96 * 64 * 4)
    assert reduced.size == (48, 32)
    assert np.array_equal(np.asarray(reduced)[..., 0], np.asarray(image.convert("L").reduce(2)))
    for mode, kind in (("RGB", "PNG"), ("RGBA", "PNG"), ("P", "GIF"), ("1", "PNG"), ("RGB", "WEBP"), ("LA", "PNG")):
        data = image_bytes(image.convert(mode), kind)
        with pytest.raises(BadImage, match="above the limit of .* shrink it") as caught:
            load_image(data, max_bytes=cost - 1)
        assert caught.value.reason == "the image is too large"
    progressive = io.BytesIO()
    image.save(progressive, "JPEG", progressive=True)  # its coefficients are kept at whatever scale
    with pytest.raises(BadImage, match="above the limit"):
        load_image(progressive.getvalue(), max_bytes=cost)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    image.save(turned, "PNG", exif=exif)
    opened = open_image(turned.getvalue())
    assert _Cost(opened, True).bytes(opened.size) == 2 * cost


def test_an_opened_image_of_the_user_is_left_as_it_is():
    opened = Image.open(io.BytesIO(image_bytes(random_image(0, 64), "JPEG")))
    assert load_image(opened, draft=(8, 8)).size == (64, 64) and opened.size == (64, 64)


def test_a_file_of_an_image_is_not_kept_open(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(image_bytes(random_image(0, 8), "PNG"))
    assert isinstance(image_source(str(path)), Path)
    image = open_image(path)
    image.load()
    assert image.fp is None or image.fp.closed


def test_no_file_stays_open(tmp_path):
    """Pillow keeps the file of an image with several frames, and of one that cannot be decoded."""
    import gc
    import warnings

    frames = [random_image(seed, 24) for seed in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "cut.png").write_bytes(image_bytes(random_image(0, 64))[:200])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ResourceWarning)
        for name in ("moving.gif", "cut.png"):
            with contextlib.suppress(ValueError):
                load_image(tmp_path / name)
            gc.collect()
    assert not [str(each.message) for each in told if each.category is ResourceWarning]
