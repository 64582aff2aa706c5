"""Views as the usual stack of per-image transforms makes them: Pillow image by image, then a normalised tensor.

What torchvision's transforms do on Pillow images (`RandomResizedCrop`, `ColorJitter` through `ImageEnhance` and an
8-bit HSV, `RandomGrayscale`, Pillow's own `GaussianBlur`, `solarize`, `ToTensor`, `Normalize`), without torchvision.
The rival of scripts/benchmark/views.py, and what tests/data/test_views.py compares pixels with.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

_ENHANCE = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass
class PilView:
    """The parameters of one view; `box` is (left, top, right, bottom), `order` holds 0..3 as in `ViewParameters`."""

    box: tuple[int, int, int, int]
    flip: bool = False
    order: Sequence[int] = (0, 1, 2, 3)
    factors: Sequence[float] = (1.0, 1.0, 1.0, 0.0)
    gray: bool = False
    gray_first: bool = False
    sigma: float = 0.0
    solarize: bool = False

    def apply(self, image: Image.Image, size: tuple[int, int], resample: str) -> Image.Image:
        """The view as a Pillow image of `size` (height, width)."""
        image = image.crop(self.box).resize(size[::-1], Image.Resampling[resample.upper()])
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.gray and self.gray_first:
            image = _gray(image)
        for operation in self.order:
            factor = self.factors[operation]
            if operation == 3:
                image = _turned(image, factor) if factor else image
            elif factor != 1.0:
                image = _ENHANCE[operation](image).enhance(factor)
        if self.gray and not self.gray_first:
            image = _gray(image)
        if self.sigma > 0:
            image = image.filter(ImageFilter.GaussianBlur(self.sigma))
        return ImageOps.solarize(image, 128) if self.solarize else image


def draw_simclr(size: tuple[int, int], rng: random.Random, strength: float = 0.5) -> PilView:
    """SimCLR's parameters for an image of `size` (width, height)."""
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = rng.randint(0, width - w), rng.randint(0, height - h)
    view = PilView((left, top, left + w, top + h), flip=rng.random() < 0.5)
    if rng.random() < 0.8:
        view.order = rng.sample(range(4), 4)
        view.factors = [rng.uniform(1 - 0.8 * strength, 1 + 0.8 * strength) for _ in range(3)]
        view.factors.append(rng.uniform(-0.2 * strength, 0.2 * strength))
    view.gray = rng.random() < 0.2
    view.sigma = rng.uniform(0.1, 2.0) if rng.random() < 0.5 else 0.0
    return view


def to_tensor(image: Image.Image, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """`[3, H, W]` float32, normalised with mean and deviation `[3, 1, 1]`."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255).sub_(mean).div_(std)


def _gray(image: Image.Image) -> Image.Image:
    return Image.merge("RGB", [image.convert("L")] * 3)


def _turned(image: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(int(turn * 255) & 255)  # 8-bit numbers wrap around, as angles do
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")
