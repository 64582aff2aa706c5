"""A training step beside a plain loop over transformers' `CLIPModel`: how long each part of it takes.

    python scripts/benchmark/step.py --data ../shared/data            # ViT-S/16 at 224, 12 x 384 texts, B = 32

Three contenders start from the same weights and take turns with the same rows of Flickr8k:

- plain: a loop as one writes it: decoded images through `CLIPProcessor`, captions padded to 77 tokens,
  `CLIPModel`, `torch.optim.AdamW` as it comes;
- ours: what `recipes/pretrain.py` runs: `PairDataset`, `PairCollator`, the `CLIP` objective, fused AdamW;
- ours, half: the same with `--patch_dropout 0.5`, which is other mathematics on purpose (FLIP).

Before anything is timed, one batch goes through plain and ours, and loss and gradients must agree. Speed-ups are
taken round by round (scripts/benchmark/timing.py). Data is made in the process itself, without workers, so that
its cost shows.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from timing import Timing, header, side_by_side, speedup, table

from mllm_vision.data import ImageTransform, PairCollator, PairDataset, load_records
from mllm_vision.encoder.dual import DualEncoder
from mllm_vision.objectives.clip import CLIP
from mllm_vision.training.optim.optimizers import parameter_groups

PARTS = ("data", "forward", "loss", "backward", "optimizer")
ADAMW: dict[str, Any] = {"lr": 5e-4, "betas": (0.9, 0.98), "eps": 1e-6}
WEIGHT_DECAY = 0.2


def clip_tokenizer(folder: Path) -> Any:
    """CLIP's own BPE from its vocabulary file, 49,408 ids."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    with gzip.open(folder / "tokenizers" / "clip_bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as stream:
        merges = stream.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    pairs = [tuple(merge.split()) for merge in merges]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=pairs, model_max_length=77)


def build_clip(tokenizer: Any, *, width: int, layers: int, image_size: int, patch_size: int) -> nn.Module:
    """A `CLIPModel` with random weights; both towers `layers` x `width`, activation and length as CLIP's."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
    }
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**sizes, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    vision = {**sizes, "image_size": image_size, "patch_size": patch_size}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)).train()


class Stopwatch:
    """Seconds of the parts of a step, step by step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[dict[str, float]] = []

    @contextmanager
    def part(self, name: str):
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.steps[-1][name] += time.perf_counter() - start

    def begin(self) -> None:
        self.steps.append(defaultdict(float))

    def medians(self, skip: int) -> dict[str, float]:
        return {part: statistics.median(step[part] for step in self.steps[skip:]) for part in PARTS}


