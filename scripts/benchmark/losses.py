"""The tiled losses beside the plain formulas and beside their floor: time and memory, forward and backward.

    python scripts/benchmark/losses.py                               # N = 1024 ... 8192, both losses, a few minutes
    python scripts/benchmark/losses.py --sizes 32768 --rounds 1      # ours only where the plain form does not fit
    python scripts/benchmark/losses.py --sizes 8192 --busy 1         # quiet, and beside one other busy process
    python scripts/benchmark/losses.py --sizes 8192 --tiles 256 512 1024 2048
    python scripts/benchmark/losses.py --ranks 2 --sizes 4096        # gather against ring, over gloo

Plain is the formula as open_clip writes it: for CLIP both matrices of logits and two cross-entropies, for SigLIP
-logsigmoid(labels * logits) over all pairs. Features come normalised, as there. The floor is the matrix products
alone: four of N x N x D for the softmax (scores, scores again, two gradients), three for the sigmoid, in tiles of the
same shapes, by `torch.mm`, each product on all threads. Memory is what a run needs above the features themselves,
gradients included. `--busy` repeats everything beside that many processes that do nothing but keep a core each, in
turn with the quiet rounds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import timing

TILE = 768  # of the floors
OTHERS = ("plain", "floor")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", default=["clip", "siglip"], choices=["clip", "siglip"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024, 2048, 4096, 8192], help="batch sizes N")
    parser.add_argument("--width", type=int, default=512, help="D of the features")
    parser.add_argument("--scale", type=float, default=14.3, help="logit scale")
    parser.add_argument("--bias", type=float, default=-10.0, help="logit bias of the sigmoid loss")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each")
    parser.add_argument("--threads", type=int, default=None, help="torch threads; default torch's own choice")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the features")
    parser.add_argument("--tiles", nargs="+", type=int, default=None, help="compare these tile sizes with one another")
    parser.add_argument("--ids", action="store_true", help="duplicates as positives: one row in eight has a twin")
    parser.add_argument("--busy", type=int, default=0, help="other busy processes beside a second run of everything")
    parser.add_argument("--ranks", type=int, default=1, help="more than one: gather beside ring, N over all ranks")
    parser.add_argument("--plain_gib", type=float, default=6.0, help="leave the plain form out beyond this memory")
    parser.add_argument("--output", default=None, help="JSON file for all figures")
    return parser


class Problem:
    """Features, scale and bias of one size, and the contenders on them."""

    def __init__(self, loss: str, size: int, arguments: argparse.Namespace) -> None:
        import torch
        import torch.nn.functional as F

        device, dtype = arguments.device, getattr(torch, arguments.dtype)
        generator = torch.Generator(device).manual_seed(0)
        shape = (size, arguments.width)
        rows = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
        self.image, self.text = (F.normalize(part, dim=-1).to(dtype).requires_grad_() for part in rows)
        self.scale = torch.tensor(arguments.scale, device=device, requires_grad=True)
        self.bias = torch.tensor(arguments.bias, device=device, requires_grad=True)
        twins = torch.arange(size, device=device)
        self.ids = torch.where(twins % 8 == 1, twins - 1, twins) if arguments.ids else None
        self.loss, self.size = loss, size

    def step(self, loss: Callable[..., Any], **flags: Any) -> Callable[[], None]:
        """Forward and backward, gradients dropped before, so that each run makes its own."""

        def run() -> None:
            self.drop_gradients()
            loss(**flags).backward()

        return run

    def drop_gradients(self) -> None:
        for leaf in (self.image, self.text, self.scale, self.bias):
            leaf.grad = None

    def plain(self) -> Any:
        import torch
        import torch.nn.functional as F

        if self.loss == "clip":
            by_image = self.scale * self.image @ self.text.T
            by_text = self.scale * self.text @ self.image.T
            labels = torch.arange(self.size, device=by_image.device)
            return (F.cross_entropy(by_image, labels) + F.cross_entropy(by_text, labels)) / 2
        logits = self.scale * self.image @ self.text.T + self.bias
        eye = torch.eye(self.size, device=logits.device, dtype=logits.dtype)
        labels = 2 * eye - torch.ones_like(eye)
        return -F.logsigmoid(labels * logits).sum() / self.size

    def ours(self, **flags: Any) -> Any:
        from mllm_vision.functional.image_text import clip_loss, siglip_loss

        flags = {"normalize": False, "relations": self.ids, **flags}
        if self.loss == "clip":
            return clip_loss(self.image, self.text, self.scale, **flags)
        return siglip_loss(self.image, self.text, self.scale, self.bias, **flags)

    @property
    def products(self) -> int:
        """Of N x N x D in the floor."""
        return 4 if self.loss == "clip" else 3

    def floor(self) -> None:
        """The products alone, in the order and the tiles of the losses."""
        import torch

        with torch.no_grad():
            image, text = self.image.detach(), self.text.detach()
            scores = image.new_empty(min(TILE, self.size) ** 2)
            for_image, for_text = torch.zeros_like(image), torch.zeros_like(text)
            for index in range(0, self.size, TILE):
                rows = slice(index, min(index + TILE, self.size))
                for other in range(0, self.size, TILE):
                    columns = slice(other, min(other + TILE, self.size))
                    shape = (rows.stop - rows.start, columns.stop - columns.start)
                    tile = scores[: shape[0] * shape[1]].view(shape)
                    for _ in range(self.products - 2):
                        torch.mm(image[rows], text[columns].T, out=tile)
                    for_image[rows].addmm_(tile, text[columns])
                    for_text[columns].addmm_(tile.T, image[rows])


def contenders(problem: Problem, arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Plain, ours (with `--ids` also without) and the floor; or ours in several tile sizes."""
    if arguments.tiles:
        return {f"tile {t}": problem.step(problem.ours, tile_size=t) for t in arguments.tiles}
    runs = {"ours": problem.step(problem.ours), "floor": problem.floor}
    if arguments.ids:
        runs = {"ours, ids": runs["ours"], "ours": problem.step(problem.ours, relations=None), "floor": problem.floor}
    if 5 * 4 * problem.size**2 <= arguments.plain_gib * 2**30:
        runs = {"plain": problem.step(problem.plain), **runs}
    return runs


