"""Gradient caching beside the plain step: what a big batch in chunks costs in time, and saves in memory.

    python scripts/benchmark/gradient_cache.py                       # 256 pairs, chunks of 16, 32 and 64
    python scripts/benchmark/gradient_cache.py --batch 1024 --chunks 64 --no-plain   # where the plain step does not fit
    python scripts/benchmark/gradient_cache.py --device cuda --batch 1024 --width 768 --layers 12 --image_size 224 \\
        --patch_size 16 --bf16

Both run a CLIP step (two towers, the loss over all pairs, clipping, fused AdamW) on the same rows. Before anything is
timed the gradients of both must agree. One more forward pass for all chunks but the last makes the floor: with a
backward pass of twice the forward's cost it is 1 + (1 - 1 / chunks) / 3 of the plain step's time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import timing

from mllm_vision.functional.image_text import clip_loss, siglip_loss
from mllm_vision.objectives.base import ObjectiveOutput
from mllm_vision.training.trainer.gradient_cache import cached_backward


class Pair(nn.Module):
    """Two CLIP towers with random weights; `embed` and `loss` as an objective has them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from transformers import (
            CLIPTextConfig,
            CLIPTextModelWithProjection,
            CLIPVisionConfig,
            CLIPVisionModelWithProjection,
        )

        super().__init__()
        sizes = {
            "hidden_size": arguments.width,
            "intermediate_size": 4 * arguments.width,
            "num_hidden_layers": arguments.layers,
            "num_attention_heads": max(1, arguments.width // 64),
            "projection_dim": arguments.width,
        }
        image = {"image_size": arguments.image_size, "patch_size": arguments.patch_size}
        self.vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, **image))
        self.text = CLIPTextModelWithProjection(
            CLIPTextConfig(**sizes, vocab_size=1000, max_position_embeddings=arguments.tokens, eos_token_id=2)
        )
        sigmoid = arguments.loss == "siglip"
        self.logit_scale = nn.Parameter(torch.tensor(10.0 if sigmoid else 1 / 0.07).log())
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if sigmoid else None

    def embed(self, pixel_values: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        return {"image": self.vision(pixel_values).image_embeds, "text": self.text(input_ids).text_embeds}

    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        image, text, scale = embeddings["image"], embeddings["text"], self.logit_scale.exp()
        if self.logit_bias is None:
            return ObjectiveOutput(loss=clip_loss(image, text, scale))
        return ObjectiveOutput(loss=siglip_loss(image, text, scale, self.logit_bias))

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> ObjectiveOutput:
        return self.loss(self.embed(pixel_values, input_ids))


class Bench:
    """The model, its optimizer and one batch, which stays on the CPU."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device, self.bf16 = torch.device(arguments.device), arguments.bf16
        self.model = Pair(arguments).to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        words = torch.randint(3, 1000, (arguments.batch, arguments.tokens))
        words[:, -1] = 2  # the end token, where CLIP pools
        side = arguments.image_size
        self.batch = {"pixel_values": torch.randn(arguments.batch, 3, side, side), "input_ids": words}

    def to_device(self, chunk: Any) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in chunk.items()}

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def gradient(self, chunk: int | None) -> Tensor:
        """Forward and backward, at once or in chunks; the loss."""
        self.optimizer.zero_grad()
        if chunk is not None:
            made = cached_backward(self.model, self.batch, chunk, prepare=self.to_device, autocast=self.autocast)
            return made.loss.detach()
        with self.autocast():
            loss = self.model(**self.to_device(self.batch)).loss
        loss.backward()
        return loss.detach()

    def step(self, chunk: int | None) -> None:
        self.gradient(chunk)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def difference(self, chunk: int) -> float:
        """Norm of the difference of both gradients by the norm of the plain one."""
        found = []
        for size in (None, chunk):
            self.gradient(size)
            found.append(torch.cat([value.grad.flatten().double() for value in self.model.parameters()]))
        return float((found[1] - found[0]).norm() / found[0].norm())


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", default="clip", choices=["clip", "siglip"])
    parser.add_argument("--batch", type=int, default=256, help="pairs in a batch")
    parser.add_argument("--chunks", nargs="+", type=int, default=[16, 32, 64], help="rows of a chunk, one or several")
    parser.add_argument("--width", type=int, default=256, help="of both towers")
    parser.add_argument("--layers", type=int, default=4, help="of both towers")
    parser.add_argument("--image_size", type=int, default=48)
    parser.add_argument("--patch_size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16, help="of a caption")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each")
    parser.add_argument("--threads", type=int, default=None, help="torch threads; default torch's own choice")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--no-plain", dest="plain", action="store_false", help="leave the plain step out")
    parser.add_argument("--output", default=None, help="JSON file for all figures")
    return parser


def main(argv: list[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    bench = Bench(arguments)
    sizes: list[int | None] = [None] if arguments.plain else []
    sizes += arguments.chunks
    if arguments.plain:
        allowed = 3e-2 if arguments.bf16 else 1e-4
        for chunk in arguments.chunks:
            if (apart := bench.difference(chunk)) > allowed:
                raise SystemExit(f"chunks of {chunk} give another gradient (relative difference {apart:.2g})")
    names = {size: "plain" if size is None else f"chunks of {size}" for size in sizes}
    results = timing.side_by_side(
        {name: lambda size=size: bench.step(size) for size, name in names.items()},  # type: ignore[misc]
        rounds=arguments.rounds,
    )
    memory = {name: timing.peak_memory(lambda size=size: bench.step(size)) for size, name in names.items()}
    rows, record = [], {}
    for size, name in names.items():
        count = 1 if size is None else -(-arguments.batch // size)
        share = timing.ratio(results[name], results["plain"]) if arguments.plain else None
        rows.append([name, results[name], share or "-", f"{1 + (1 - 1 / count) / 3:.2f}x",
                     timing.show_bytes(memory[name])])  # fmt: skip
        record[name] = {"seconds": results[name].seconds, "bytes": memory[name]}
        record[name] |= {"ratio": [share.median, share.low, share.high]} if share else {}
    print(timing.header())
    print(
        f"{arguments.loss}, {arguments.batch} pairs, {sum(p.numel() for p in bench.model.parameters()):,} parameters\n"
    )
    print(timing.table(["step", "time (lowest to highest)", "by the plain step's", "floor", "peak memory"], rows))
    if arguments.output:
        Path(arguments.output).write_text(
            json.dumps({"machine": timing.header(), **vars(arguments), "results": record})
        )


if __name__ == "__main__":
    main()
