"""What the ranks do in test_methods_ranks.py; importable, because workers unpickle by name."""

from __future__ import annotations


def trained(name, world, chunk=None):
    """Losses and state of a method after a few steps; see methods_for_tests."""
    from methods_for_tests import trained as train

    return train(name, world, chunk)


def resnet_trained(name):
    """The same on two ranks with a ResNet whose BatchNorm is over all ranks."""
    from methods_for_tests import trained as train

    return train(name, 2, kind="resnet_global")


def batch_norm(rows, sizes, kind, momentum, affine=True):
    """Output, gradients and buffers of a global BatchNorm on this rank's rows, after DDP's mean over ranks."""
    import torch
    import torch.distributed as dist

    from mllm_vision import distributed
    from mllm_vision.modules import batch_norm as module

    start = sum(sizes[: distributed.rank()])
    own = rows[start : start + sizes[distributed.rank()]].clone().requires_grad_()
    norm = getattr(module, kind)(rows.shape[1], momentum=momentum, affine=affine)
    if affine:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2, rows.shape[1]))
            norm.bias.copy_(torch.linspace(-1, 1, rows.shape[1]))
    out = norm(own)
    distributed.all_gather_with_grad(out).sin().sum().backward()  # a loss of all rows, computed by every rank
    world = distributed.world_size()
    weights = []
    for value in norm.parameters():
        dist.all_reduce(value.grad)
        weights.append(value.grad / world)
    gathered = [distributed.all_gather(value) for value in (out.detach(), own.grad / world)]
    return *gathered, weights, dict(norm.state_dict())
