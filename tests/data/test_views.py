"""Views: parameters as the papers say, pixels as Pillow's, and a function of each image's seed alone."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import random_image

from mllm_vision.data import ImageCollator, ViewArguments, ViewMaker
from mllm_vision.data.views import pixels as vp
from mllm_vision.data.views.draws import MAX_VIEWS, View, ViewParameters, draw_view
from mllm_vision.data.views.views import POLICIES, ViewPolicy

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # pixel values stay 0..255
FOLDER = str(Path(__file__).resolve().parents[2] / "scripts" / "benchmark")


@pytest.fixture(scope="module")
def scripts():
    """The benchmark's files; the usual per-image transforms are the reference here."""
    sys.path.insert(0, FOLDER)
    names = ("timing", "pil_views", "views")
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(FOLDER)
        for name in names:
            sys.modules.pop(name, None)


def photograph(seed: int, size: tuple[int, int]) -> Image.Image:
    """An image of `size` (width, height) with large shapes, fine texture and saturated colours."""
    coarse = random_image(seed, 6).resize(size, Image.Resampling.BICUBIC)
    noise = np.random.default_rng(seed).normal(0, 12, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(coarse, dtype=float) + noise, 0, 255).astype(np.uint8))


def batch_of(images: list[Image.Image], first: int = 0) -> dict[str, torch.Tensor]:
    return ImageCollator()([{"image": image, "key": 17 * i + first} for i, image in enumerate(images)])


# -- pixels against Pillow ------------------------------------------------------------------------------------------


def parameters(**given) -> ViewParameters:
    """One view that changes nothing but what is given."""
    plain = {
        **{"top": 0, "left": 0, "height": 40, "width": 48, "flip": False, "order": [0, 1, 2, 3]},
        **{"factors": [1.0, 1.0, 1.0, 0.0], "gray": False, "gray_first": False, "sigma": 0.0, "solarize": False},
    }
    return ViewParameters(**{name: torch.tensor([value]) for name, value in {**plain, **given}.items()})


# parameters, then the largest mean and highest difference allowed, in grey levels
CASES = {
    "upscaled": ({"top": 3, "left": 5, "height": 20, "width": 15}, 0.1, 2),
    "downscaled and flipped": ({"height": 40, "width": 44, "left": 4, "flip": True}, 0.1, 2),
    "brightness": ({"factors": [1.37, 1.0, 1.0, 0.0]}, 0.6, 3),
    "contrast": ({"factors": [1.0, 0.62, 1.0, 0.0]}, 0.8, 2),
    "saturation": ({"factors": [1.0, 1.0, 1.4, 0.0]}, 0.8, 3),
    "hue": ({"factors": [1.0, 1.0, 1.0, 0.2]}, 1.5, 13),  # Pillow's HSV has 8 bits
    "hue backwards": ({"factors": [1.0, 1.0, 1.0, -0.45]}, 1.5, 13),
    "jitter, one order": ({"factors": [1.3, 0.7, 1.2, 0.0], "order": [2, 0, 3, 1]}, 1.5, 5),
    "jitter, the other": ({"factors": [1.3, 0.7, 1.2, 0.0], "order": [1, 3, 0, 2]}, 1.5, 5),
    "grey": ({"gray": True}, 0.6, 1.5),
    "grey first": ({"gray": True, "gray_first": True, "factors": [0.7, 1.2, 1.3, 0.1]}, 1.2, 3),
    "solarize": ({"solarize": True}, 0.1, 2),
    "solarize after the blur": ({"solarize": True, "sigma": 1.5}, 1.5, 5),
    "blur": ({"sigma": 1.5}, 1.0, 5),  # Pillow's is three box blurs
    "slight blur": ({"sigma": 0.5}, 1.5, 9),
}


def compare(scripts, case: dict, size: tuple[int, int], resample: str) -> np.ndarray:
    """Differences from the per-image transforms in grey levels, `[h, w, 3]`."""
    image, p = photograph(3, (48, 40)), parameters(**case)
    values = vp.make_views(
        batch_of([image])["pixels"], p, size, multiply=torch.ones(3), add=torch.zeros(3), resample=resample
    )
    left, top = int(p.left), int(p.top)
    fixed = {name: value for name, value in case.items() if name not in ("top", "left", "height", "width")}
    box = (left, top, left + int(p.width), top + int(p.height))
    expected = np.asarray(scripts["pil_views"].PilView(box, **fixed).apply(image, size, resample), dtype=float)
    found = values[0, 0].permute(1, 2, 0).numpy()
    if case.get("solarize"):  # a value at the threshold may fall on either side
        unsure = np.abs(found - 127.5) < 1.6
        return np.where(unsure, 0.0, found - expected)
    return found - expected


