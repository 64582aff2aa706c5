"""A rank of test_engine's torchrun: two linear towers, a scale and a bias under DistributedDataParallel, in float64.

torchrun --nproc-per-node 3 engine_torchrun.py batch.pt found.pt
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from mllm_vision.functional.image_text import clip_loss, siglip_loss


class Pair(nn.Module):
    """Both losses of one batch, so that every parameter is used."""

    def __init__(self, weights: dict[str, torch.Tensor], exchange: str) -> None:
        super().__init__()
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value.clone()))
        self.exchange = exchange

    def forward(self, image: torch.Tensor, text: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        towers, more = (image @ self.image, text @ self.text), {"relations": ids, "exchange": self.exchange}
        return clip_loss(*towers, self.scale, **more) + siglip_loss(*towers, self.scale, self.bias, **more)


def main(batch_file: str, found_file: str) -> None:
    dist.init_process_group("gloo")
    batch = torch.load(batch_file, weights_only=True)
    sizes = batch["sizes"][dist.get_world_size()]
    own = slice(sum(sizes[: dist.get_rank()]), sum(sizes[: dist.get_rank() + 1]))
    found = {}
    for exchange in ("gather", "ring"):
        model = nn.parallel.DistributedDataParallel(Pair(batch["weights"], exchange))
        loss = model(*(batch[name][own] for name in ("image", "text", "ids")))
        loss.backward()
        found[exchange] = {name: value.grad for name, value in model.module.named_parameters()} | {
            "loss": loss.detach()
        }
    if dist.get_rank() == 0:
        torch.save(found, found_file)
    dist.barrier()  # rank 0 has written
    # DDP keeps gloo's threads alive behind destroy_process_group, and one of them that lets go of a tensor while the
    # interpreter goes down aborts the process (PyTorch #179291): this one ends without going down
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
