"""ITC's loss against the official formula: time and extra memory of loss and gradient, side by side.

    python scripts/benchmark/momentum.py --batch 256 --queue 57600 --width 256

The plain form is ALBEF's code with BLIP's duplicates: targets, softmaxes and their gradients as whole matrices of
batch x (batch + queue), one set for each direction.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

from timing import header, peak_memory, ratio, show_bytes, side_by_side, table

from mllm_vision.functional.momentum_contrast import momentum_contrast

ALPHA = 0.4


def plain(rows: dict, queues: dict, scale: torch.Tensor, ids: torch.Tensor, queue_ids: torch.Tensor) -> torch.Tensor:
    """The loss as the official code writes it."""
    unit = {name: F.normalize(value, dim=-1) for name, value in rows.items()}
    with torch.no_grad():
        text_all = torch.cat([unit["text_momentum"].t(), queues["text_queue"].t()], dim=1)
        image_all = torch.cat([unit["image_momentum"].t(), queues["image_queue"].t()], dim=1)
        positive = torch.eq(ids[:, None], torch.cat([ids, queue_ids])[None]).float()
        hard = positive / positive.sum(1, keepdim=True)
        soft_i = ALPHA * F.softmax(unit["image_momentum"] @ text_all * scale, dim=1) + (1 - ALPHA) * hard
        soft_t = ALPHA * F.softmax(unit["text_momentum"] @ image_all * scale, dim=1) + (1 - ALPHA) * hard
    by_image = -torch.sum(F.log_softmax(unit["image"] @ text_all * scale, dim=1) * soft_i, dim=1).mean()
    by_text = -torch.sum(F.log_softmax(unit["text"] @ image_all * scale, dim=1) * soft_t, dim=1).mean()
    return (by_image + by_text) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--queue", type=int, default=57600)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    lines = []
    for batch in arguments.batch:
        torch.manual_seed(0)
        width, names = arguments.width, ("image", "text", "image_momentum", "text_momentum")
        rows = {name: torch.randn(batch, width) for name in names}
        for name in ("image", "text"):
            rows[name].requires_grad_()
        queues = {
            name: F.normalize(torch.randn(arguments.queue, width), dim=-1) for name in ("image_queue", "text_queue")
        }
        ids, queue_ids = torch.randint(0, 20000, (batch,)), torch.randint(0, 20000, (arguments.queue,))
        scale = torch.tensor(1 / 0.07, requires_grad=True)

        def ours(rows: dict = rows, queues: dict = queues, scale=scale, ids=ids, queue_ids=queue_ids) -> None:
            loss = momentum_contrast(**rows, **queues, logit_scale=scale, alpha=ALPHA, ids=ids, queue_ids=queue_ids)
            torch.autograd.grad(loss, (rows["image"], rows["text"], scale))

        def theirs(rows: dict = rows, queues: dict = queues, scale=scale, ids=ids, queue_ids=queue_ids) -> None:
            loss = plain(rows, queues, scale, ids, queue_ids)
            torch.autograd.grad(loss, (rows["image"], rows["text"], scale))

        found = side_by_side({"ours": ours, "plain": theirs}, rounds=arguments.rounds)
        memory = {"ours": peak_memory(ours), "plain": peak_memory(theirs)}
        lines.append(
            [
                batch,
                found["plain"],
                found["ours"],
                ratio(found["ours"], found["plain"]),
                show_bytes(memory["plain"]),
                show_bytes(memory["ours"]),
            ]
        )
    print(header())
    print(f"queue {arguments.queue}, width {arguments.width}, {arguments.rounds} rounds")
    print(table(["batch", "plain", "ours", "time ratio", "plain memory", "our memory"], lines))


if __name__ == "__main__":
    main()
