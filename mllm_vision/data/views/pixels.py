"""The pixels of views: crops, colours, blur of a whole batch, each row with its own parameters.

Every operation treats its rows one by one, so a view does not depend on the batch that it is made in. Values run from
0 to 255; what Pillow would round to whole levels after each step stays a fraction here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_vision.data.views.draws import ViewParameters

RESAMPLES = ("bilinear", "bicubic")
_SMALL_ELEMENTS = 2**20  # of the views made at a time on a CPU: small ones stay in the cache all the way
_LARGE_ELEMENTS = 2**24  # large ones need company for the groups that take the same steps
_CACHED_ELEMENTS = 2**19  # of such a group at a time
_DEVICE_ELEMENTS = 2**27  # elsewhere: half a gigabyte a tensor
_DENSE_SIDE = 48  # pixels; up to here a product of small matrices is faster on a CPU than a call for every row
_LUMA = (0.299, 0.587, 0.114)
_Crops = Iterator[tuple[slice | Tensor, Tensor]]  # (places, their values)


def make_views(
    pixels: Tensor,
    parameters: ViewParameters,
    size: tuple[int, int],
    *,
    multiply: Tensor,
    add: Tensor,
    resample: str = "bilinear",
    max_sigma: float = 2.0,
    blur_radius: int | None = None,
) -> Tensor:
    """`[B, V, 3, h, w]` float32: V views of each image, cropped, flipped, coloured, blurred and normalised.

    Args:
        pixels: `[B, 3, H, W]` uint8.
        parameters: B x V of them, all views of the first image before those of the second.
        size: (h, w) of the views.
        multiply, add: `[3]`; a value v of channel c becomes `v * multiply[c] + add[c]` at last.
        resample: "bilinear" or "bicubic", antialiased as Pillow's.
        max_sigma: no blur is wider.
        blur_radius: where the blur's kernel ends; by default at three deviations of the widest.
    """
    each, by_row = len(parameters) // len(pixels), _by_row(pixels, size)
    if by_row:
        elements = _LARGE_ELEMENTS
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    else:
        elements = _SMALL_ELEMENTS if _on_cpu(pixels) else _DEVICE_ELEMENTS
    step = max(1, elements // (3 * each * max(size[0] * size[1], pixels.shape[2] * pixels.shape[3])))
    views = torch.empty(len(parameters), 3, *size, device=pixels.device)
    # Inference mode makes hundreds of small calls cheaper; `views` itself is an ordinary tensor.
    with torch.inference_mode(), torch.autocast(pixels.device.type, enabled=False):
        multiply, add = multiply.view(1, 3, 1, 1), add.view(1, 3, 1, 1)
        inverse = 255.0 * multiply + 2.0 * add  # less a normalised value: 255 less the value, normalised
        for start in range(0, len(pixels), step):
            rows = slice(start * each, (start + step) * each)
            given, some, out = pixels[start : start + step], parameters[rows], views[rows]
            for places, values in (_large_crops if by_row else _small_crops)(given, some, size, resample):
                _normalise(values, multiply, add, out, places)
            # Only now: a blur does not mind, and rows of all groups are blurred together.
            blur(out, some.sigma, max_sigma, blur_radius)
            _where(out, some.solarize, lambda x: torch.minimum(x, inverse - x))  # from 127.5 on, it is the inverse
    return views.unflatten(0, (len(pixels), each))


def _small_crops(pixels: Tensor, parameters: ViewParameters, size: tuple[int, int], resample: str) -> _Crops:
    """All at once; where there is no CPU to group them, nothing may depend on what the parameters are."""
    yield slice(None), colour(crop_by_products(pixels, parameters, size, resample), parameters)


def _large_crops(pixels: Tensor, parameters: ViewParameters, size: tuple[int, int], resample: str) -> _Crops:
    """In groups that fit into the cache; above `_DENSE_SIDE`, of rows whose jitter comes in the same order."""
    each, most = len(parameters) // len(pixels), max(1, _CACHED_ELEMENTS // (3 * size[0] * size[1]))
    groups: Sequence[tuple[list[int] | None, int]] = [(None, len(parameters))]
    ranked = torch.arange(len(parameters))
    if max(size) > _DENSE_SIDE:
        ranked, groups = _grouped_by_jitter(parameters)
    images, parameters = ranked // each, parameters[ranked]
    start = 0
    for steps, count in groups:
        for first in range(start, start + count, most):
            rows = slice(first, min(first + most, start + count))
            values = crop_by_row(pixels, images[rows], parameters[rows], size, resample)
            yield ranked[rows], colour(values, parameters[rows], steps)
        start += count


def _grouped_by_jitter(parameters: ViewParameters) -> tuple[Tensor, list[tuple[list[int], int]]]:
    """The rows, those whose jitter comes in the same order together; and of each such group the steps and the size.

    A group's grey rows are its last; those without jitter take no steps.
    """
    digits = parameters.order @ torch.tensor([64, 16, 4, 1])
    neutral = (parameters.factors == torch.tensor([1.0, 1.0, 1.0, 0.0])).all(dim=1)
    keys, ranked = (2 * torch.where(neutral, -1, digits) + parameters.gray).sort(stable=True)
    numbers, counts = (keys >> 1).unique_consecutive(return_counts=True)
    steps = ([] if number < 0 else [number >> shift & 3 for shift in (6, 4, 2, 0)] for number in numbers.tolist())
    return ranked, list(zip(steps, counts.tolist(), strict=True))


def _normalise(values: Tensor, multiply: Tensor, add: Tensor, out: Tensor, places: slice | Tensor) -> None:
    """`out[places] = values * multiply + add`; the values may be overwritten."""
    if isinstance(places, slice):
        torch.mul(values, multiply, out=out[places]).add_(add)
    else:
        _write(out, places, values.mul_(multiply).add_(add))


def _by_row(pixels: Tensor, size: tuple[int, int]) -> bool:
    """Whether the views are large enough on a CPU for a call for every row to be the faster way."""
    return _on_cpu(pixels) and max(*pixels.shape[2:], *size) > _DENSE_SIDE


# -- geometry -----------------------------------------------------------------------------------------------------


def crop_by_row(
    pixels: Tensor, images: Tensor, parameters: ViewParameters, size: tuple[int, int], resample: str
) -> Tensor:
    """`[R, 3, h, w]` float32 in 0..255, whole levels: each box resized to `size`, mirrored where it says so.

    A call of torch's 8-bit resize for every row: it reads the box only, and is fast on a CPU.

    Args:
        pixels: `[B, 3, H, W]` uint8, channels last in memory.
        images: `[R]` int64, whose pixels each row is of.
        parameters: R of them.
        size: (h, w).
        resample: "bilinear" or "bicubic", antialiased as Pillow's.
    """
    p, strides = parameters, pixels.stride()
    corners = images * strides[0] + p.top * strides[2] + p.left * strides[3] + int(pixels.storage_offset())
    boxes = []
    for corner, height, width in torch.stack([corners, p.height, p.width], dim=1).tolist():
        # Contiguous first: the resize would make the same copy, and take ten times as long for it.
        box = pixels.as_strided((1, 3, height, width), strides, corner).contiguous(memory_format=torch.channels_last)
        if (height, width) != size:
            box = F.interpolate(box, size, mode=resample, antialias=True, align_corners=False)
        boxes.append(box)
    # From channels last while it is in 8 bits, a quarter of the bytes.
    views = torch.cat(boxes).permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2).contiguous().unflatten(2, size)
    ways = zip(views, views.flip(-1), p.flip.tolist(), strict=True)
    return torch.stack([mirrored if flip else plain for plain, mirrored, flip in ways]).float()


def crop_by_products(pixels: Tensor, parameters: ViewParameters, size: tuple[int, int], resample: str) -> Tensor:
    """The same for B x V rows, all views of the first of the B images first, to a level in a few pixels of a hundred.

    Two products with every row's resampling weights: no loop, nothing that waits for the device.
    """
    p, (images, _, height, width) = parameters, pixels.shape
    down = resample_weights(p.top, p.height, height, size[0], resample)
    across = resample_weights(p.left, p.width, width, size[1], resample)
    across = torch.where(p.flip.view(-1, 1, 1), across.flip(1), across).transpose(1, 2)
    values = pixels.to(torch.float32, memory_format=torch.contiguous_format).view(images, 1, 3 * height, width)
    # Pillow rounds and clips between its passes, too, horizontal first.
    values = torch.matmul(values, across.unflatten(0, (images, -1))).round_().clamp_(0.0, 255.0)
    return torch.matmul(down[:, None], values.view(-1, 3, height, size[1])).round_().clamp_(0.0, 255.0)


def resample_weights(start: Tensor, length: Tensor, inputs: int, outputs: int, resample: str) -> Tensor:
    """`[R, outputs, inputs]`: how much of each pixel of a line goes into each pixel of its resized box.

    Pillow's filters (triangle; cubic with a = -0.5), widened where the box shrinks; nothing outside the box is read.
    """
    scale = (length.float() / outputs).view(-1, 1, 1)
    begin, places = start.view(-1, 1, 1), torch.arange(outputs, device=start.device).view(1, -1, 1)
    index = torch.arange(inputs, device=start.device).view(1, 1, -1)
    # In units of the filter: small tensors first, then one pass over the large one.
    stretch = scale.clamp_min(1.0)
    x = (((index - begin) + 0.5) / stretch - (places + 0.5) * scale / stretch).abs_()
    if resample == "bilinear":
        weights = x.neg_().add_(1.0).clamp_min_(0.0)
    else:
        # Both pieces of the cubic as one sum: the far one, and beyond 1 nothing of what the near one has besides.
        u, v = (2.0 - x).clamp_min_(0.0), (1.0 - x).clamp_min_(0.0)
        weights = (u * u).mul_(u.sub_(1.0)).mul_(0.5).add_((v * v).mul_(v.mul_(-2.0).add_(1.0)))
    weights *= (index >= begin) & (index < begin + length.view(-1, 1, 1))
    return weights.div_(weights.sum(dim=2, keepdim=True))


# -- colours ------------------------------------------------------------------------------------------------------


def colour(values: Tensor, parameters: ViewParameters, steps: list[int] | None = None) -> Tensor:
    """Colour jitter, and grey before or after it. The values may be overwritten.

    `steps`: the order where it is the same for all rows, without the steps that none of them takes.
    """
    gray, first, factors = parameters.gray, parameters.gray_first, parameters.factors
    values = _where(values, gray & first, grayscale)
    if steps is None:
        values = jitter(values, parameters.order, factors)
    else:
        for kind in steps:
            values = _STEPS[kind](values, factors[:, kind])
    return _where(values, gray & ~first, grayscale)


def jitter(values: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of `[R, 3, h, w]` in 0..255, in every row's own `order` `[R, 4]`.

    The first three are mixtures `f x + (1 - f) base`, cut to 0..255: the base is black, the mean grey of the
    image, or the grey of the pixel. So all rows take one of them at a time in one pass, whichever it is: few calls,
    and nothing that waits for a device. The values may be overwritten.
    """
    for slot in range(4):
        kind = order[:, slot]
        factor = factors.gather(1, kind[:, None])[:, 0]
        turn = torch.where(kind == 3, factor, 0.0)
        values = _where(values, turn != 0, shift_hue, turn)
        mix = torch.where(kind == 3, 1.0, factor)
        gray = luma(values)
        mean = gray.mean(dim=(2, 3)) * ((1.0 - mix) * (kind == 1))[:, None]
        gray *= ((1.0 - mix) * (kind == 2)).view(-1, 1, 1, 1)
        base = gray.add_(mean[:, :, None, None])
        values = torch.addcmul(base, values, mix.view(-1, 1, 1, 1), out=values).clamp_(0.0, 255.0)
    return values