@contextmanager
def company(count: int) -> Iterator[None]:
    """Other processes, each of which would keep a core to itself."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def one_process(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A record of every run, at every size, alone and beside busy processes."""
    records = []
    for loss in arguments.losses:
        for size in arguments.sizes:
            problem = Problem(loss, size, arguments)
            runs = contenders(problem, arguments)
            times = {(name, busy): timing.Timing(name) for name in runs for busy in (0, arguments.busy)}
            for round_ in range(arguments.rounds):  # quiet and busy in turn: they meet the same machine
                for busy in sorted({0, arguments.busy}):
                    with company(busy):
                        once = timing.side_by_side(runs, rounds=1, warmup=int(round_ == 0))
                    for name, found in once.items():
                        times[name, busy].seconds += found.seconds
            for (name, busy), own in times.items():
                record = {"loss": loss, "N": size, "D": arguments.width, "run": name, "busy": busy}
                record["seconds"] = own.seconds
                if name != "floor" and not busy:
                    problem.drop_gradients()  # or what a run frees at once would not count
                    record["bytes"] = timing.peak_memory(runs[name])
                for other in OTHERS:
                    if (other, busy) in times and name not in OTHERS:
                        record[f"to {other}"] = vars(timing.ratio(own, times[other, busy]))
                records.append(record)
    return records


