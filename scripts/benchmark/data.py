"""From JPEG to training tensor on one core, and what of a training step is spent waiting for it.

    python scripts/benchmark/data.py --data ../shared/data

The JPEGs are mosaics of Flickr8k images in quality 90: the texture of photographs in the sizes that data sets of
photographs have. Four ways to make `[B, 3, 224, 224]` of a batch of them, in turn, on one thread:

- stock: decoded by Pillow, then the transformers image processor of CLIP, as every example does;
- PIL: decoded by Pillow, random crop, bicubic resize, then tensor, division and normalisation image by image,
  as the usual stack of transforms does;
- ours, training: `ImageTransform(train=True)`;
- ours, evaluation: `ImageTransform`, which gives the stock processor's pixels within one grey level.

Then steps of the model of scripts/benchmark/step.py over the larger JPEGs, through a `DataLoader`: how long the step
stood still until the next batch was there.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent))

from step import OurStep, build_clip, clip_tokenizer
from timing import Timing, header, side_by_side, speedup, table

from mllm_vision.data import ImageTransform, load_image
from mllm_vision.data.images.files import FORMATS
from mllm_vision.encoder.dual import DualEncoder

SIZES = ((640, 480), (320, 240))


def jpegs(images: Sequence[Image.Image], size: tuple[int, int], count: int, quality: int) -> list[bytes]:
    """`count` JPEGs of `size` (width, height), each a mosaic of images side by side."""
    rng, out = random.Random(0), []
    for _ in range(count):
        canvas, top = Image.new("RGB", size), 0
        while top < size[1]:
            left, below = 0, top
            while left < size[0]:
                image = images[rng.randrange(len(images))]
                canvas.paste(image, (left, top))
                left, below = left + image.width, max(below, top + image.height)
            top = below
        stream = io.BytesIO()
        canvas.save(stream, "JPEG", quality=quality)
        out.append(stream.getvalue())
    return out


def usual_crop(data: bytes, side: int, mean: torch.Tensor, std: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """One image as the usual transforms make it: a crop of 90 to 100 % of its area, `[3, side, side]`."""
    image = Image.open(io.BytesIO(data), formats=FORMATS).convert("RGB")
    for _ in range(10):
        area = image.width * image.height * rng.uniform(0.9, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        width, height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if width <= image.width and height <= image.height:
            break
    else:
        width, height = image.size
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    image = image.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BICUBIC)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    return tensor.sub_(mean).div_(std)


def decoding(images: Sequence[Image.Image], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Images per second of the four ways at each size."""
    from transformers import CLIPImageProcessor

    side = args.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    mean = torch.tensor(processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_std).view(3, 1, 1)
    training, evaluation = ImageTransform(processor, train=True), ImageTransform(processor)
    keys, found = list(range(args.count)), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for size in SIZES:
        batch, rng = jpegs(images, size, args.count, args.quality), random.Random(0)
        contenders = {
            "stock": lambda batch=batch: processor(
                images=[Image.open(io.BytesIO(data), formats=FORMATS) for data in batch], return_tensors="pt"
            )["pixel_values"],
            "PIL": lambda batch=batch, rng=rng: torch.stack([usual_crop(data, side, mean, std, rng) for data in batch]),
            "ours, training": lambda batch=batch: training(batch, keys=keys),
            "ours, evaluation": lambda batch=batch: evaluation(batch),
        }
        levels = (contenders["ours, evaluation"]() - contenders["stock"]()).abs() * std * 255
        if float(levels.max()) > 1.01:
            raise ValueError(f"evaluation is {float(levels.max()):.2f} grey levels from the stock processor")
        timings = side_by_side(contenders, rounds=args.rounds, warmup=1)
        kilobytes = sum(map(len, batch)) / len(batch) / 1000
        for name, timing in timings.items():
            entry = {"size": f"{size[0]}x{size[1]}", "kilobytes": kilobytes, "name": name, "seconds": timing.seconds}
            entry["images_per_second"] = args.count / timing.median
            for rival in ("stock", "PIL"):
                entry[f"times_{rival}"] = vars(speedup(timing, timings[rival]))
            found.append(entry)
    torch.set_num_threads(threads)
    return found


def waiting(images: Sequence[Image.Image], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of some training steps, the share spent until the loader gave the next batch."""
    from transformers import CLIPImageProcessorPil, CLIPProcessor

    tokenizer, side = clip_tokenizer(args.data), args.image_size
    square = {"height": side, "width": side}
    processor = CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square), tokenizer)
    model = build_clip(tokenizer, width=args.width, layers=args.layers, image_size=side, patch_size=args.patch_size)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        dual = DualEncoder.from_pretrained(folder).to(args.device)
    encoded = jpegs(images, SIZES[0], args.batch_size, args.quality)
    texts = [f"photograph number {number} of a mosaic of other photographs" for number in range(args.batch_size)]
    rows = [{"image": data, "captions": [text]} for data, text in zip(encoded, texts)] * (args.steps + 1)
    ours = OurStep(dual, rows, [])
    found = []
    for workers in args.workers:
        loader = DataLoader(ours.dataset, args.batch_size, collate_fn=ours.collator, num_workers=workers)
        batches, waits, steps = iter(loader), [], []
        for _ in range(args.steps + 1):
            start = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - start)
            ours.watch.begin()
            ours.train(batch)
            steps.append(time.perf_counter() - start)
        del batches
        waits, steps = waits[1:], steps[1:]  # the first wait is the workers' start
        shares = [wait / step for wait, step in zip(waits, steps)]
        entry = {"workers": workers, "share": statistics.median(shares), "low": min(shares), "high": max(shares)}
        found.append({**entry, "wait": statistics.median(waits), "step": statistics.median(steps)})
    return found


def show(figures: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    rows = []
    for each in figures["decoding"]:
        told = [each[f"times_{rival}"] for rival in ("stock", "PIL")]
        gains = [f"{gain['median']:.2f}x ({gain['low']:.2f} to {gain['high']:.2f})" for gain in told]
        label = f"{each['size']}, {each['kilobytes']:.0f} kB"
        rows.append([label, each["name"], f"{each['images_per_second']:.0f}", *gains, Timing("", each["seconds"])])
    lines = [
        f"{figures['machine']}; decoding on one thread, {figures['count']} images a time",
        "",
        table(["JPEG", "way", "images/s", "against stock", "against PIL", "time (low to high)"], rows),
    ]
    if figures["waiting"]:
        shares = []
        for each in figures["waiting"]:
            share = f"{each['share']:.2%} ({each['low']:.2%} to {each['high']:.2%})"
            shares.append([each["workers"], share, f"{each['wait'] * 1000:.1f} ms", f"{each['step']:.2f} s"])
        lines += ["", table(["loader workers", "share of a step waiting for data", "wait", "step"], shares)]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with flickr8k_train.parquet")
    parser.add_argument("--count", type=int, default=32, help="images in a batch of the first part")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    parser.add_argument("--rounds", type=int, default=9, help="of the first part")
    parser.add_argument("--steps", type=int, default=4, help="training steps of the second part; 0 leaves it out")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1], help="loader processes of the second part")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here too")
    args = parser.parse_args(argv)
    import pyarrow.parquet as pq

    column = pq.read_table(args.data / "flickr8k_train.parquet", columns=["image"])[:256].column("image")
    images = [load_image(row) for row in column.to_pylist()]
    figures = {"machine": header(), "count": args.count, "decoding": decoding(images, args)}
    figures["waiting"] = waiting(images, args) if args.steps else []
    print(show(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