def brightness(values: Tensor, factor: Tensor) -> Tensor:
    """Values times `factor` `[R]`, in place."""
    return values.mul_(factor.view(-1, 1, 1, 1)).clamp_(0.0, 255.0)


def contrast(values: Tensor, factor: Tensor) -> Tensor:
    """Away from the mean grey of the image, or towards it, in place."""
    mean = values.flatten(2).mean(2) @ torch.tensor(_LUMA)
    base = torch.addcmul(mean, mean, factor, value=-1.0)
    return values.mul_(factor.view(-1, 1, 1, 1)).add_(base.view(-1, 1, 1, 1)).clamp_(0.0, 255.0)


def saturation(values: Tensor, factor: Tensor) -> Tensor:
    """Away from each pixel's own grey, or towards it, in place."""
    factor = factor.view(-1, 1, 1, 1)
    base = luma(values).mul_(1.0 - factor)
    return torch.addcmul(base, values, factor, out=values).clamp_(0.0, 255.0)


def luma(values: Tensor) -> Tensor:
    """`[R, 1, h, w]`: the grey of each pixel, ITU-R 601 as Pillow's."""
    red, green, blue = values.split(1, dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def grayscale(values: Tensor) -> Tensor:
    """`[R, 3, h, w]` with three equal channels."""
    return luma(values).expand_as(values)


def shift_hue(values: Tensor, turn: Tensor) -> Tensor:
    """The colours turned by `turn` `[R]` (from -0.5 to 0.5 of a full turn), saturation and value kept.

    Without going through HSV and back, and without a division: everything is in sixths of the colour circle times
    the chroma c, the largest channel less the smallest. A channel is the smallest plus `2 c - d`, cut to 0..c, where d
    is the distance of the new hue from the channel's own.
    """
    red, green, blue = values.split(1, dim=1)
    top, low = values.amax(dim=1, keepdim=True), values.amin(dim=1, keepdim=True)
    chroma = top - low
    base = low - chroma
    # The hue without a case for each channel: its distance from red is 2 p + | |g - b| - p |, where p is how far red is
    # below the largest; green and blue decide the side.
    side, below = green - blue, top - red
    hue = side.abs().sub_(below).abs_().add_(below, alpha=2.0).copysign_(side)
    # From -3 c to 3 c; red's own is at 0, green's at 2 c, blue's at -2 c. Offsets from -3 to 3 keep the difference
    # within 6 c, where 2 c - d is | |difference| - 3 c | - c.
    channels = torch.arange(3.0, -3.0, -2.0, device=turn.device)
    offsets = (6.0 * turn[:, None] + channels).remainder(6.0) - 3.0
    off = torch.addcmul(hue, chroma, offsets.view(-1, 3, 1, 1)).abs_().sub_(chroma, alpha=3.0).abs_().add_(base)
    return torch.clamp(off, low, top, out=off)


_STEPS = (brightness, contrast, saturation, shift_hue)


# -- blur ---------------------------------------------------------------------------------------------------------


def blur(values: Tensor, sigma: Tensor, max_sigma: float = 2.0, radius: int | None = None) -> Tensor:
    """Gaussian blur of `[R, 3, h, w]` in place with `sigma` `[R]` pixels, none where it is 0.

    The edge's pixels are repeated beyond it. A row's kernel ends at three deviations, rounded up to whole pixels, or at
    `radius`.
    """
    widest = math.ceil(3.0 * max_sigma)
    widest = widest if radius is None else min(radius, widest)
    reaches = (3.0 * sigma).ceil().clamp_max(widest).long()

    def change(values: Tensor, sigma: Tensor, reaches: Tensor) -> Tensor:
        return _blur(values, sigma, reaches, int(reaches.max()) if _on_cpu(values) else widest)

    return _where(values, reaches > 0, change, sigma, reaches)


def _blur(values: Tensor, sigma: Tensor, reaches: Tensor, radius: int) -> Tensor:
    """Along the lines, then across them, every channel of every row with its row's kernel."""
    offsets = torch.arange(-radius, radius + 1, device=values.device)
    kernels = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-3)[:, None]) ** 2) * (offsets.abs() <= reaches[:, None])
    kernels = (kernels / kernels.sum(dim=1, keepdim=True)).repeat_interleave(values.shape[1], dim=0)
    padded = F.pad(values, (radius, radius, radius, radius), mode="replicate").flatten(0, 1)[None]
    padded = F.conv2d(padded, kernels[:, None, None, :], groups=len(kernels))
    return F.conv2d(padded, kernels[:, None, :, None], groups=len(kernels)).view(values.shape)