def show(records: list[dict[str, Any]], width: int) -> str:
    """The table of `one_process`."""
    rows = []
    plain_bytes = {(r["loss"], r["N"]): r["bytes"] for r in records if r["run"] == "plain" and not r["busy"]}
    for record in sorted(records, key=lambda r: (r["loss"], r["N"], r["busy"])):
        key = record["loss"], record["N"]
        time_ = timing.Timing(record["run"], record["seconds"])
        needed = record.get("bytes")
        memory = "" if needed is None else timing.show_bytes(needed)
        if needed is not None and key in plain_bytes and record["run"] != "plain":
            memory += f" ({needed / plain_bytes[key]:.3f}x)"
        ratios = [str(timing.Ratio(**record[name])) if (name := f"to {o}") in record else "" for o in OTHERS]
        products = {"clip": 4, "siglip": 3}[record["loss"]]
        rate = "" if record["run"] == "plain" else f"{2e-9 * products * record['N'] ** 2 * width / time_.median:.0f}"
        rows.append([*key, record["busy"], record["run"], time_, *ratios, memory, rate])
    titles = ["loss", "N", "busy", "run", "time (low to high)", *(f"of {o}" for o in OTHERS), "memory", "GFLOP/s"]
    return timing.table(titles, rows)


def ranks_work(rank: int, store: str, arguments: argparse.Namespace, results: Any) -> None:
    """One rank of `over_ranks`: both exchanges in turn, a barrier before each run."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(arguments.threads or 1)
    backend = "nccl" if arguments.device == "cuda" else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=arguments.ranks)
    for loss in arguments.losses:
        for size in arguments.sizes:
            problem = Problem(loss, size // arguments.ranks, arguments)
            for exchange in ("gather", "ring"):
                problem.step(problem.ours, exchange=exchange)()
            for round_ in range(arguments.rounds):
                for exchange in ("gather", "ring")[:: 1 if round_ % 2 else -1]:
                    run = problem.step(problem.ours, exchange=exchange)
                    dist.barrier()
                    start = time.perf_counter()
                    run()
                    dist.barrier()
                    if rank == 0:
                        results.put((loss, size, exchange, time.perf_counter() - start, None))
            for exchange in ("gather", "ring"):
                dist.barrier()
                problem.drop_gradients()
                needed = timing.peak_memory(problem.step(problem.ours, exchange=exchange))
                if rank == 0:
                    results.put((loss, size, exchange, None, needed))
    dist.barrier()
    dist.destroy_process_group()


def over_ranks(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Gather beside ring on `--ranks` processes of this machine."""
    import multiprocessing
    import tempfile

    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            context.Process(target=ranks_work, args=(rank, f"{folder}/store", arguments, results))
            for rank in range(arguments.ranks)
        ]
        for worker in workers:
            worker.start()
        wanted = 2 * len(arguments.losses) * len(arguments.sizes) * (arguments.rounds + 1)
        found: dict[tuple, dict[str, Any]] = {}
        for _ in range(wanted):
            while results.empty():
                if any(worker.exitcode for worker in workers):
                    raise SystemExit("a rank ended with an error; see above")
                time.sleep(0.01)
            loss, size, exchange, seconds, needed = results.get()
            names = {"loss": loss, "N": size, "run": exchange, "ranks": arguments.ranks, "seconds": []}
            record = found.setdefault((loss, size, exchange), names)
            if seconds is not None:
                record["seconds"].append(seconds)
            else:
                record["bytes"] = needed
        for worker in workers:
            worker.join()
    return list(found.values())


def show_ranks(records: list[dict[str, Any]]) -> str:
    """The table of `over_ranks`."""
    times = {(r["loss"], r["N"], r["run"]): timing.Timing(r["run"], r["seconds"]) for r in records}
    rows = []
    for record in sorted(records, key=lambda r: (r["loss"], r["N"], r["run"])):
        key = record["loss"], record["N"]
        own = times[(*key, record["run"])]
        against = timing.ratio(own, times[(*key, "gather")]) if record["run"] == "ring" else ""
        rows.append([*key, record["ranks"], record["run"], own, against, timing.show_bytes(record["bytes"])])
    return timing.table(["loss", "N", "ranks", "exchange", "time (low to high)", "of gather", "memory a rank"], rows)


def main(argv: list[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(timing.header())
    if arguments.ranks > 1:
        records = over_ranks(arguments)
        print(show_ranks(records))
    else:
        records = one_process(arguments)
        print(show(records, arguments.width))
    if arguments.output:
        told = {"machine": timing.header(), "arguments": vars(arguments), "records": records}
        Path(arguments.output).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
