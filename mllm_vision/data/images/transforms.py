"""Image transforms: decoded images as the pixel values that an encoder was saved with.

`ImageTransform` gives what the saved transformers image processor gives, within one grey level, several times
faster: it works on 8-bit pixels up to the very end, on all threads that torch has.
"""

from __future__ import annotations

import logging
import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mllm_vision.data.images.decoding import BadImage, in_threads, load_image
from mllm_vision.data.images.preprocessing import TORCH_MODES, height_width, read_preprocessing, three

__all__ = ["BadImage", "ImageTransform", "load_image"]

logger = logging.getLogger(__name__)

_HUGE = 2**26  # pixels of a resized image, beyond which only the cropped part is made


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
        self.mean = tuple(three(getattr(processor, "image_mean", None) or 0.0))
        self.std = tuple(three(getattr(processor, "image_std", None) or 1.0))
        self._steps = read_preprocessing(processor, height_width(image_size))
        self.native = self._steps is not None
        if self._steps is None:
            self.size = self._probe(image_size)
        else:
            self.size = (self._steps.height, self._steps.width)

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
            if self._steps is None:
                loaded = [image.crop(box) for image, box in zip(loaded, boxes, strict=True)]
                return self._processed(loaded)
            return self._cropped(loaded, boxes)
        if self._steps is None:
            return self._processed(loaded)
        values = torch.empty(len(loaded), 3, *self.size)
        return _in_parts(lambda part, out: self._finish(self._centred(part), out), loaded, values)

    def pixels(self, images: Sequence[Image.Image]) -> Tensor | None:
        """Evaluation images as they are before normalisation, `[B, H, W, 3]` uint8: a quarter of the memory.

        `normalise` makes of them what `__call__` gives. None for processors with settings of their own (`native` is
        False), whose pixel values cannot be taken apart.
        """
        if self._steps is None:
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
        steps = self._steps
        assert steps is not None
        if out is None:
            out = torch.empty(len(images), *self.size, 3, dtype=torch.uint8)
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            by_size[image.size].append(index)
        for (width, height), rows in by_size.items():
            target = steps.resize if steps.shortest is None else _shortest_edge(height, width, steps.shortest)
            top, left = (target[0] - steps.height) // 2, (target[1] - steps.width) // 2
            group = [images[row] for row in rows]
            if target[0] * target[1] > _HUGE:
                # a strip a few pixels high would become gigabytes: resize only what the crop keeps
                x0, x1 = left * width / target[1], min(width, (left + steps.width) * width / target[1])
                y0, y1 = top * height / target[0], min(height, (top + steps.height) * height / target[0])
                filter_ = Image.Resampling(steps.resample)
                for row, image in zip(rows, group, strict=True):
                    strip = image.resize((steps.width, height), filter_, box=(x0, 0, x1, height))
                    strip = strip.resize((steps.width, steps.height), filter_, box=(0, y0, steps.width, y1))
                    out[row] = torch.from_numpy(np.array(strip))
                continue
            # Bilinear, torch's 8-bit resize agrees with Pillow. Bicubic one value in a million is two levels off, and
            # overshoot is clipped between the passes, in an order that Pillow chooses.
            mode = TORCH_MODES.get(steps.resample)
            with_torch = mode == "bilinear" or (height, width) == target or (mode is not None and not self.exact)
            step = max(1, 2**21 // (height * width))  # bounded stacks: photographs need not lie in memory twice
            for start in range(0, len(rows), step):
                pixels = _resize(group[start : start + step], target, steps.resample, with_torch=with_torch)
                out[rows[start : start + step]] = pixels[:, top : top + steps.height, left : left + steps.width]
        return out

    def _cropped(self, images: list[Image.Image], boxes: list[tuple[int, int, int, int]]) -> Tensor:
        """Each image's box resized to the full size, as values; no processor to agree with here."""
        assert self._steps is not None
        values = torch.empty(len(images), 3, *self.size)
        resample = self._steps.resample
        fast = resample in TORCH_MODES

        def crop(row: int) -> None:
            pixels = _resize([images[row]], self.size, resample, with_torch=fast, box=boxes[row])
            self._finish(pixels, values[row : row + 1])  # while they are in the cache

        in_threads(crop, range(len(images)))
        return values

    # -- values -----------------------------------------------------------------------------------------------

    def _finish(self, pixels: Tensor, values: Tensor) -> Tensor:
        """`[B, H, W, 3]` uint8 to float32, into `values` `[B, 3, H, W]`."""
        assert self._steps is not None
        for channel, (multiply, add) in enumerate(zip(self._steps.multiply, self._steps.add, strict=True)):
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
        mode = TORCH_MODES[resample]
        pixels = F.interpolate(pixels, size, mode=mode, antialias=True, align_corners=False)
    return pixels.permute(0, 2, 3, 1)


def _shortest_edge(height: int, width: int, shortest: int) -> tuple[int, int]:
    """(height, width) after the shorter side became `shortest`; transformers rounds the longer one down."""
    if width <= height:
        return int(shortest * height / width), shortest
    return shortest, int(shortest * width / height)
