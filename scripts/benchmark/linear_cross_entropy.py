"""Output layer and cross-entropy in chunks beside logits + cross-entropy: time and memory, forward and backward.

    python scripts/benchmark/linear_cross_entropy.py                                  # 32k words, a few minutes
    python scripts/benchmark/linear_cross_entropy.py --threads 2 --frozen             # the output layer does not train
    python scripts/benchmark/linear_cross_entropy.py --chunks 64 128 256 512 1024     # compare chunks
    python scripts/benchmark/linear_cross_entropy.py --words 151936 --width 896 --tokens 1024

Plain is `F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")`, as transformers computes it.
`torch` is `torch.nn.functional.linear_cross_entropy` with its default options, where torch has it. No time is measured
before the losses and gradients of all agree. Memory is what a run needs above its inputs, gradients included.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import timing


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096], help="supervised tokens S")
    parser.add_argument("--words", type=int, default=32000, help="vocabulary V")
    parser.add_argument("--width", type=int, default=256, help="D of the hidden states")
    parser.add_argument("--frozen", action="store_true", help="the output layer does not train")
    parser.add_argument("--autocast", action="store_true", help="bf16 autocast around every run")
    parser.add_argument("--chunks", nargs="+", type=int, default=[], help="rows; by default the package's")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--without_torch", action="store_true", help="leave torch's own function out")
    parser.add_argument("--output", default=None, help="JSON file for all figures")
    return parser


class Problem:
    """Hidden states, output layer and targets of one size, and the contenders on them."""

    def __init__(self, tokens: int, arguments: argparse.Namespace) -> None:
        import torch

        generator = torch.Generator(arguments.device).manual_seed(0)
        options = {"generator": generator, "device": arguments.device}
        self.hidden = torch.randn(tokens, arguments.width, **options).requires_grad_()
        self.weight = (0.02 * torch.randn(arguments.words, arguments.width, **options)).requires_grad_(
            not arguments.frozen
        )
        self.targets = torch.randint(arguments.words, (tokens,), **options)
        self.autocast = torch.autocast(arguments.device, dtype=torch.bfloat16, enabled=arguments.autocast)

    def step(self, loss: Callable[..., Any], **options: Any) -> Callable[[], Any]:
        """Forward and backward, gradients dropped before, so that each run makes its own."""

        def run() -> Any:
            self.hidden.grad = self.weight.grad = None
            with self.autocast:
                value = loss(self.hidden, self.weight, self.targets, **options)
            value.backward()
            return value.detach()

        return run


def contenders(problem: Problem, arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Plain, torch's own and ours, in every chunk asked for."""
    import torch
    import torch.nn.functional as F

    from mllm_vision.functional.engine.linear_cross_entropy import CHUNK, linear_cross_entropy

    def plain(hidden: Any, weight: Any, targets: Any) -> Any:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")

    runs = {"plain": problem.step(plain)}
    own = getattr(F, "linear_cross_entropy", None)  # from 2.13 on
    if own is not None and not arguments.without_torch:
        runs["torch"] = problem.step(own, reduction="sum", options=torch.nn.LinearCrossEntropyOptions())
    for chunk in arguments.chunks or [CHUNK]:
        runs[f"ours, {chunk} rows"] = problem.step(linear_cross_entropy, chunk=chunk)
    return runs


def same_work(problem: Problem, runs: dict[str, Callable[[], Any]], tolerance: float) -> None:
    """Raises SystemExit unless all runs give the loss and the gradients of the plain one."""
    import torch

    expected: list[Any] = []
    for name, run in runs.items():
        found = [run(), problem.hidden.grad, problem.weight.grad]
        expected = expected or found
        for value, wanted in zip(found, expected, strict=True):
            if value is None or wanted is None:
                assert value is wanted
            elif not torch.allclose(value, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item()):
                raise SystemExit(f"{name}: differs from plain by {(value - wanted).abs().max().item()}")


def main(argv: list[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    import torch

    torch.set_num_threads(arguments.threads)
    print(timing.header())
    records, rows = [], []
    for tokens in arguments.tokens:
        problem = Problem(tokens, arguments)
        runs = contenders(problem, arguments)
        same_work(problem, runs, 3e-2 if arguments.autocast else 1e-4)
        times = timing.side_by_side(runs, rounds=arguments.rounds)
        needed = {}
        for name, run in runs.items():
            problem.hidden.grad = problem.weight.grad = None
            needed[name] = timing.peak_memory(run)
        for name, own in times.items():
            relative = timing.ratio(own, times["plain"])
            memory = f"{timing.show_bytes(needed[name])} ({needed[name] / needed['plain']:.3f}x)"
            rows.append([tokens, arguments.words, arguments.width, name, own, relative, memory])
            records.append({"S": tokens, "run": name, "seconds": own.seconds, "bytes": needed[name]})
    print(timing.table(["S", "V", "D", "run", "time (low to high)", "of plain", "memory"], rows))
    if arguments.output:
        told = {"machine": timing.header(), "arguments": vars(arguments), "records": records}
        Path(arguments.output).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
