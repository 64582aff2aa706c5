"""What is done to an image for one of its views, and the drawing of it: parameters a row, from keys alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mllm_vision.functional.precision import wide_dtype
from mllm_vision.functional.random import uniform

_TRIES = 10  # crops drawn until one fits, as torchvision and the papers' code do
MAX_VIEWS = 1000  # the random streams that views have, one each


@dataclass(frozen=True)
class View:
    """How the parameters of one view are distributed.

    Attributes:
        scale: share of the image's area that the crop keeps, uniform between the two.
        ratio: width over height of the crop, log-uniform between the two.
        flip: probability of a horizontal flip.
        jitter: strengths of brightness, contrast, saturation (factors uniform in [max(0, 1 - s), 1 + s]) and hue
            (uniform in [-s, s] of a full turn, at most 0.5); applied in random order.
        jitter_probability: of all four together.
        gray: probability of losing the colours.
        gray_first: grey before the jitter (MoCo v1), otherwise after it.
        blur: probability of a Gaussian blur.
        sigma: its standard deviation in pixels, uniform between the two.
        solarize: probability of inverting all values from 128 on.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_probability: float = 0.8
    gray: float = 0.0
    gray_first: bool = False
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0

    def __post_init__(self) -> None:
        if not (len(self.scale) == 2 and 0.0 < self.scale[0] <= self.scale[1] <= 1.0):
            raise ValueError(f"crop_scale={tuple(self.scale)} must be 0 < low <= high <= 1, shares of the area")
        if not (len(self.ratio) == 2 and 0.0 < self.ratio[0] <= self.ratio[1]):
            raise ValueError(f"crop_ratio={tuple(self.ratio)} must be 0 < low <= high, width over height")
        if not (len(self.sigma) == 2 and 0.0 < self.sigma[0] <= self.sigma[1]):
            raise ValueError(f"blur_sigma={tuple(self.sigma)} must be 0 < low <= high, in pixels")
        for name in ("flip", "jitter_probability", "gray", "blur", "solarize"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} is not a probability; use a number from 0 to 1")
        if len(self.jitter) != 4 or min(self.jitter) < 0.0:
            raise ValueError(f"jitter={tuple(self.jitter)} must be four strengths: brightness contrast saturation hue")
        if self.jitter[3] > 0.5:
            raise ValueError(
                f"a hue strength of {self.jitter[3]} is more than half the colour circle; 0.5 reaches every colour"
            )


@dataclass
class ViewParameters:
    """What to do to each of R views; a tensor a field, its first dimension R.

    Attributes:
        top, left, height, width: the crop in whole pixels, int64.
        flip, gray, gray_first, solarize: bool.
        order: `[R, 4]` int64, which of brightness (0), contrast (1), saturation (2) and hue (3) comes when.
        factors: `[R, 4]` float32, of brightness, contrast, saturation and hue: (1, 1, 1, 0) changes nothing.
        sigma: of the blur, in pixels, float32; 0 for none.
    """

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor
    order: Tensor
    factors: Tensor
    gray: Tensor
    gray_first: Tensor
    sigma: Tensor
    solarize: Tensor

    def __len__(self) -> int:
        return self.top.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> ViewParameters:
        return ViewParameters(*(getattr(self, field.name)[rows] for field in fields(self)))

    @staticmethod
    def interleave(views: list[ViewParameters]) -> ViewParameters:
        """V views of B images as B x V rows: all views of the first image, then those of the second."""
        columns = ([getattr(view, field.name) for view in views] for field in fields(ViewParameters))
        return ViewParameters(*(torch.stack(column, dim=1).flatten(0, 1) for column in columns))


def draw_view(view: View, number: int, seeds: Tensor, sizes: Tensor) -> ViewParameters:
    """The parameters of view `number` of B images, a function of each image's seed and size alone.

    Args:
        view: the distribution.
        number: which view of the image this is; every view has random numbers of its own.
        seeds: `[B]` int64.
        sizes: `[B, 2]` int64, height and width.

    Raises:
        ValueError: a view number beyond the streams that views have.
    """
    if not 0 <= number < MAX_VIEWS:
        raise ValueError(f"view {number} is beyond the {MAX_VIEWS} views that an image can have")

    # In float64, so that the rounding of a crop to whole pixels does not depend on the device's arithmetic (where the
    # device has it: MPS does not).
    wide = wide_dtype(seeds)
    drawn = uniform(seeds, number, 2 * _TRIES + 16).to(wide)
    shapes, places, strengths, order, single = drawn.split([2 * _TRIES, 2, 4, 4, 6], dim=1)
    flipped, jittered, grayed, blurred, width_of_blur, solarized = single.unbind(1)
    top, left, height, width = _crops(view, sizes.to(wide), shapes, places)
    reach = torch.tensor(view.jitter, dtype=wide, device=seeds.device)
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=wide, device=seeds.device)
    low = torch.maximum(neutral - reach, torch.cat([torch.zeros_like(reach[:3]), -reach[3:]]))
    factors = low + (neutral + reach - low) * strengths
    gray = grayed < view.gray
    return ViewParameters(
        top=top,
        left=left,
        height=height,
        width=width,
        flip=flipped < view.flip,
        order=order.argsort(dim=1),
        factors=torch.where((jittered < view.jitter_probability)[:, None], factors, neutral).float(),
        gray=gray,
        gray_first=torch.full_like(gray, view.gray_first),
        sigma=torch.where(blurred < view.blur, _between(*view.sigma, width_of_blur), 0.0).float(),
        solarize=solarized < view.solarize,
    )


def _crops(view: View, sizes: Tensor, shapes: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height and width `[B]` of random resized crops: the first of ten draws that fits."""
    tall, wide = sizes[:, :1], sizes[:, 1:]
    area = tall * wide * _between(*view.scale, shapes[:, :_TRIES])
    ratio = _between(math.log(view.ratio[0]), math.log(view.ratio[1]), shapes[:, _TRIES:]).exp()
    heights, widths = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (heights > 0) & (heights <= tall) & (widths > 0) & (widths <= wide)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    # None fits (a panorama): the largest crop at the centre within the aspect ratios.
    tall, wide = tall[:, 0], wide[:, 0]
    widest = torch.minimum(wide, (tall * view.ratio[1]).round()).clamp_min(1)
    tallest = torch.minimum(tall, (wide / view.ratio[0]).round()).clamp_min(1)
    height = torch.where(found, heights.gather(1, first)[:, 0], tallest)
    width = torch.where(found, widths.gather(1, first)[:, 0], widest)
    top = torch.where(found, (places[:, 0] * (tall - height + 1)).floor(), ((tall - height) / 2).floor())
    left = torch.where(found, (places[:, 1] * (wide - width + 1)).floor(), ((wide - width) / 2).floor())
    return top.long(), left.long(), height.long(), width.long()


def _between(low: float, high: float, share: Tensor) -> Tensor:
    return low + (high - low) * share
