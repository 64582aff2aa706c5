"""SimCLR's views of decoded images: the usual per-image transforms against whole batches, per core.

    python scripts/benchmark/views.py --data ../shared/data

Both start from decoded images in memory and end with normalised float32 tensors, two views an image:

- PIL: scripts/benchmark/pil_views.py, image by image, stacked;
- ours: `ImageCollator` and `ViewMaker`, on the CPU in one thread, and on a GPU where there is one (the 8-bit pixels
  go to it inside the timing).

At 32 px the images are CIFAR-10's; at larger sizes Flickr8k's (160 px), scaled to a third more than the views.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))

from pil_views import draw_simclr, to_tensor
from timing import Timing, header, side_by_side, speedup, table

from mllm_vision.data import ImageCollator, ViewMaker, load_image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def measure(images: Sequence[Image.Image], size: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Views per second of each way at one size."""
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    rng, collator = random.Random(0), ImageCollator()
    maker = ViewMaker("simclr", size, MEAN, STD)
    rows = [{"image": image, "key": 7919 * index} for index, image in enumerate(images)]

    def usual() -> torch.Tensor:
        views = []
        for image in images:
            for _ in range(2):
                view = draw_simclr(image.size, rng).apply(image, (size, size), maker.policy.resample)
                views.append(to_tensor(view, mean, std))
        return torch.stack(views)

    def ours(where: str) -> torch.Tensor:
        return maker({name: column.to(where) for name, column in collator(rows).items()})["views"]

    contenders = {"PIL, image by image": usual, "batch, cpu": lambda: ours("cpu")}
    if device != "cpu":
        contenders[f"batch, {device}"] = lambda: ours(device)
    timings = side_by_side(contenders, rounds=rounds, warmup=2)
    found = []
    for name, timing in timings.items():
        gain = speedup(timing, timings["PIL, image by image"])
        found.append({"size": size, "name": name, "seconds": timing.seconds, "gain": vars(gain)})
        found[-1]["views_per_second"] = 2 * len(images) / timing.median
    return found


def show(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    rows = []
    for each in figures["views"]:
        gain = each["gain"]
        told = f"{gain['median']:.1f}x ({gain['low']:.1f} to {gain['high']:.1f})"
        rate = f"{each['views_per_second']:.0f}"
        rows.append([f"{each['size']} px", each["name"], rate, told, Timing("", each["seconds"])])
    titles = ["views", "way", "views/s", "against PIL", "time of the batch (low to high)"]
    return f"{figures['machine']}; {figures['count']} images, two views each\n\n{table(titles, rows)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the images")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 96])
    parser.add_argument("--count", type=int, default=128, help="images in a batch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    import pyarrow.parquet as pq

    found = []
    for size in args.sizes:
        name = "cifar10_test" if size <= 32 else "flickr8k_train"
        column = pq.read_table(args.data / f"{name}.parquet", columns=["image"])[: args.count].column("image")
        images = [load_image(row) for row in column.to_pylist()]
        if size > 32:
            images = [image.resize((size * 4 // 3, size * 4 // 3)) for image in images]
        found += measure(images, size, args.rounds, args.device)
    figures = {"machine": header(), "count": args.count, "views": found}
    print(show(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
