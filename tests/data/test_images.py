"""Decoding and transforming: against the stock image processors, and every broken image of the list."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import image_bytes, random_image, tiny_image_processor

from mllm_vision.data.images.transforms import BadImage, ImageTransform, load_image


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """White noise, half of it saturated: the hardest image to resize alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[: height // 2] = np.where(pixels[: height // 2] < 128, 0, 255)
    return Image.fromarray(pixels)


def processors() -> dict:
    import transformers as t

    odd = {"height": 40, "width": 56}
    return {
        "clip": tiny_image_processor("clip", 64),
        "siglip": tiny_image_processor("siglip", 64),
        "vit (bilinear)": tiny_image_processor("vit", 64),
        "dinov2": t.BitImageProcessor(
            size={"shortest_edge": 73},
            crop_size={"height": 64, "width": 64},
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        "clip, odd crop": t.CLIPImageProcessor(size={"shortest_edge": 61}, crop_size={"height": 47, "width": 33}),
        "siglip, not square": t.SiglipImageProcessor(size=odd),
        "vit, no rescale": t.ViTImageProcessor(
            size=odd, do_rescale=False, image_mean=[127.0] * 3, image_std=[50.0] * 3
        ),
        "vit, no normalise": t.ViTImageProcessor(size=odd, do_normalize=False),
        "lanczos": t.ViTImageProcessor(size=odd, resample=1),
        "convnext": t.ConvNextImageProcessor(size={"shortest_edge": 56}),
        "convnext, large": t.ConvNextImageProcessor(size={"shortest_edge": 384}),
        "efficientnet": t.EfficientNetImageProcessor(size={"height": 64, "width": 64}),
        "efficientnet, offset": t.EfficientNetImageProcessor(
            size={"height": 64, "width": 64}, rescale_offset=True, include_top=False
        ),
    }


@pytest.fixture(scope="module")
def stock() -> dict:
    return processors()


@pytest.mark.parametrize("name", list(processors()))
def test_evaluation_equals_the_processor_within_one_grey_level(stock, name):
    processor = stock[name]
    transform = ImageTransform(processor)
    assert transform.native, "these settings must not fall back on the processor itself"
    sizes = [(64, 64), (73, 91), (200, 150), (97, 211), (30, 45), (1, 1), (3, 90), (90, 3), (640, 120), (64, 64)]
    images = [noise(*size, seed=number) for number, size in enumerate(sizes)]
    ours = transform(images)
    theirs = processor(images=images, return_tensors="pt")["pixel_values"]
    assert ours.shape == theirs.shape == (len(images), 3, *transform.size)
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    level = torch.tensor(transform._steps.multiply).view(1, 3, 1, 1)
    difference = ((ours - theirs) / level).abs()
    assert difference.max() <= 1.01, f"{difference.amax((1, 2, 3))}"


def test_real_photographs_equal_the_processor(data_dir):
    import pyarrow.parquet as pq

    table = pq.read_table(data_dir / "flickr8k_test.parquet", columns=["image"])[:24]
    images = [load_image(row) for row in table.column("image").to_pylist()]
    for kind in ("clip", "siglip", "vit"):
        processor = tiny_image_processor(kind, 96)
        transform = ImageTransform(processor)
        ours = transform([image_bytes(image) for image in images])  # encoded bytes go in as well as images
        theirs = processor(images=images, return_tensors="pt")["pixel_values"]
        assert ((ours - theirs) * 255 * 0.3).abs().max() <= 1.01  # 0.3: above every deviation used here


def test_a_panorama_30_000_pixels_wide(stock):
    wide = random_image(1, (30_000, 20))
    processor = stock["clip"]
    start = time.perf_counter()
    ours = ImageTransform(processor)([image_bytes(wide, "JPEG")])
    assert time.perf_counter() - start < 10
    theirs = processor(images=[load_image(image_bytes(wide, "JPEG"))], return_tensors="pt")["pixel_values"]
    assert ((ours - theirs) * 255 * 0.3).abs().max() <= 1.01
    # One pixel high, it would be resized to 1.9 million x 64: only what the crop keeps is made.
    strip = ImageTransform(processor)([random_image(2, (30_000, 2)).crop((0, 0, 30_000, 1))])
    assert strip.shape == (1, 3, 64, 64) and torch.isfinite(strip).all()
    assert ImageTransform(processor, train=True)([wide], keys=[3]).shape == (1, 3, 64, 64)


def test_a_decompression_bomb_is_refused_unread():
    # A PNG header that claims 60,000 x 60,000 pixels.
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"x")) + chunk(b"IEND", b"")
    with pytest.raises(BadImage, match=r"3600000000 pixels|decompression bomb"):
        load_image(bomb)
    with pytest.raises(BadImage, match=r"32x32 = 1024 pixels of mode RGB: .* above the limit of 0.000954"):
        load_image(random_image(), max_bytes=1000)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "1", "LA", "RGBA", "PA", "I;16", "I", "F", "YCbCr", "HSV", "LAB"])
