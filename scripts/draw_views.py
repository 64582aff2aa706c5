"""A picture of the views that each method's policy makes: docs/images/views.png.

    python scripts/draw_views.py --output docs/images/views.png

One row a policy, with a picture and its first draws; local crops at their own size. The pictures are scenes, unless
--pictures names others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from mllm_vision.data import PictureCollator, ViewMaker, load_image
from mllm_vision.data.scenes import draw_scene, sample_scene

POLICIES = ("simclr", "moco_v1", "moco_v2", "byol", "dino", "mae", "clip")
GAP, LABEL = 4, 70


def draw(pictures: list[Image.Image], size: int, seed: int) -> Image.Image:
    """The grid of all policies; `pictures` are drawn square at `size`, beside their views."""
    batch = PictureCollator()([{"image": picture, "key": seed + i} for i, picture in enumerate(pictures)])
    lines = []
    for name in POLICIES:
        maker = ViewMaker(name, size, (0.0,) * 3, (1 / 255,) * 3, patch_size=size // 8)
        made, tiles = maker(batch), []
        for row, picture in enumerate(pictures):
            tiles.append(picture.resize((size, size)))
            for column in maker.columns:
                tiles += [to_picture(view) for view in made[column][row][: 2 if column == "views" else 3]]
        lines.append((name, tiles))
    width = max(sum(tile.width + GAP for tile in tiles) for _, tiles in lines) + LABEL
    canvas = Image.new("RGB", (width, (size + GAP) * len(lines)), "white")
    pen = ImageDraw.Draw(canvas)
    for number, (name, tiles) in enumerate(lines):
        left, top = LABEL, number * (size + GAP)
        pen.text((4, top + size // 2 - 6), name, fill="black")
        for tile in tiles:
            canvas.paste(tile, (left, top))
            left += tile.width + GAP
    return canvas


def to_picture(view: torch.Tensor) -> Image.Image:
    """`[3, h, w]` values of 0..255 as a picture."""
    return Image.fromarray(view.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/images/views.png"))
    parser.add_argument("--pictures", type=Path, nargs="+", default=[], help="image files in place of drawn scenes")
    parser.add_argument("--image_size", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    pictures = [load_image(path) for path in args.pictures]
    if not pictures:
        rngs = [np.random.default_rng([args.seed, number]) for number in range(2)]
        pictures = [draw_scene(sample_scene(rng, count=4), rng, image_size=2 * args.image_size) for rng in rngs]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(pictures, args.image_size, args.seed).quantize(255).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
