"""Images: decoding whatever users bring, and turning it into the pixel values an encoder was saved with.

`ImageTransform` gives what the saved transformers image processor gives, within one grey level, several times
faster: it works on 8-bit pixels up to the very end, on all threads that torch has.
"""

from __future__ import annotations

import logging
import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mllm_vision.data.images.decoding import BadImage, in_threads, load_image

__all__ = ["BadImage", "ImageTransform", "load_image"]

logger = logging.getLogger(__name__)

_HUGE = 2**26  # pixels of a resized image, beyond which only the cropped part is made
_TORCH_MODES = {int(Image.Resampling.BILINEAR): "bilinear", int(Image.Resampling.BICUBIC): "bicubic"}


@dataclass(frozen=True)
class _Plan:
    """What a processor does, reduced to geometry and one multiplication and addition a channel."""

    height: int
    width: int
    shortest: int | None  # resize the shorter side to this, then crop the centre; None: resize to `resize`
    resize: tuple[int, int]
    resample: int
    multiply: tuple[float, ...]
    add: tuple[float, ...]


class ImageTransform:
    """Images to `[B, 3, H, W]` float32 pixel values, as the saved image processor would give them.

    Args:
        processor: a transformers image processor (or a processor that holds one).
        train: a random crop (area in `scale`, aspect in `ratio`) is resized to the full size instead.
        scale: the share of the image's area that a training crop keeps.
        ratio: the aspect ratios of training crops.
        image_size: overrides the processor's size: a side, or (height, width).
        exact: in evaluation, agree with the processor within one grey level. False: two to three times faster on
            photographs with a bicubic processor; sharp edges may differ by more (training crops always run so).

    Evaluation equals `processor(images)` within one grey level for processors that resize the shorter side and
    crop the centre, or resize to an exact size (CLIP, SigLIP, ViT, DINOv2, BiT, ConvNeXT, EfficientNet
    settings); any other processor is called itself (`native` is False then).

    Training crops are drawn from `keys` (one integer an image), so that they depend on seed, epoch and index
    and not on worker processes; without keys they are drawn from `generator`, or torch's global generator.

    Attributes: `size` (H, W), `num_channels` (3), `mean` and `std` (of pixels in 0..1), `train`, `native`.
    """

    num_channels = 3

    def __init__(
        self,
        processor: Any,
        *,
        train: bool = False,
        scale: tuple[float, float] = (0.9, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        image_size: int | tuple[int, int] | None = None,
        exact: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        processor = getattr(processor, "image_processor", processor)
        if processor is None or not callable(processor):
            raise ValueError(f"processor={processor!r} is not an image processor; pass one from AutoImageProcessor")
        if not 0.0 < scale[0] <= scale[1] <= 1.0:
            raise ValueError(f"scale={tuple(scale)} must be 0 < low <= high <= 1, shares of the image's area")
        if not 0.0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio={tuple(ratio)} must be 0 < low <= high, width over height")
        self.processor, self.train, self.exact, self.generator = processor, train, exact, generator
        self.scale, self.ratio = (float(scale[0]), float(scale[1])), (float(ratio[0]), float(ratio[1]))
        self.mean = tuple(_triple(getattr(processor, "image_mean", None) or 0.0))
        self.std = tuple(_triple(getattr(processor, "image_std", None) or 1.0))
        self._plan = _read_plan(processor, _pair(image_size))
        self.native = self._plan is not None
        if self._plan is None:
            self.size = self._probe(image_size)
        else:
            self.size = (self._plan.height, self._plan.width)

    def __repr__(self) -> str:
        how = f"train, scale={self.scale}" if self.train else "evaluation"
        return f"ImageTransform({type(self.processor).__name__}, size={self.size}, {how})"

    def load(self, value: Any, key: int | None = None) -> Image.Image:
        """Decode one image; where exactness is not asked for, a large JPEG at reduced scale.

        With the `key` of a training crop, the crop is at least as large as the target afterwards; otherwise the
        image is at least twice as large.
        """
        if self.train and key is not None:
            return load_image(value, draft=lambda width, height: self._needed(width, height, key))
        return load_image(value, draft=(2 * self.size[0], 2 * self.size[1]) if self.train or not self.exact else None)

    def __call__(self, images: Sequence[Any], keys: Sequence[int] | None = None) -> Tensor:
        """`[B, 3, H, W]` float32 for B images in any form `load_image` takes.

        Raises:
            BadImage: for one that cannot be decoded.
            ValueError: for no images at all, or `keys` of another length.
        """
        if isinstance(images, str | bytes | Image.Image) or 0 < getattr(images, "ndim", 4) < 4:
            raise ValueError(f"images must be a list of images, got one {type(images).__name__}; wrap it in a list")
        if len(images) == 0:
            raise ValueError("no images: images is empty")
        if keys is not None and len(keys) != len(images):
            raise ValueError(f"{len(keys)} keys for {len(images)} images")
        of_each: list[int | None] = [None] * len(images) if keys is None else list(keys)
        loaded = in_threads(lambda pair: self.load(*pair), list(zip(images, of_each, strict=True)))
        if self.train:
            boxes = [self._random_box(image.size, key) for image, key in zip(loaded, of_each, strict=True)]
            if self._plan is None:
                loaded = [image.crop(box) for image, box in zip(loaded, boxes, strict=True)]
                return self._processed(loaded)
            return self._cropped(loaded, boxes)
        if self._plan is None:
            return self._processed(loaded)
        values = torch.empty(len(loaded), 3, *self.size)
        return _in_parts(lambda part, out: self._finish(self._centred(part), out), loaded, values)

    def pixels(self, images: Sequence[Image.Image]) -> Tensor | None:
        """Evaluation images as they are before normalisation, `[B, H, W, 3]` uint8: a quarter of the memory.

        `normalise` makes of them what `__call__` gives. None for processors with settings of their own (`native` is
        False), whose pixel values cannot be taken apart.
        """
        if self._plan is None:
            return None
        return _in_parts(self._centred, list(images), torch.empty(len(images), *self.size, 3, dtype=torch.uint8))

    def normalise(self, pixels: Tensor) -> Tensor:
        """What `pixels` gave, `[B, H, W, 3]` uint8, as pixel values `[B, 3, H, W]` float32."""
        return _in_parts(self._finish, pixels, torch.empty(len(pixels), 3, *self.size))

    # -- geometry ---------------------------------------------------------------------------------------------

    def _random_box(self, size: tuple[int, int], key: int | None) -> tuple[int, int, int, int]:
        """A random crop (left, top, right, bottom) of an image of `size` (width, height)."""
        if key is None:
            key = int(torch.randint(0, 2**62, (), generator=self.generator))
        rng = random.Random(int(key))
        width, height = size
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = rng.randint(0, width - w), rng.randint(0, height - h)
                return left, top, left + w, top + h
        # No such crop fits (a panorama): the largest one at the centre within the aspect ratios.
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def _needed(self, width: int, height: int, key: int) -> tuple[int, int]:
        """(height, width) that an image must be decoded to, so that its crop need not be enlarged."""
        if min(width // self.size[1], height // self.size[0]) < 2:
            return height, width  # no half of it is large enough, wherever the crop lies
        left, top, right, bottom = self._random_box((width, height), key)
        return math.ceil(height * self.size[0] / (bottom - top)), math.ceil(width * self.size[1] / (right - left))

    def _centred(self, images: list[Image.Image], out: Tensor | None = None) -> Tensor:
        """Resize and centre crop as the processor does; `[B, H, W, 3]` uint8, into `out` where given."""
        plan = self._plan
        assert plan is not None
        if out is None:
            out = torch.empty(len(images), *self.size, 3, dtype=torch.uint8)
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            by_size[image.size].append(index)
        for (width, height), rows in by_size.items():
            target = plan.resize if plan.shortest is None else _shortest_edge(height, width, plan.shortest)
            top, left = (target[0] - plan.height) // 2, (target[1] - plan.width) // 2
            group = [images[row] for row in rows]
            if target[0] * target[1] > _HUGE:
                # a strip a few pixels high would become gigabytes: resize only what the crop keeps
                x0, x1 = left * width / target[1], min(width, (left + plan.width) * width / target[1])
                y0, y1 = top * height / target[0], min(height, (top + plan.height) * height / target[0])
                filter_ = Image.Resampling(plan.resample)
                for row, image in zip(rows, group, strict=True):
                    strip = image.resize((plan.width, height), filter_, box=(x0, 0, x1, height))
                    strip = strip.resize((plan.width, plan.height), filter_, box=(0, y0, plan.width, y1))
                    out[row] = torch.from_numpy(np.array(strip))
                continue
            # Bilinear, torch's 8-bit resize agrees with Pillow. Bicubic one value in a million is two levels off, and
            # overshoot is clipped between the passes, in an order that Pillow chooses.
            mode = _TORCH_MODES.get(plan.resample)
            with_torch = mode == "bilinear" or (height, width) == target or (mode is not None and not self.exact)
            step = max(1, 2**21 // (height * width))  # bounded stacks: photographs need not lie in memory twice
            for start in range(0, len(rows), step):
                pixels = _resize(group[start : start + step], target, plan.resample, with_torch=with_torch)
                out[rows[start : start + step]] = pixels[:, top : top + plan.height, left : left + plan.width]
        return out

    def _cropped(self, images: list[Image.Image], boxes: list[tuple[int, int, int, int]]) -> Tensor:
        """Each image's box resized to the full size, as values; no processor to agree with here."""
        assert self._plan is not None
        values = torch.empty(len(images), 3, *self.size)
        resample = self._plan.resample
        fast = resample in _TORCH_MODES

        def crop(row: int) -> None:
            pixels = _resize([images[row]], self.size, resample, with_torch=fast, box=boxes[row])
            self._finish(pixels, values[row : row + 1])  # while they are in the cache

        in_threads(crop, range(len(images)))
        return values

    # -- values -----------------------------------------------------------------------------------------------

    def _finish(self, pixels: Tensor, values: Tensor) -> Tensor:
        """`[B, H, W, 3]` uint8 to float32, into `values` `[B, 3, H, W]`."""
        assert self._plan is not None
        for channel, (multiply, add) in enumerate(zip(self._plan.multiply, self._plan.add, strict=True)):
            plane = values[:, channel].copy_(pixels[..., channel])  # a product of two types would iterate byte by byte
            torch.add(torch.tensor(add), plane, alpha=multiply, out=plane)
        return values

    def _processed(self, images: list[Image.Image]) -> Tensor:
        values = self.processor(images=images, return_tensors="pt")["pixel_values"]
        if values.ndim != 4:
            raise ValueError(
                f"{type(self.processor).__name__} gives pixel values of shape {tuple(values.shape)}, not [B, 3, H, W]; "
                "use a fixed-size image processor"
            )
        return values

    def _probe(self, image_size: int | tuple[int, int] | None) -> tuple[int, int]:
        name = type(self.processor).__name__
        if image_size is not None:
            raise ValueError(
                f"image_size={image_size} cannot be applied to {name}, whose settings are none of the known ones; "
                "set the size in the image processor itself"
            )
        logger.info("%s has settings of its own: images go through it unchanged (slower)", name)
        values = self._processed([Image.new("RGB", (64, 64))])
        return int(values.shape[-2]), int(values.shape[-1])


def _in_parts(function: Callable[[Any, Tensor], Any], batch: Any, out: Tensor) -> Tensor:
    """`function(batch, out)`, on several threads part by part: four parts a thread, so that none waits long."""
    threads = torch.get_num_threads()
    size = len(batch) if threads == 1 else -(-len(batch) // (4 * threads))
    parts = [slice(start, start + size) for start in range(0, len(batch), max(1, size))]
    in_threads(lambda part: function(batch[part], out[part]), parts)
    return out


def _resize(
    images: list[Image.Image], size: tuple[int, int], resample: int, *, with_torch: bool, box: tuple | None = None
) -> Tensor:
    """Images of one size, or their whole-pixel box, resized to `size`; `[B, height, width, 3]` uint8."""
    height, width = size
    if not with_torch:
        filter_ = Image.Resampling(resample)
        return torch.from_numpy(np.stack([np.asarray(p.resize((width, height), filter_, box=box)) for p in images]))
    arrays = [np.asarray(image) for image in images]
    if box is not None:
        left, top, right, bottom = box
        arrays = [array[top:bottom, left:right] for array in arrays]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)  # channels last in memory: torch's fast path
    if pixels.shape[2:] != size:
        mode = _TORCH_MODES[resample]
        pixels = F.interpolate(pixels, size, mode=mode, antialias=True, align_corners=False)
    return pixels.permute(0, 2, 3, 1)


def _shortest_edge(height: int, width: int, shortest: int) -> tuple[int, int]:
    """(height, width) after the shorter side became `shortest`; transformers rounds the longer one down."""
    if width <= height:
        return int(shortest * height / width), shortest
    return shortest, int(shortest * width / height)


# -- reading a processor's settings -----------------------------------------------------------------------------


def _triple(value: Any) -> list[float]:
    values = [float(v) for v in value] if isinstance(value, list | tuple) else [float(value)] * 3
    return values * 3 if len(values) == 1 else values


def _pair(size: int | Sequence[int] | None) -> tuple[int, int] | None:
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


def _read_plan(processor: Any, override: tuple[int, int] | None) -> _Plan | None:
    """The processor's settings as a plan, or None when they are none we can follow exactly."""
    family = _family(processor)
    resample = getattr(processor, "resample", None)
    if family is None or resample is None or not getattr(processor, "do_resize", False):
        return None
    if int(resample) not in (*_TORCH_MODES, int(Image.Resampling.LANCZOS)) or getattr(processor, "do_pad", False):
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
    return _Plan(int(target[0]), int(target[1]), shortest, resize, int(resample), multiply, add)


def _affine(processor: Any, family: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Rescaling and normalising as one multiplication and one addition of a 0..255 value a channel."""
    factor = float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else 1.0
    mean, std = _triple(processor.image_mean or 0.0), _triple(processor.image_std or 1.0)
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