def test_every_mode_becomes_rgb(mode):
    source = Image.new("RGB", (20, 10), (128, 128, 128))
    if mode == "I;16":
        image = Image.fromarray(np.full((10, 20), 128 * 257, dtype=np.uint16))
    elif mode == "I":
        image = Image.fromarray(np.full((10, 20), 128 * 257, dtype=np.int32))
    elif mode == "F":
        image = Image.fromarray(np.full((10, 20), 128 / 255, dtype=np.float32))
    elif mode == "1":
        image = Image.new("1", (20, 10), 1)
    elif mode == "PA":
        image = source.convert("P").convert("PA")
    elif mode == "LAB":
        image = Image.new("LAB", (20, 10), (128, 128, 128))
    else:
        image = source.convert(mode)
    out = load_image(image)
    assert out.mode == "RGB" and out.size == (20, 10)
    centre = np.asarray(out)[5, 10].astype(int)
    expected = 255 if mode == "1" else 128
    assert abs(centre - expected).max() <= (30 if mode in ("LAB", "P", "PA") else 3)  # web palette


def test_formats_through_their_files(tmp_path):
    for mode, kind in (("L", "JPEG"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("P", "PNG"), ("P", "GIF"), ("I;16", "PNG")):
        path = tmp_path / f"{mode.replace(';', '')}.{kind.lower()}"
        random_image(3, (40, 24), mode).save(path, kind)
        expected = np.asarray(random_image(3, (40, 24), "L" if mode in ("L", "I;16") else "RGB").convert("RGB"))
        for value in (path, str(path), path.read_bytes(), {"bytes": path.read_bytes(), "path": None}):
            out = np.asarray(load_image(value)).astype(int)
            assert out.shape == (24, 40, 3)
            assert abs(out - expected).mean() < 20, (mode, kind)  # palette and JPEG lose a little


def test_transparency_lies_over_white_as_in_the_processor(stock):
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[:, 32:, 3] = 128
    image = Image.fromarray(pixels, "RGBA")
    ours = np.asarray(load_image(image)).astype(int)
    assert (ours[:, :32] == 255).all() and abs(ours[:, 32:] - 127).max() <= 1
    theirs = stock["siglip"](images=[image], return_tensors="pt")["pixel_values"]
    assert (ImageTransform(stock["siglip"])([image]) - theirs).abs().max() < 1.01 / 127
    paletted = Image.new("RGB", (8, 8), (0, 0, 0)).convert("P")
    stream = io.BytesIO()
    paletted.save(stream, "PNG", transparency=paletted.getpixel((0, 0)))
    assert (np.asarray(load_image(stream.getvalue())) == 255).all()


def test_exif_orientation_is_applied_once():
    image = random_image(5, (30, 20))
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: display it rotated clockwise
    image.save(stream, "PNG", exif=exif)
    out = load_image(stream.getvalue())
    assert out.size == (20, 30)
    assert np.array_equal(np.asarray(out), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))
    assert load_image(out).size == (20, 30)