class PlainLoop:
    """The loop that one writes first over `CLIPModel`."""

    def __init__(self, model: nn.Module, processor: Any, records: Any, batches: Sequence[Sequence[int]]) -> None:
        self.model, self.processor, self.records, self.batches = model, processor, records, batches
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY, **ADAMW)
        self.watch, self.turn = Stopwatch(self.device), 0

    def batch(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        examples = self.records[list(rows)]
        texts = [captions[0] for captions in examples["captions"]]
        batch = self.processor(
            text=texts,
            images=examples["image"],
            padding="max_length",
            truncation=True,
            max_length=77,
            return_tensors="pt",
        )
        return {name: batch[name].to(self.device) for name in ("pixel_values", "input_ids", "attention_mask")}

    def losses(self, batch: dict[str, torch.Tensor], part: Callable[[str], Any]) -> torch.Tensor:
        with part("forward"):
            logits = self.model(**batch).logits_per_text
        with part("loss"):  # what return_loss=True adds
            target = torch.arange(len(logits), device=logits.device)
            return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def step(self) -> None:
        watch = self.watch
        watch.begin()
        with watch.part("data"):
            batch = self.batch(self.batches[self.turn % len(self.batches)])
        loss = self.losses(batch, watch.part)
        with watch.part("backward"):
            loss.backward()
        with watch.part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.turn += 1


class OurStep:
    """The same step from the parts that the recipe puts together."""

    def __init__(
        self, dual: DualEncoder, records: Any, batches: Sequence[Sequence[int]], patch_dropout: float = 0.0
    ) -> None:
        self.objective = CLIP(dual, CLIP.Config(patch_dropout=patch_dropout)).train()
        self.device, self.batches = dual.logit_scale.device, batches
        transform = ImageTransform(dual.vision.processor, train=True)
        self.dataset = PairDataset(records, {"image": "image", "caption": "captions"}, transform=transform)
        self.collator = PairCollator(transform, dual.tokenizer, dual.max_text_length)
        groups = parameter_groups(self.objective, weight_decay=WEIGHT_DECAY, learning_rate=ADAMW["lr"])
        self.optimizer = torch.optim.AdamW(groups, fused=True, **ADAMW)  # the default of --optim
        self.watch, self.turn = Stopwatch(self.device), 0

    def step(self) -> None:
        self.watch.begin()
        with self.watch.part("data"):
            rows = [self.dataset[row] for row in self.batches[self.turn % len(self.batches)]]
            batch = self.collator(rows)
        self.train(batch)
        self.turn += 1

    def train(self, batch: dict[str, torch.Tensor]) -> None:
        """Everything after the data."""
        watch = self.watch
        with watch.part("data"):
            batch = {name: value.to(self.device) for name, value in batch.items()}
        with watch.part("forward"):
            embeddings = self.objective.embed(**batch)
        with watch.part("loss"):
            loss = self.objective.loss(embeddings).loss
        with watch.part("backward"):
            loss.backward()
        with watch.part("optimizer"):
            self.optimizer.step()
            self.objective.after_step(0.0)
            self.optimizer.zero_grad()


def agreement(plain: PlainLoop, ours: OurStep, rows: Sequence[int]) -> dict[str, float]:
    """One batch through both: the relative difference of the loss, and the largest of any parameter's gradient.

    Raises:
        ValueError: they do not compute the same.
    """
    from contextlib import nullcontext

    batch = plain.batch(rows)
    theirs = plain.losses(batch, lambda name: nullcontext())
    theirs.backward()
    loss = ours.objective(**batch).loss
    loss.backward()
    difference = abs(loss.item() - theirs.item()) / abs(theirs.item())
    prefixes = {"vision_model.": "vision.backbone.", "text_model.": "text."}
    own = dict(ours.objective.dual.named_parameters())
    worst = 0.0
    for name, parameter in plain.model.named_parameters():
        for old, new in prefixes.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        gradient = own.pop(name).grad
        if gradient is None:
            raise ValueError(f"not the same mathematics: {name} has no gradient")
        # Keys' biases have no gradient but rounding: softmax does not see them.
        if not name.endswith("k_proj.bias"):
            scale = parameter.grad.abs().max().clamp_min(1e-8)
            worst = max(worst, ((gradient - parameter.grad).abs().max() / scale).item())
    if own or difference > 1e-4 or worst > 1e-2:
        raise ValueError(f"not the same mathematics: loss {difference:.1e}, gradients {worst:.1e}, left over {[*own]}")
    plain.optimizer.zero_grad()
    ours.optimizer.zero_grad()
    return {"loss": difference, "gradient": worst}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Builds the contenders, compares them, times them; the figures as one dict."""
    from datasets import Image, load_dataset
    from transformers import CLIPImageProcessorPil, CLIPProcessor

    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    file = str(args.data / "flickr8k_train.parquet")
    tokenizer = clip_tokenizer(args.data)
    square = {"height": args.image_size, "width": args.image_size}
    processor = CLIPProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": args.image_size}, crop_size=square), tokenizer
    )
    records = load_records(file)
    decoded = load_dataset("parquet", data_files=file, split="train").cast_column("image", Image())
    batches = [range(start, start + args.batch_size) for start in range(0, 8 * args.batch_size, args.batch_size)]
    model = build_clip(
        tokenizer, width=args.width, layers=args.layers, image_size=args.image_size, patch_size=args.patch_size
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        duals = [DualEncoder.from_pretrained(folder).to(device) for _ in range(2)]
    plain = PlainLoop(model.to(device), processor, decoded, batches)
    ours = OurStep(duals[0], records, batches)
    agreed = agreement(plain, ours, batches[-1])
    half = OurStep(duals[1], records, batches, patch_dropout=args.patch_dropout)
    contenders = {"plain": plain, "ours": ours, f"ours, patch_dropout {args.patch_dropout:g}": half}
    timings = side_by_side({name: each.step for name, each in contenders.items()}, rounds=args.rounds, warmup=1)
    return {
        "machine": header(),
        "batch_size": args.batch_size,
        "agreement": agreed,
        "contenders": {
            name: {
                "seconds": timings[name].seconds,
                "images_per_second": args.batch_size / timings[name].median,
                "speedup": vars(speedup(timings[name], timings["plain"])),
                "parts": each.watch.medians(skip=1),
            }
            for name, each in contenders.items()
        },
    }


def show(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    rows = []
    for name, each in figures["contenders"].items():
        timing, gain = Timing(name, each["seconds"]), each["speedup"]
        parts = [f"{each['parts'][part]:.3f}" for part in PARTS]
        told = "1" if name == "plain" else f"{gain['median']:.2f}x ({gain['low']:.2f} to {gain['high']:.2f})"
        rows.append([name, f"{each['images_per_second']:.2f}", told, timing, *parts])
    agreed = figures["agreement"]
    titles = ["step", "images/s", "speed-up (low to high)", "time (low to high)", *(f"{part} [s]" for part in PARTS)]
    return (
        f"{figures['machine']}; B = {figures['batch_size']}\n"
        f"ours against plain on one batch: loss differs by {agreed['loss']:.0e}, gradients by {agreed['gradient']:.0e}"
        f" of each parameter's largest\n\n{table(titles, rows)}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with flickr8k_train.parquet")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contender")
    parser.add_argument("--patch_dropout", type=float, default=0.5, help="of the third contender")
    parser.add_argument("--width", type=int, default=384, help="of both towers")
    parser.add_argument("--layers", type=int, default=12, help="of both towers")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=None, help="default: what torch takes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here too")
    args = parser.parse_args(argv)
    figures = measure(args)
    print(show(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
