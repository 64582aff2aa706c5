"""Images of what an evaluator found: attention heads, patch components, the collapse board. Needs matplotlib only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_vision.utils import write_whole

SIDE = 128  # pixels of a tile
GAP = 4
LABEL = 16  # height of a line of words


def draw_heads(images: Sequence[Any], heads: Tensor, path: str | Path) -> Path:
    """A row an image: the image, the mean of the heads, each head; bright is where it looks, as a line below says.

    Args:
        images: B PIL images as the encoder sees them.
        heads: `[B, heads, h, w]`.
        path: a PNG file; its folder is made.
    """
    rows = []
    for image, maps in zip(images, heads, strict=True):
        together = torch.cat([maps.mean(dim=0, keepdim=True), maps])
        rows.append([_tile(image), *(_coloured(grid) for grid in together)])
    titles = ["image", "mean of heads", *(f"head {index + 1}" for index in range(heads.shape[1]))]
    return _write(rows, titles, path, "brightest: where it looks most", "each tile from 0 to its own greatest value")


def draw_patches(images: Sequence[Any], components: Tensor, path: str | Path) -> Path:
    """A row an image: the image, and its patches in the colours of their first three principal components.

    Args:
        images: B PIL images as the encoder sees them.
        components: `[B, h, w, 3]` in 0..1.
        path: a PNG file; its folder is made.
    """
    rows = [[_tile(image), _enlarged(grid.permute(2, 0, 1))] for image, grid in zip(images, components, strict=True)]
    return _write(rows, ["image", "patches"], path, "one colour: similar to the encoder", "(3 main components as RGB)")


def draw_board(
    spectra: Mapping[str, Sequence[float]],
    deviations: Mapping[str, Sequence[float]],
    figures: Mapping[str, float],
    path: str | Path,
) -> Path:
    """The collapse board: spectra over their index, standard deviations over dimensions, and the figures in words.

    Args:
        spectra: name -> eigenvalues in descending order, as shares of their sum.
        deviations: name -> standard deviations of the unit vectors' dimensions times sqrt(D), in descending order.
        figures: name -> value, listed beside.
        path: a PNG file; its folder is made.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 4, 2.4))
    for name, values in spectra.items():
        kept = [value for value in values if value > 1e-9 * max(values)]  # below it is rounding
        left.loglog(range(1, len(kept) + 1), kept, label=name, marker="." if len(kept) < 2 else None)
    if not any(max(values) > 0 for values in spectra.values()):
        left.text(0.5, 0.5, "no variance at all", ha="center", transform=left.transAxes)
    left.set(title="spectrum of the covariance", xlabel="index", ylabel="share of the variance")
    for name, values in deviations.items():
        middle.plot([place / max(1, len(values) - 1) for place in range(len(values))], values, label=name)
    middle.axhline(1.0, color="0.7", linewidth=1, linestyle="--")
    middle.set(title="deviation by dimension", xlabel="share of the dimensions", ylabel="std x sqrt(D); 1 is even")
    middle.set_ylim(bottom=0)
    for axes in (left, middle):
        axes.grid(alpha=0.3)
        if len(axes.get_lines()) > (axes is middle):
            axes.legend(fontsize=8)
    right.axis("off")
    lines = (
        f"{name.replace('_', ' '):<18}{value:>8{'.0f' if abs(value) >= 1000 else '.3g'}}"
        for name, value in figures.items()
    )
    words = "\n".join(lines)
    right.text(0, 1, words, va="top", family="monospace", fontsize=8, transform=right.transAxes)
    return write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))


def _tile(image: Any) -> Tensor:
    """A PIL image as `[3, SIDE, SIDE]` in 0..1; the pixels of a small one are kept visible."""
    import numpy as np

    if max(image.size) > SIDE:
        image = image.resize((SIDE, SIDE))
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    return _enlarged(pixels)


def _enlarged(values: Tensor) -> Tensor:
    return F.interpolate(values[None].float(), (SIDE, SIDE), mode="nearest")[0]


def _coloured(grid: Tensor) -> Tensor:
    """A map `[h, w]` as `[3, SIDE, SIDE]`: dark where it is zero, bright where it is greatest."""
    from matplotlib import colormaps

    shares = (grid / grid.max().clamp_min(1e-12)).clamp(0, 1)
    colours = torch.from_numpy(colormaps["inferno"](shares.numpy())[..., :3])
    return _enlarged(colours.permute(2, 0, 1))


def _write(rows: Sequence[Sequence[Tensor]], titles: Sequence[str], path: str | Path, *notes: str) -> Path:
    """Tiles `[3, SIDE, SIDE]` in rows under their titles, and notes below them."""
    from PIL import Image, ImageDraw

    width = len(titles) * (SIDE + GAP) - GAP
    bottom = LABEL + len(rows) * (SIDE + GAP)
    sheet = torch.ones(3, bottom + LABEL * len(notes), width)
    for line, row in enumerate(rows):
        for place, tile in enumerate(row):
            top, left = LABEL + line * (SIDE + GAP), place * (SIDE + GAP)
            sheet[:, top : top + SIDE, left : left + SIDE] = tile
    image = Image.fromarray(sheet.mul(255).round().byte().permute(1, 2, 0).numpy())
    pen = ImageDraw.Draw(image)
    for place, title in enumerate(titles):
        pen.text((place * (SIDE + GAP) + 2, 2), title, fill=(60, 60, 60))
    for place, note in enumerate(notes):
        pen.text((2, bottom + place * LABEL), note, fill=(60, 60, 60))
    return write_whole(path, lambda file: image.save(file, "PNG", optimize=True))
