"""Draw the views of each method's policy: docs/images/views.png.

    python scripts/draw_views.py --output docs/images/views.png

One row a policy, with an image and its first draws; three local crops at their own size. The images are scenes,
unless --images names others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from mllm_vision.data import ImageCollator, ViewMaker, load_image
from mllm_vision.data.scenes.scenes import draw_scene, sample_scene

POLICIES = ("simclr", "moco_v1", "moco_v2", "byol", "dino", "mae", "clip")
GAP, LABEL, TITLE = 4, 70, 18
LOCAL = 3  # local crops shown


def draw(images: list[Image.Image], size: int, seed: int) -> Image.Image:
    """The grid of all policies; `images` are drawn square at `size`, beside their views."""
    batch = ImageCollator()([{"image": image, "key": seed + i} for i, image in enumerate(images)])
    lines = []
    for name in POLICIES:
        maker = ViewMaker(name, size, (0.0,) * 3, (1 / 255,) * 3, patch_size=size // 8)
        made, blocks = maker(batch), []
        for row, image in enumerate(images):
            views = [to_image(view) for view in made["views"][row]]
            crops = [to_image(view) for view in made["local_views"][row][:LOCAL]] if maker.local_size else []
            blocks.append([image.resize((size, size)), *views, *crops])
        lines.append((name, blocks))
    # Every image has its columns, in all rows at the same place, and local crops begin after the second view.
    block = max(sum(tile.width + GAP for tile in tiles) for _, blocks in lines for tiles in blocks) + 2 * GAP
    canvas = Image.new("RGB", (LABEL + block * len(images), TITLE + (size + GAP) * len(lines)), "white")
    pen = ImageDraw.Draw(canvas)
    for row in range(len(images)):
        for column, title in enumerate(("image", "view 1", "view 2", "local crops")):
            pen.text((LABEL + row * block + column * (size + GAP) + 2, 3), title, fill="black")
    for number, (name, blocks) in enumerate(lines):
        top = TITLE + number * (size + GAP)
        pen.text((4, top + size // 2 - 6), name, fill="black")
        for row, tiles in enumerate(blocks):
            left = LABEL + row * block
            for tile in tiles:
                canvas.paste(tile, (left, top))
                left += tile.width + GAP
    return canvas


def to_image(view: torch.Tensor) -> Image.Image:
    """`[3, h, w]` values of 0..255 as an image."""
    return Image.fromarray(view.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/images/views.png"))
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="image files in place of drawn scenes")
    parser.add_argument("--image_size", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    images = [load_image(path) for path in args.images]
    if not images:
        rngs = [np.random.default_rng([args.seed, number]) for number in range(2)]
        images = [draw_scene(sample_scene(rng, count=4), rng, image_size=2 * args.image_size) for rng in rngs]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(images, args.image_size, args.seed).quantize(255).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
