"""The pixels of views: crops, colours, blur of a whole batch, each row with its own parameters.

Every operation treats its rows one by one, so a view does not depend on the batch that it is made in. Values run from
0 to 255; what Pillow would round to whole levels after each step stays a fraction here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .view_draws import ViewParameters

RESAMPLES = ("bilinear", "bicubic")
_CPU_ELEMENTS = 2**20  # of the views made at a time on a CPU: they stay in the cache from one operation to the next
_DEVICE_ELEMENTS = 2**27  # elsewhere: half a gigabyte a tensor
_DENSE_SIDE = 48  # pixels; up to here a product of small matrices is faster on a CPU than a call for every row
_LUMA = (0.299, 0.587, 0.114)
_HUES = torch.tensor([0.0, 2.0, -2.0]).view(1, 3, 1, 1)  # of red, green and blue, in sixths of a turn


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
    """`[B, V, 3, h, w]` float32: V views of each picture, cropped, flipped, coloured, blurred and normalised.

    Args:
        pixels: `[B, 3, H, W]` uint8.
        parameters: B x V of them, all views of the first picture before those of the second.
        size: (h, w) of the views.
        multiply, add: `[3]`; a value v of channel c becomes `v * multiply[c] + add[c]` at last.
        resample: "bilinear" or "bicubic", antialiased as Pillow's.
        max_sigma: no blur is wider.
        blur_radius: where the blur's kernel ends; by default at three deviations of the widest.
    """
    each = len(parameters) // len(pixels)
    elements = 3 * each * max(size[0] * size[1], pixels.shape[2] * pixels.shape[3] if size[0] <= _DENSE_SIDE else 1)
    step = max(1, (_CPU_ELEMENTS if _on_cpu(pixels) else _DEVICE_ELEMENTS) // elements)
    views = torch.empty(len(parameters), 3, *size, device=pixels.device)
    scale, shift = multiply.view(1, 3, 1, 1), add.view(1, 3, 1, 1)
    for start in range(0, len(pixels), step):
        rows = slice(start * each, (start + step) * each)
        some = parameters[rows]
        values = crop(pixels[start : start + step], some, size, resample)
        values = colour(values, some)
        values = blur(values, some.sigma, max_sigma, blur_radius)
        values = _where(values, some.solarize, lambda x: torch.where(x >= 127.5, 255.0 - x, x))
        torch.mul(values, scale, out=views[rows]).add_(shift)
    return views.unflatten(0, (len(pixels), each))


# -- geometry -----------------------------------------------------------------------------------------------------


def crop(pixels: Tensor, parameters: ViewParameters, size: tuple[int, int], resample: str) -> Tensor:
    """`[B x V, 3, h, w]` float32 in 0..255, whole levels: each box resized to `size`, mirrored where it says so.

    `pixels` `[B, 3, H, W]` uint8 and B x V parameters as in `make_views`.
    """
    if resample not in RESAMPLES:
        raise ValueError(f"resample={resample!r} is none of {', '.join(RESAMPLES)}")
    # Which of the two: they differ by a level in a few pixels of a hundred.
    if _on_cpu(pixels) and max(*pixels.shape[2:], *size) > _DENSE_SIDE:
        return _crop_by_row(pixels, parameters, size, resample)
    return _crop_by_products(pixels, parameters, size, resample)


def _crop_by_row(pixels: Tensor, parameters: ViewParameters, size: tuple[int, int], resample: str) -> Tensor:
    """A call of torch's 8-bit resize for every row: it reads the box only, and is fast on a CPU."""
    out, each = torch.empty(len(parameters), 3, *size), len(parameters) // len(pixels)
    p = parameters
    boxes = torch.stack([p.top, p.left, p.height, p.width, p.flip.long()], dim=1).tolist()
    for row, (top, left, height, width, flip) in enumerate(boxes):
        box = pixels[row // each][None, :, top : top + height, left : left + width]
        if (height, width) != size:
            box = F.interpolate(box, size, mode=resample, antialias=True, align_corners=False)
        out[row] = box[0].flip(-1) if flip else box[0]
    return out


def _crop_by_products(pixels: Tensor, parameters: ViewParameters, size: tuple[int, int], resample: str) -> Tensor:
    """Two products with every row's resampling weights: no loop, nothing that waits for the device."""
    p, (pictures, _, height, width) = parameters, pixels.shape
    down = resample_weights(p.top, p.height, height, size[0], resample)
    across = resample_weights(p.left, p.width, width, size[1], resample)
    across = torch.where(p.flip.view(-1, 1, 1), across.flip(1), across).transpose(1, 2)
    values = pixels.to(torch.float32, memory_format=torch.contiguous_format).view(pictures, 1, 3 * height, width)
    # Pillow rounds and clips between its passes, too, horizontal first.
    values = torch.matmul(values, across.unflatten(0, (pictures, -1))).round_().clamp_(0.0, 255.0)
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


def colour(values: Tensor, parameters: ViewParameters) -> Tensor:
    """Colour jitter in every row's own order, and grey before or after it."""
    gray, first = parameters.gray, parameters.gray_first
    values = _where(values, gray & first, grayscale)
    values = jitter(values, parameters.order, parameters.factors)
    return _where(values, gray & ~first, grayscale)


def jitter(values: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of `[R, 3, h, w]` in 0..255, in the `order` `[R, 4]`.

    The first three are mixtures `f x + (1 - f) base`, cut to 0..255: the base is black, the mean grey of the
    picture, or the grey of the pixel. So all rows take one of them at a time in one pass, whichever it is. The values
    may be overwritten.
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


def luma(values: Tensor) -> Tensor:
    """`[R, 1, h, w]`: the grey of each pixel, ITU-R 601 as Pillow's."""
    red, green, blue = values.split(1, dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def grayscale(values: Tensor) -> Tensor:
    """`[R, 3, h, w]` with three equal channels."""
    return luma(values).expand_as(values)


def shift_hue(values: Tensor, turn: Tensor) -> Tensor:
    """The colours turned by `turn` `[R]` (from -0.5 to 0.5 of a full turn), saturation and value kept.

    Without going through HSV and back: a channel is `low + chroma * clamp(2 - d, 0, 1)`, where d is the distance, in
    sixths of the colour circle, of the new hue from the channel's own.
    """
    red, green, blue = values.unbind(1)
    top = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = top - low
    share = chroma.clamp_min(1e-6).reciprocal_()
    # The hue without a case for each channel: its distance from red is u + t (3 - 2 u), where t is how far red is below
    # the largest and u how far green and blue are apart; green and blue decide the side.
    side = (green - blue).mul_(share)
    apart = side.abs()
    hue = apart.addcmul((top - red).mul_(share), 3.0 - 2.0 * apart).copysign_(side)
    hue += 6.0 * turn.view(-1, 1, 1)
    hue.sub_((hue / 6.0).round_(), alpha=6.0)
    out = (hue[:, None] - _HUES.to(values.device)).abs_().sub_(3.0).abs_().clamp_(1.0, 2.0)
    return torch.addcmul((low - chroma)[:, None], out, chroma[:, None], out=out)


# -- blur ---------------------------------------------------------------------------------------------------------


def blur(values: Tensor, sigma: Tensor, max_sigma: float = 2.0, radius: int | None = None) -> Tensor:
    """Gaussian blur of `[R, 3, h, w]` with `sigma` `[R]` pixels, none where it is 0; edge pixels go on beyond it."""
    widest = math.ceil(3.0 * max_sigma) if radius is None else radius
    # On a CPU the slight ones take a kernel of half the length, and reach three deviations with it all the same.
    narrow = widest // 2 if _on_cpu(values) else 0
    slight = (sigma > 0) & (3.0 * sigma <= narrow)
    if narrow:
        values = _where(values, slight, lambda x, s: _blur(x, s, narrow), sigma)
    return _where(values, (sigma > 0) & ~slight, lambda x, s: _blur(x, s, widest), sigma)


def _blur(values: Tensor, sigma: Tensor, radius: int) -> Tensor:
    rows, channels, height, width = values.shape
    offsets = torch.arange(-radius, radius + 1, device=values.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-3)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)[:, None, None]
    flat = values.reshape(1, rows * channels, height, width)
    flat = F.pad(flat, (radius, radius, radius, radius), mode="replicate")
    flat = F.conv2d(flat, kernel, groups=rows * channels)
    flat = F.conv2d(flat, kernel.transpose(2, 3), groups=rows * channels)
    return flat.view(rows, channels, height, width)


def _where(values: Tensor, mask: Tensor, change: Callable[..., Tensor], *per_row: Tensor) -> Tensor:
    """`change(values, *per_row)` in the rows of `mask`, and `values` elsewhere; on a CPU in place.

    On a CPU it is computed for those rows only; elsewhere for all, since asking which they are would wait for the
    device.
    """
    if not _on_cpu(values):
        return torch.where(mask.view(-1, 1, 1, 1), change(values, *per_row), values)
    rows = mask.nonzero().squeeze(1)
    if rows.numel():
        values[rows] = change(values[rows], *(each[rows] for each in per_row))
    return values


def _on_cpu(values: Tensor) -> bool:
    return values.device.type == "cpu"
