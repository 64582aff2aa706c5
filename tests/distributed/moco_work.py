"""What the ranks do in test_moco.py; importable, because workers unpickle by name."""

from __future__ import annotations

import torch
from itc_work import share
from linear_encoder import make_method, tiny_encoder, view_batch
from torch.nn.parallel import DistributedDataParallel

from mllm_vision.modules.shuffle import shuffled


def dealt(rows, keys, sizes, groups):
    """Each group less its mean, of this rank's share of rows that every rank holds."""
    return shuffled(lambda group: group - group.mean(0), share(rows, sizes), share(keys, sizes), groups=groups)


def trained(world, name, groups, steps=3):
    """A MoCo around a ResNet, its BatchNorms in so many groups a rank: losses, weights, teacher and queue."""
    objective = make_method(name, tiny_encoder("resnet"), batch_norm_groups=groups, momentum=0.8, queue_size=11).train()
    # the running statistics of a rank are those of its rows: the first rank's would be sent to the others
    model = DistributedDataParallel(objective, broadcast_buffers=False) if world > 1 else objective
    optimizer = torch.optim.SGD([value for value in objective.parameters() if value.requires_grad], lr=0.1)
    losses, sizes = [], [8 // world] * world
    for step in range(steps):
        batch = {key: share(value, sizes) for key, value in view_batch(8, seed=step).items()}
        optimizer.zero_grad()
        output = model(**batch)
        output.loss.backward()
        optimizer.step()
        objective.after_step((step + 1) / steps)
        losses.append(output.loss.item())
    state = {name: value.detach().clone() for name, value in objective.state_dict().items()}
    return losses, {name: value for name, value in state.items() if "running" not in name and "tracked" not in name}