def _where(values: Tensor, mask: Tensor, change: Callable[..., Tensor], *per_row: Tensor) -> Tensor:
    """In place `change(values, *per_row)` in the rows of `mask`.

    On a CPU it is computed for those rows only; elsewhere for all, since asking which they are would
    wait for the device.
    """
    if not _on_cpu(values):
        return torch.where(mask.view(-1, 1, 1, 1), change(values, *per_row), values, out=values)
    for rows in mask.nonzero().squeeze(1).split(max(1, _CACHED_ELEMENTS // values[0].numel())):
        if len(rows) == 0:
            continue
        first, last = int(rows[0]), int(rows[-1])
        if last - first + 1 == len(rows):  # a slice needs no copy
            some = values[first : last + 1]
            some.copy_(change(some, *(each[first : last + 1] for each in per_row)))
        else:
            _write(values, rows, change(values.index_select(0, rows), *(each[rows] for each in per_row)))
    return values


def _write(values: Tensor, rows: Tensor, new: Tensor) -> None:
    """`values[rows] = new`; a large row is copied faster alone than by index."""
    if values[0].numel() < 3 * _DENSE_SIDE**2:
        values[rows] = new
        return
    for row, value in zip(rows.tolist(), new.unbind(0), strict=True):
        values[row].copy_(value)


def _on_cpu(values: Tensor) -> bool:
    return values.device.type == "cpu"
