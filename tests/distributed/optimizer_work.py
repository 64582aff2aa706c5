"""What the ranks do in test_optimizer_ranks.py."""

from __future__ import annotations

import torch
from torch import nn

from mllm_vision.training.optim.clipping import clip_per_parameter_
from mllm_vision.training.optim.layerwise import LAMB, LARS

SHAPES = ((6, 4), (4, 2), (8,))


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def steps(name: str, sharded: bool) -> list[torch.Tensor]:
    """Three steps, each gradient clipped by itself, over whole or sliced parameters; they come back whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    def place(tensor: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(tensor, mesh, [Shard(0)]) if sharded else tensor

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),)) if sharded else None
    parameters = [nn.Parameter(place(tensor)) for tensor in tensors(0)]
    if name == "lamb":
        optimizer: torch.optim.Optimizer = LAMB(parameters, lr=0.05, weight_decay=0.1)
    else:
        optimizer = LARS(parameters, lr=5.0, weight_decay=0.1, trust_coefficient=0.01, variant=name)
    norms = []
    for step in range(1, 4):
        for parameter, gradient in zip(parameters, tensors(step), strict=True):
            parameter.grad = place(gradient)
        norms.append(clip_per_parameter_(parameters, 2.0))
        optimizer.step()
    whole = [parameter.full_tensor() if sharded else parameter for parameter in parameters]
    return [tensor.detach().clone() for tensor in (*whole, *norms)]