def test_broken_images_say_what_is_wrong(tmp_path):
    good = image_bytes(random_image(0, 64), "JPEG")
    png = image_bytes(random_image(0, 64), "PNG")
    cases = {
        "cannot be decoded": [good[: len(good) // 2], png[: len(png) // 2], b"not an image", png[:40] + b"\0" * 40],
        "has no bytes": [b"", {"bytes": b"", "path": None}],
        "missing": [None, {"bytes": None, "path": None}],
        "does not exist": [str(tmp_path / "none.jpg"), {"bytes": None, "path": str(tmp_path / "none.jpg")}],
        "is not an image": [3.5, [1, 2]],
    }
    for message, values in cases.items():
        for value in values:
            with pytest.raises(BadImage, match=message):
                load_image(value)
    corrupt = bytearray(png)
    corrupt[len(png) // 2 : len(png) // 2 + 40] = b"\xff" * 40
    with pytest.raises(BadImage):
        load_image(bytes(corrupt))


@pytest.mark.parametrize("name", ["clip", "vit (bilinear)"])
def test_threads_change_no_value(stock, name):
    """Images are decoded and resized on all threads of torch; what a thread does for itself stays with it."""
    images = [image_bytes(noise(90 + 7 * seed, 130, seed), "JPEG") for seed in range(9)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            transform, crops = ImageTransform(stock[name]), ImageTransform(stock[name], train=True)
            pixels = transform.pixels([load_image(image) for image in images])
            found.append([transform(images), transform.normalise(pixels), crops(images, keys=list(range(9)))])
            with pytest.raises(BadImage, match="cannot be decoded"):
                transform([*images, images[0][:200], b"no image"])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))
    assert torch.equal(found[0][0], found[0][1])


def test_training_crops_depend_on_keys_alone(stock):
    images = [random_image(number, (80, 60)) for number in range(6)]
    transform = ImageTransform(stock["clip"], train=True, scale=(0.5, 0.9))
    keys = [11, 22, 33, 44, 55, 66]
    whole = transform(images, keys=keys)
    assert torch.equal(whole, transform(images, keys=keys))
    assert torch.equal(whole[2:4], transform(images[2:4], keys=keys[2:4])), "independent of the batch"
    assert not torch.equal(whole, transform(images, keys=[key + 1 for key in keys]))
    by_generator = [
        ImageTransform(stock["clip"], train=True, generator=torch.Generator().manual_seed(s))(images) for s in (1, 1, 2)
    ]
    assert torch.equal(by_generator[0], by_generator[1]) and not torch.equal(by_generator[0], by_generator[2])


def test_training_crop_areas_and_aspects(stock):
    transform = ImageTransform(stock["clip"], train=True, scale=(0.3, 0.6), ratio=(0.8, 1.25))
    boxes = np.asarray([transform._random_box((200, 100), key) for key in range(500)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share, aspect = width * height / 20_000, width / height
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 200).all() and (boxes[:, 3] <= 100).all()
    assert 0.29 < share.min() < 0.32 and aspect.min() > 0.78 and aspect.max() < 1.28
    assert len({tuple(box) for box in boxes}) > 450
    full = ImageTransform(stock["clip"], train=True, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert full._random_box((64, 64), 5) == (0, 0, 64, 64)
    image = noise(64, 64)
    assert torch.equal(full([image], keys=[1]), ImageTransform(stock["clip"])([image]))


def test_other_processors_are_called_themselves(stock):
    import transformers

    class Inverting(transformers.ViTImageProcessorPil):
        def rescale(self, image, scale, **kwargs):
            return 1.0 - super().rescale(image, scale, **kwargs)

    processor = Inverting(size={"height": 32, "width": 32})
    transform = ImageTransform(processor)
    assert not transform.native and transform.size == (32, 32)
    images = [random_image(number, (50, 40)) for number in range(3)]
    assert torch.equal(transform(images), processor(images=images, return_tensors="pt")["pixel_values"])
    assert ImageTransform(processor, train=True)(images, keys=[1, 2, 3]).shape == (3, 3, 32, 32)
    with pytest.raises(ValueError, match=r"image_size=48 cannot be applied to Inverting"):
        ImageTransform(processor, image_size=48)
    small = transformers.CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 32, "width": 32})
    padded = ImageTransform(small)  # the processor pads with black here
    assert not padded.native
    assert torch.equal(padded(images), small(images=images, return_tensors="pt")["pixel_values"])
    patches = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    with pytest.raises(ValueError, match=r"not \[B, 3, H, W\]"):
        ImageTransform(patches)


def test_another_image_size(stock):
    for name in ("clip", "siglip", "dinov2", "convnext"):
        transform = ImageTransform(stock[name], image_size=96)
        assert transform.size == (96, 96)
        assert transform([noise(120, 100)]).shape == (1, 3, 96, 96)
    import transformers

    larger = transformers.CLIPImageProcessor(size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96})
    image = noise(120, 100)
    assert torch.equal(ImageTransform(stock["clip"], image_size=96)([image]), ImageTransform(larger)([image]))


def test_settings_and_calls_that_cannot_work(stock):
    processor = stock["clip"]
    for options, message in (
        ({"scale": (0.0, 1.0)}, "scale="),
        ({"scale": (0.9, 0.5)}, "scale="),
        ({"ratio": (2.0, 1.0)}, "ratio="),
        ({"image_size": 0}, "image_size=0"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageTransform(processor, **options)
    with pytest.raises(ValueError, match="not an image processor"):
        ImageTransform(None)
    transform = ImageTransform(processor)
    with pytest.raises(ValueError, match="images is empty"):
        transform([])
    with pytest.raises(ValueError, match="wrap it in a list"):
        transform(random_image())
    with pytest.raises(ValueError, match="2 keys for 1 images"):
        transform([random_image()], keys=[1, 2])


def test_large_jpegs_are_decoded_small_in_training_only(stock):
    data = image_bytes(random_image(1, (640, 480)), "JPEG")
    assert ImageTransform(stock["clip"]).load(data).size == (640, 480)
    assert ImageTransform(stock["clip"], train=True).load(data).size == (320, 240)  # at least twice 64
    fast = ImageTransform(stock["clip"], exact=False)
    assert fast.load(data).size == (320, 240)
    exact = ImageTransform(stock["clip"])([data])
    assert (fast([data]) - exact).abs().mean() < 0.05


def crop_in_full(transform: ImageTransform, data: bytes, key: int) -> torch.Tensor:
    """The same share of the image, cut from a full decode with Pillow; `[3, H, W]` in grey levels."""
    small, full = transform.load(data, key), load_image(data)
    box = np.asarray(transform._random_box(small.size, key)) * (full.width / small.width)
    pixels = np.array(full.resize(transform.size[::-1], Image.Resampling.BICUBIC, box=tuple(box)))
    return torch.from_numpy(pixels).permute(2, 0, 1).float()


def test_the_crop_decides_how_small_a_jpeg_is_decoded(stock):
    """Never so small that the crop would have to be enlarged, and close to a full decode."""
    image = image_bytes(random_image(1, (640, 480)), "JPEG")
    for scale, expected in (((0.9, 1.0), {(160, 120)}), ((0.01, 1.0), {(640, 480), (320, 240), (160, 120)})):
        transform = ImageTransform(stock["clip"], train=True, scale=scale)
        seen = set()
        for key in range(60):
            loaded = transform.load(image, key)
            left, top, right, bottom = transform._random_box(loaded.size, key)
            # at the full scale a crop may be smaller than the target; a pixel of it is lost to rounding
            assert loaded.size == (640, 480) or (right - left >= 63 and bottom - top >= 63)
            seen.add(loaded.size)
        assert seen == expected
    transform = ImageTransform(stock["clip"], train=True)
    level = torch.tensor(transform._steps.multiply).view(3, 1, 1)
    offset = torch.tensor(transform._steps.add).view(3, 1, 1)
    for key in range(4):
        ours = (transform([image], keys=[key])[0] - offset) / level
        assert (ours - crop_in_full(transform, image, key)).abs().mean() < 2.0
    png = image_bytes(random_image(1, (640, 480)), "PNG")
    assert transform.load(png, 0).size == (640, 480)


def test_a_jpeg_on_its_side_is_decoded_small_the_right_way_round(stock):
    image, exif, stream = random_image(5, (640, 140)), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    image.save(stream, "JPEG", exif=exif)
    data = stream.getvalue()
    upright = load_image(data)
    assert upright.size == (140, 640)
    asked = []
    half = load_image(data, draft=lambda width, height: asked.append((width, height)) or (320, 70))
    assert asked == [(140, 640)] and half.size == (70, 320)
    assert load_image(data, draft=(320, 71)).size == (140, 640)
    transform = ImageTransform(stock["clip"], train=True)
    level = torch.tensor(transform._steps.multiply).view(3, 1, 1)
    offset = torch.tensor(transform._steps.add).view(3, 1, 1)
    ours = (transform([data], keys=[1])[0] - offset) / level
    assert (ours - crop_in_full(transform, data, 1)).abs().mean() < 2.0