# size of the views, and the side up to which there is no call for every row; the images have 48 x 40
WAYS = {"by products": ((32, 32), 48), "by row": ((32, 32), 40), "by row, in groups": ((64, 56), 48)}


@pytest.mark.parametrize(("size", "dense"), WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", CASES)
def test_pixels_agree_with_pillow(
    scripts, name: str, size: tuple[int, int], dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vp, "_DENSE_SIDE", dense)
    case, mean, highest = CASES[name]
    for resample in ("bilinear", "bicubic") if "scaled" in name else ("bilinear",):
        difference = np.abs(compare(scripts, case, size, resample))
        assert difference.mean() <= mean and difference.max() <= highest, f"{difference.mean()} {difference.max()}"


def test_the_comparison_can_fail(scripts) -> None:
    wrong = {**CASES["jitter, one order"][0], "factors": [1.3, 0.8, 1.2, 0.0]}
    right = compare(scripts, CASES["jitter, one order"][0], (32, 32), "bilinear")
    image, p = photograph(3, (48, 40)), parameters(**wrong)
    values = vp.make_views(batch_of([image])["pixels"], p, (32, 32), multiply=torch.ones(3), add=torch.zeros(3))
    reference = scripts["pil_views"].PilView((0, 0, 48, 40), **CASES["jitter, one order"][0])
    expected = np.asarray(reference.apply(image, (32, 32), "bilinear"), dtype=float)
    assert np.abs(values[0, 0].permute(1, 2, 0).numpy() - expected).mean() > 2 * np.abs(right).mean()


def test_hue_keeps_saturation_and_value() -> None:
    """Against `colorsys`, which goes through HSV; full turns of every colour of the circle, and grey."""
    import colorsys

    colours = torch.cat([torch.rand(40, 3), torch.eye(3), 1 - torch.eye(3), torch.full((1, 3), 0.4)]) * 255
    turns = torch.linspace(-0.5, 0.5, len(colours))
    found = vp.shift_hue(colours[:, :, None, None].clone(), turns)[:, :, 0, 0] / 255
    for colour, turn, given in zip((colours / 255).tolist(), turns.tolist(), found.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*colour)
        assert given == pytest.approx(colorsys.hsv_to_rgb((hue + turn) % 1.0, saturation, value), abs=1e-5)


def test_blur_is_gaussian() -> None:
    """A point becomes a Gaussian of that deviation; a row without blur is untouched."""
    values = torch.zeros(2, 3, 33, 33)
    values[:, :, 16, 16] = 1.0
    made = vp.blur(values.clone(), torch.tensor([1.3, 0.0]))
    offsets = torch.arange(33) - 16.0
    assert torch.equal(made[1], values[1])
    assert float(made[0, 0].sum()) == pytest.approx(1.0, abs=1e-5)
    variance = float((made[0, 0].sum(0) * offsets**2).sum())
    assert variance == pytest.approx(1.3**2, rel=0.02)
    flat = vp.blur(torch.full((1, 3, 5, 7), 9.0), torch.tensor([2.0]))  # smaller than the kernel; edges go on
    assert torch.allclose(flat, torch.full_like(flat, 9.0), atol=1e-4)


def test_the_kernel_of_simclr_and_byol_is_a_tenth_of_the_side() -> None:
    """3 pixels at 32 and 9 at 96, however wide the deviation; the others' goes on to three deviations."""
    cases = (("simclr", 32, 1), ("byol", 32, 1), ("simclr", 96, 4), ("byol", 96, 4), ("moco_v2", 32, 6))
    flags = {"crop_scale": [1.0, 1.0], "jitter_strength": 0.0, "flip": 0.0, "gray": 0.0, "blur": 1.0, "solarize": 0.0}
    for name, size, reach in cases:
        image = Image.new("RGB", (size, size))
        image.putpixel((size // 2, size // 2), (255, 255, 255))
        maker = ViewMaker(name, size, **PLAIN, arguments=ViewArguments(**flags, blur_sigma=[2.0, 2.0]))
        for view in maker(batch_of([image]))["views"][0]:
            lit = (view[0] > 1e-3).nonzero()
            assert (lit.amax(0) - lit.amin(0)).tolist() == [2 * reach] * 2


@pytest.mark.parametrize("resample", vp.RESAMPLES)
def test_both_ways_to_crop_agree(resample: str) -> None:
    pixels = torch.from_numpy(np.stack([np.asarray(photograph(i, (60, 50))) for i in range(4)])).permute(0, 3, 1, 2)
    seeds, sizes = torch.arange(4), torch.tensor([[50, 60], [50, 60], [30, 41], [17, 60]])
    p = ViewParameters.interleave([draw_view(View(scale=(0.1, 1.0)), n, seeds, sizes) for n in range(5)])
    by_row = vp.crop_by_row(pixels, torch.arange(20) // 5, p, (24, 40), resample)
    by_products = vp.crop_by_products(pixels, p, (24, 40), resample)
    off = (by_row - by_products).abs()
    assert float(off.max()) <= 2.0 and float((off > 1).float().mean()) < 1e-3 and float((off > 0).float().mean()) < 0.05


# -- the maker ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("simclr", 32), ("byol", 32), ("dino", 64)])
def test_a_view_depends_on_its_seed_alone(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the batch, its order, its padding, the chunk or the rank, nor on any generator."""
    images = [photograph(i, (48, 40)) for i in range(9)]
    maker, batch = ViewMaker(name, size, **PLAIN, patch_size=8), batch_of(images)
    state = torch.get_rng_state()
    whole = maker(batch)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    order = torch.randperm(9)
    shuffled = maker({column: values[order] for column, values in batch.items()})
    # As ranks and chunks see it: rows 0, 3, 6, ... in one batch, the others in two more.
    parts = [maker({column: values[rank::3] for column, values in batch.items()}) for rank in range(3)]
    for name in ("_SMALL_ELEMENTS", "_LARGE_ELEMENTS", "_CACHED_ELEMENTS"):
        monkeypatch.setattr(vp, name, 1)  # image by image
    single = maker({**batch, "pixels": torch.nn.functional.pad(batch["pixels"], (0, 0, 0, 6))})
    for column in maker.columns:
        assert torch.equal(shuffled[column], whole[column][order])
        for rank in range(3):
            assert torch.allclose(parts[rank][column], whole[column][rank::3], atol=1e-3)
        off = (single[column] - whole[column]).abs()
        assert float((off > 1e-3).float().mean()) < 1e-3  # other shapes of the products: a level here and there
    other = maker({**batch, "seeds": batch["seeds"] + 1})["views"]
    assert float((other - whole["views"]).abs().flatten(1).mean(1).min()) > 1.0


@pytest.mark.parametrize("size", [32, 64])
def test_views_do_not_depend_on_what_surrounds_the_call(size: int) -> None:
    """The memory format and place of the pixels, autocast; and they can be learnt from."""
    maker, batch = ViewMaker("byol", size, **PLAIN), batch_of([photograph(i, (48, 40)) for i in range(6)])
    whole = maker(batch)["views"]
    assert not whole.is_inference()
    first = maker({**batch, "pixels": batch["pixels"].contiguous()})["views"]
    last = maker({column: values[4:] for column, values in batch.items()})["views"]  # a part of a larger memory
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = maker(batch)["views"]
    assert torch.equal(first, whole) and torch.equal(cast, whole) and torch.allclose(last, whole[4:], atol=1e-3)
    layer = torch.nn.Conv2d(3, 1, 3)
    layer(whole.flatten(0, 1)).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", ["byol", "moco_v1"])
def test_the_way_without_a_cpu_gives_the_same(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, every change is computed for all rows, and nothing asks the device which rows it is for."""
    # no image is resized: large ones are resized in 8 bits on a CPU, to a level in a few pixels of a hundred
    whole = ViewArguments(crop_scale=[1.0, 1.0]) if size > 48 else None
    maker = ViewMaker(name, size, **PLAIN, arguments=whole)
    batch = batch_of([photograph(i, (size, size) if whole else (40, 36)) for i in range(12)])
    expected = maker(batch)["views"]
    monkeypatch.setattr(vp, "_on_cpu", lambda values: False)
    assert torch.allclose(maker(batch)["views"], expected, atol=1e-3)


def test_columns_and_normalisation() -> None:
    image = Image.new("RGB", (20, 20), (51, 102, 204))
    batch = {**batch_of([image]), "labels": torch.tensor([3])}
    made = ViewMaker("mae", 8, (0.5, 0.4, 0.3), (0.1, 0.2, 0.4))(batch)
    assert set(made) == {"views", "seeds", "index", "labels"} and made["views"].shape == (1, 1, 3, 8, 8)
    expected = torch.tensor([(0.2 - 0.5) / 0.1, (0.4 - 0.4) / 0.2, (0.8 - 0.3) / 0.4])
    assert torch.allclose(made["views"][0, 0].mean(dim=(1, 2)), expected, atol=1e-4)
    assert ViewMaker("mae", 8, **PLAIN)({"x": 1}) == {"x": 1}
    assert ViewMaker("simclr", (16, 24), **PLAIN)(batch)["views"].shape == (1, 2, 3, 16, 24)


@pytest.mark.parametrize("size", [32, 64])
def test_blurred_and_inverted_views_are_normalised_like_any_other(size: int) -> None:
    """Both are done on normalised values; a channel's mean and deviation must not show."""
    batch, mean, std = batch_of([photograph(i, (48, 40)) for i in range(6)]), (0.5, 0.4, 0.3), (0.1, 0.2, 0.4)
    flags = ViewArguments(blur=0.7, solarize=0.5)
    plain = ViewMaker("byol", size, **PLAIN, arguments=flags)(batch)["views"]
    made = ViewMaker("byol", size, mean, std, arguments=flags)(batch)["views"]
    expected = (plain / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(made, expected, atol=1e-4)


def test_flags() -> None:
    flags = ViewArguments(crop_scale=[0.5, 0.6], flip=0.0, jitter_strength=1.0, blur=0.0, gray=1.0, solarize=1.0)
    maker = ViewMaker("simclr", 32, **PLAIN, arguments=flags)
    for view in maker.policy.views:
        assert view.jitter == (0.8, 0.8, 0.8, 0.2) and view.scale == (0.5, 0.6)
        assert (view.flip, view.blur, view.gray, view.solarize) == (0.0, 0.0, 1.0, 1.0)
    made = maker(batch_of([photograph(0, (32, 32))]))["views"]
    assert torch.allclose(made[:, :, 0], made[:, :, 2], atol=1e-3)  # grey
    flags = ViewArguments(views="dino", local_views=3, local_size=16, local_scale=[0.1, 0.2], blur_sigma=[0.2, 0.4])
    maker = ViewMaker("simclr", 32, **PLAIN, arguments=flags, patch_size=4)
    assert (maker.name, maker.policy.local.scale, maker.policy.local.sigma) == ("dino", (0.1, 0.2), (0.2, 0.4))
    assert maker(batch_of([photograph(0, (32, 32))]))["local_views"].shape == (1, 3, 3, 16, 16)
    assert ViewMaker("dino", 32, **PLAIN, arguments=ViewArguments(local_views=0)).columns == ("views",)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"views": "simlcr"}, "nearest known one is 'simclr'"),
        ({"crop_scale": [0.0, 1.0]}, "crop_scale"),
        ({"crop_scale": [0.5]}, "crop_scale"),
        ({"jitter_strength": -1.0}, "jitter_strength=-1.0"),
        ({"jitter_strength": 3.0}, "hue strength of 0.6"),
        ({"blur": 1.5}, "blur=1.5 is not a probability"),
        ({"blur_sigma": [2.0, 1.0]}, "blur_sigma"),
        ({"local_size": 16}, "has no local crops"),
        ({"views": "dino", "local_size": 13}, "local_size=13 is not a multiple of patch_size=4; use 12"),
        ({"views": "dino", "local_views": -1}, "local_views=-1"),
    ],
)
def test_refused_flags(flags: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ViewMaker("simclr", 32, **PLAIN, arguments=ViewArguments(**flags), patch_size=4)


def test_refused_batches_and_policies() -> None:
    maker, batch = ViewMaker("byol", 16, **PLAIN), batch_of([photograph(0, (20, 20))])
    with pytest.raises(ValueError, match="no sizes and seeds"):
        maker({"pixels": batch["pixels"]})
    with pytest.raises(ValueError, match="uint8"):
        maker({**batch, "pixels": batch["pixels"].float()})
    with pytest.raises(ValueError, match="image_size=0"):
        ViewMaker("byol", 0, **PLAIN)
    with pytest.raises(ValueError, match="std above 0"):
        ViewMaker("byol", 16, (0.5,) * 3, (0.0,) * 3)
    with pytest.raises(ValueError, match="resample of bilinear, bicubic"):
        ViewMaker(replace(POLICIES["byol"], resample="nearest"), 16, **PLAIN)
    with pytest.raises(ValueError, match=f"beyond the {MAX_VIEWS} views"):
        draw_view(View(), MAX_VIEWS, batch["seeds"], batch["sizes"])
    own = ViewPolicy((View(), View(flip=0.0), View(gray=1.0)), "three views")
    assert ViewMaker(own, 16, **PLAIN)(batch)["views"].shape == (1, 3, 3, 16, 16)


def test_the_benchmark(scripts, data_dir, tmp_path, capsys) -> None:
    where = tmp_path / "views.json"
    scripts["views"].main(["--data", str(data_dir), "--count", "4", "--rounds", "2", "--json", str(where)])
    figures = json.loads(where.read_text())["views"]
    assert [each["size"] for each in figures] == sorted(each["size"] for each in figures)
    assert all(each["views_per_second"] > 0 for each in figures) and "against PIL" in capsys.readouterr().out
