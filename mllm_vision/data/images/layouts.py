"""Image layouts: how a multimodal LLM turns an image into token ids and into tensors for its vision tower.

Tokens are counted from an image's height and width alone; tensors come from transformers' own image processors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mllm_vision.data.images.decoding import in_threads, load_image
from mllm_vision.data.images.preprocessing import three
from mllm_vision.data.images.transforms import ImageTransform

_GREY = (127, 127, 127)  # of blank images: not 0 after normalisation, since Idefics drops images of zeros
_IDEFICS_MAX = 4096  # pixels of a side: Idefics3ImageProcessor's upper bound, a constant of its module


class ImageLayout(ABC):
    """The tokens and tensors of images for one multimodal LLM.

    Args:
        image_token_id: the token that stands for an image in a conversation, and for each of its features.
        image_processor: a transformers image processor.

    Attributes:
        longest: the most tokens one image can take.
        fixed: every image takes `longest` tokens, so that sizes need not be read.
        shared: a token that two images with nothing between them have in common, or None.
    """

    fixed = False
    shared: int | None = None

    def __init__(self, image_token_id: int, image_processor: Any) -> None:
        self.image_token_id = int(image_token_id)
        self.processor = getattr(image_processor, "image_processor", image_processor)
        if self.processor is None or not callable(self.processor):
            raise ValueError(f"image_processor={image_processor!r} is not one; pass one from AutoImageProcessor")
        self.longest = 0

    @abstractmethod
    def tokens(self, height: int, width: int) -> np.ndarray:
        """The ids `[T]` int64 that replace the image token of an image of this size, structure tokens included."""

    @abstractmethod
    def __call__(self, images: Sequence[Image.Image], keys: Sequence[int] | None = None) -> dict[str, Tensor]:
        """The tensors of a batch's images in reading order: "pixel_values", and what the model needs beside it."""

    def load(self, value: Any) -> Image.Image:
        """Decode one cell of an image column, see `load_image`."""
        return load_image(value)

    def blank(self) -> dict[str, Tensor]:
        """The tensors of one constant image, for batches without images and for blind runs."""
        return self([Image.new("RGB", (32, 32), _GREY)])

    def expand(
        self, tokens: np.ndarray, sizes: Sequence[Sequence[int]] | np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids int64 with every image token replaced, how many of these each of `tokens` became, int64 `[T]`).

        Args:
            tokens: ids `[T]` with one image token an image.
            sizes: (height, width) of every image in order; None where the layout is fixed.
        """
        places = np.flatnonzero(tokens == self.image_token_id)
        assert sizes is not None or self.fixed, "images of a layout that is not fixed have sizes"
        of_each = [(1, 1)] * len(places) if sizes is None else sizes
        found = [self.tokens(int(height), int(width)) for height, width in of_each]
        assert len(found) == len(places), f"{len(found)} sizes for {len(places)} image tokens"
        if self.shared is not None:
            for number in np.flatnonzero(np.diff(places) == 1).tolist():
                if found[number][-1] == found[number + 1][0] == self.shared:
                    found[number + 1] = found[number + 1][1:]
        repeat = np.ones(len(tokens), dtype=np.int64)
        repeat[places] = [len(each) for each in found]
        ids = np.repeat(tokens, repeat).astype(np.int64)
        if found:
            ids[np.repeat(tokens == self.image_token_id, repeat)] = np.concatenate(found)
        return ids, repeat

    def identity(self) -> str:
        """All that the tokens and tensors of images depend on, as text that names caches."""
        settings = {name: value for name, value in vars(self).items() if isinstance(value, int | tuple)}
        marks = {name: value.tolist() for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return repr((type(self).__name__, self.shared, settings, marks, self.processor.to_dict()))

    def _ids(self, *parts: int | Sequence[int]) -> np.ndarray:
        return np.concatenate([np.atleast_1d(np.asarray(part, dtype=np.int64)) for part in parts])


class FixedLayout(ImageLayout):
    """Every image becomes one square of pixels and as many tokens (LLaVA, PaliGemma, BLIP-2).

    Args:
        num_tokens: image tokens an image.
        image_processor: of a fixed size; or an `ImageTransform` of one.
        before, after: ids around the image tokens.

    Gives "pixel_values" `[images, 3, H, W]`, through the fast `ImageTransform`.

    Raises:
        ValueError: `num_tokens` below 1.
    """

    fixed = True

    def __init__(
        self,
        image_token_id: int,
        num_tokens: int,
        image_processor: Any,
        before: Sequence[int] = (),
        after: Sequence[int] = (),
    ) -> None:
        ready = isinstance(image_processor, ImageTransform)
        super().__init__(image_token_id, image_processor.processor if ready else image_processor)
        if num_tokens < 1:
            raise ValueError(f"num_tokens={num_tokens} must be at least 1: an image takes that many tokens")
        # Questions and captions depend on positions, so images are not cropped at random.
        self.transform: ImageTransform = image_processor if ready else ImageTransform(self.processor, train=False)
        self._tokens = self._ids(tuple(before), [self.image_token_id] * int(num_tokens), tuple(after))
        self.longest = len(self._tokens)

    def tokens(self, height: int, width: int) -> np.ndarray:
        return self._tokens

    def load(self, value: Any) -> Image.Image:
        return self.transform.load(value)

    def __call__(self, images: Sequence[Image.Image], keys: Sequence[int] | None = None) -> dict[str, Tensor]:
        return {"pixel_values": self.transform(images, keys=keys)}

    def blank(self) -> dict[str, Tensor]:
        return {"pixel_values": torch.zeros(1, 3, *self.transform.size)}


class PaddedLayout(FixedLayout):
    """As `FixedLayout`, of images padded to squares with the processor's mean colour (LLaVA-1.5, arXiv 2310.03744).

    Args:
        image_processor: a `LlavaImageProcessor` with `do_pad`, so that the saved model pads too.

    Raises:
        ValueError: a processor that does not pad.
    """

    def __init__(self, image_token_id: int, num_tokens: int, image_processor: Any) -> None:
        processor = getattr(image_processor, "image_processor", image_processor)
        if not getattr(processor, "do_pad", None) or not hasattr(processor, "pad_to_square"):
            raise ValueError(
                f"{type(processor).__name__} does not pad images to squares, so the saved model would not; use "
                "LlavaImageProcessor(do_pad=True)"
            )
        super().__init__(image_token_id, num_tokens, ImageTransform(_without_padding(processor), train=False))
        self.processor = processor
        self._colour = tuple(int(value * 255) for value in three(processor.image_mean))

    def __call__(self, images: Sequence[Image.Image], keys: Sequence[int] | None = None) -> dict[str, Tensor]:
        return super().__call__([self._padded(image) for image in images], keys)

    def _padded(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if width == height:
            return image
        side = max(width, height)
        square = Image.new("RGB", (side, side), self._colour)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return square


def _without_padding(processor: Any) -> Any:
    """The settings of a `LlavaImageProcessor` in the class that resizes and crops alone."""
    from transformers.models.clip import CLIPImageProcessorPil

    names = (
        *("size", "crop_size", "resample", "do_resize", "do_center_crop", "do_rescale", "rescale_factor"),
        *("do_normalize", "image_mean", "image_std", "default_to_square"),
    )
    return CLIPImageProcessorPil(**{name: getattr(processor, name) for name in names})


class AnyResolutionLayout(ImageLayout):
    """LLaVA-NeXT: the whole image as one tile, then a grid of tiles without their padding, with a newline token a row.

    All of them are image tokens. The grid is the one of the processor's `image_grid_pinpoints` that keeps most of the
    image.

    Args:
        side: tokens along a side of a tile, the tower's image size over its patch size.
        image_processor: a `LlavaNextImageProcessor`.

    Gives "pixel_values" `[all tiles, 3, H, W]`, of each image the whole one first (the native class takes them so or
    padded), "image_sizes" `[images, 2]` (height, width), and "tiles" `[images]` int64, how many each has.

    Raises:
        ValueError: pinpoints that are not multiples of the tile.
    """

    def __init__(self, image_token_id: int, side: int, image_processor: Any) -> None:
        super().__init__(image_token_id, image_processor)
        self.side, self.tile = int(side), _square(self.processor.size)
        self.pinpoints = tuple((int(height), int(width)) for height, width in self.processor.image_grid_pinpoints)
        wrong = [each for each in self.pinpoints if each[0] % self.tile or each[1] % self.tile]
        if wrong or not self.pinpoints:
            raise ValueError(
                f"image_grid_pinpoints={self.pinpoints} must be multiples of the tile of {self.tile} pixels "
                f"(height, width); {wrong or 'there are none'}"
            )
        grids = [(height // self.tile * self.side, width // self.tile * self.side) for height, width in self.pinpoints]
        self.longest = self.side**2 + max(rows * columns + rows for rows, columns in grids)

    def tokens(self, height: int, width: int) -> np.ndarray:
        """See `ImageLayout.tokens`; counted as `LlavaNextModel.pack_image_features` unpads."""
        from transformers.image_processing_utils import select_best_resolution

        best_height, best_width = select_best_resolution((height, width), self.pinpoints)  # type: ignore[arg-type]
        rows, columns = best_height // self.tile * self.side, best_width // self.tile * self.side
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        return np.full(self.side**2 + rows * columns + rows, self.image_token_id, dtype=np.int64)

    def __call__(self, images: Sequence[Image.Image], keys: Sequence[int] | None = None) -> dict[str, Tensor]:
        found = _of_each(self.processor, images)
        sizes = torch.tensor([(image.height, image.width) for image in images], dtype=torch.int64)
        pixels = [each["pixel_values"][0] for each in found]
        return {"pixel_values": torch.cat(pixels), "image_sizes": sizes, "tiles": _counts(pixels)}


class TilesLayout(ImageLayout):
    """InternVL: 1 to `max_patches` tiles in the grid nearest to the image's aspect, and a thumbnail behind several.

    Args:
        num_tokens: image tokens a tile.
        image_processor: a `GotOcr2ImageProcessor`, whose `min_patches` and `max_patches` bound the tiles.
        start, end: the ids of `<img>` and `</img>`.

    Gives "pixel_values" `[all tiles, 3, S, S]` and "tiles" `[images]` int64, how many each image has.
    """

    def __init__(self, image_token_id: int, num_tokens: int, image_processor: Any, start: int, end: int) -> None:
        super().__init__(image_token_id, image_processor)
        self.num_tokens, self.start, self.end = int(num_tokens), int(start), int(end)
        most = int(self.processor.max_patches)
        self.longest = 2 + self.num_tokens * (most + (most > 1))

    def tokens(self, height: int, width: int) -> np.ndarray:
        tiles = self.processor.get_number_of_image_patches(int(height), int(width), {"crop_to_patches": True})
        return self._ids(self.start, [self.image_token_id] * (tiles * self.num_tokens), self.end)

    def __call__(self, images: Sequence[Image.Image], keys: Sequence[int] | None = None) -> dict[str, Tensor]:
        found = [each["pixel_values"] for each in _of_each(self.processor, images, crop_to_patches=True)]
        return {"pixel_values": torch.cat(found), "tiles": _counts(found)}


class NativeAspectLayout(ImageLayout):
    """Idefics2: an image in its own aspect within bounds of its sides, and as many tokens whatever its size.

    With the processor's `do_image_splitting` an image is its four quarters and itself.

    Args:
        num_tokens: image tokens an image (or part), the perceiver's latents.
        image_processor: an `Idefics2ImageProcessor`.
        around: the id of `<fake_token_around_image>`; images with nothing between them share it.

    Gives "pixel_values" `[images or parts, 3, H, W]`, padded with zeros to the largest, and "pixel_attention_mask"
    `[images or parts, H, W]` int64, 1 where pixels are the image's.
    """

    fixed = True

    def __init__(self, image_token_id: int, num_tokens: int, image_processor: Any, around: int) -> None:
        super().__init__(image_token_id, image_processor)
        self.shared = int(around)
        self.parts = 5 if self.processor.do_image_splitting else 1
        part = [self.image_token_id] * int(num_tokens)
        self._tokens = self._ids(self.shared, *([*part, self.shared] for _ in range(self.parts)))
        self.longest = len(self._tokens)

    def tokens(self, height: int, width: int) -> np.ndarray:
        return self._tokens

    def __call__(self, images: Sequence[Image.Image], keys: Sequence[int] | None = None) -> dict[str, Tensor]:
        found = _of_each(self.processor, images)
        names = ("pixel_values", "pixel_attention_mask")
        parts = {name: [part for each in found for part in each[name][0]] for name in names}
        height, width = (max(part.shape[axis] for part in parts[names[0]]) for axis in (-2, -1))
        return {
            name: torch.stack([F.pad(part, (0, width - part.shape[-1], 0, height - part.shape[-2])) for part in each])
            for name, each in parts.items()
        }


class SplitLayout(ImageLayout):
    """Idefics3: rows and columns of tiles, each behind its own marks, and the whole image as one tile at the end.

    Args:
        num_tokens: image tokens a tile.
        image_processor: an `Idefics3ImageProcessor`.
        tokenizer: writes the marks: `<fake_token_around_image>`, `<row_1_col_1>`..., `<global-img>`, line ends.

    Gives "pixel_values" `[all tiles, 3, S, S]` and "tiles" `[images]` int64, how many each image has.
    """

    def __init__(self, image_token_id: int, num_tokens: int, image_processor: Any, tokenizer: Any) -> None:
        super().__init__(image_token_id, image_processor)
        self.num_tokens, self.tokenizer = int(num_tokens), tokenizer
        self.tile = int(self.processor.max_image_size["longest_edge"])
        self._known: dict[tuple[int, int], np.ndarray] = {}
        most = min(int(self.processor.size["longest_edge"]), _IDEFICS_MAX)
        self.longest = len(self.tokens(most, most))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of tiles beside the whole image; (0, 0) where it is the only one."""
        if not self.processor.do_image_splitting:
            return 0, 0
        # As Idefics3ImageProcessor resizes; its own `get_number_of_image_patches` leaves the last rounding out.
        height, width = _within(height, width, int(self.processor.size["longest_edge"]), always=True)
        height, width = _within(height, width, _IDEFICS_MAX, always=False)
        aspect = width / height
        if width >= height:
            columns = math.ceil(width / self.tile)
            rows = math.ceil(int(columns * self.tile / aspect) / self.tile)
        else:
            rows = math.ceil(height / self.tile)
            columns = math.ceil(int(rows * self.tile * aspect) / self.tile)
        return (rows, columns) if max(rows, columns) > 1 else (0, 0)

    def tokens(self, height: int, width: int) -> np.ndarray:
        grid = self.grid(int(height), int(width))
        if grid not in self._known:
            encoded = self.tokenizer(self._text(*grid), add_special_tokens=False)["input_ids"]
            self._known[grid] = np.asarray(encoded, dtype=np.int64)
        return self._known[grid]

    def _text(self, rows: int, columns: int) -> str:
        image = self.tokenizer.convert_ids_to_tokens(self.image_token_id) * self.num_tokens
        fake = "<fake_token_around_image>"
        lines = [
            "".join(f"{fake}<row_{row}_col_{column}>{image}" for column in range(1, columns + 1)) + "\n"
            for row in range(1, rows + 1)
        ]
        return "".join(lines) + ("\n" if rows else "") + f"{fake}<global-img>{image}{fake}"

    def __call__(self, images: Sequence[Image.Image], keys: Sequence[int] | None = None) -> dict[str, Tensor]:
        found = [each["pixel_values"][0] for each in _of_each(self.processor, images)]
        return {"pixel_values": torch.cat(found), "tiles": _counts(found)}


def _of_each(processor: Any, images: Sequence[Image.Image], **options: Any) -> list[Any]:
    """What the processor gives for each image by itself, on several threads."""
    return in_threads(lambda image: processor(images=[image], return_tensors="pt", **options), list(images))


def _counts(tiles: Sequence[Tensor]) -> Tensor:
    return torch.tensor([len(each) for each in tiles], dtype=torch.int64)


def _square(size: Any) -> int:
    """The side of the tiles that a processor's `size` gives."""
    sides = {int(value) for value in dict(size).values() if value}
    if len(sides) != 1:
        raise ValueError(f"size={dict(size)} of the image processor is not a square; tiles are squares")
    return sides.pop()


def _within(height: int, width: int, bound: int, *, always: bool) -> tuple[int, int]:
    """(height, width) with the longer side at `bound`, or at most there; the shorter one made even where `always`."""
    aspect, even = width / height, int(always)
    if width >= height and (always or width > bound):
        height, width = int(bound / aspect), bound
        height += height % 2 * even
    elif height > width and (always or height > bound):
        height, width = bound, int(bound * aspect)
        width += width % 2 * even
    return max(height, 1), max(width, 1)
