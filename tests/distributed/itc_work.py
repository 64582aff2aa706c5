"""What the ranks do in test_itc.py; importable, because workers unpickle by name."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mllm_vision import distributed
from mllm_vision.functional.momentum_contrast import momentum_contrast
from mllm_vision.modules.queue import FeatureQueue


def share(rows, sizes):
    """This rank's part of rows that every rank holds."""
    start = sum(sizes[: distributed.rank()])
    return rows[start : start + sizes[distributed.rank()]]


def loss_and_gradients(rows, queues, ids, queue_ids, sizes, scale, tile_size):
    """The loss on every rank, and the gradients after DDP's mean over ranks."""
    own = {name: share(value, sizes).clone() for name, value in rows.items()}
    image, text = own["image"].requires_grad_(), own["text"].requires_grad_()
    scale = torch.tensor(scale, dtype=image.dtype, requires_grad=True)
    loss = momentum_contrast(
        **own, **queues, logit_scale=scale, ids=share(ids, sizes), queue_ids=queue_ids, tile_size=tile_size
    )
    loss.backward()
    world = distributed.world_size()
    dist.all_reduce(scale.grad)
    gathered = [distributed.all_gather(value.grad) / world for value in (image, text)]
    return loss.item(), *gathered, scale.grad.item() / world


def queue_rows(sizes, size):
    """Three enqueues of rows that count upwards over the ranks: what every rank then holds."""
    queue, total = FeatureQueue(size, 1, id_columns=1), sum(sizes)
    for step in range(3):
        values = torch.arange(step * total, (step + 1) * total)
        queue.enqueue(share(values[:, None].float(), sizes), share(values[:, None] + 5, sizes))
    return queue.rows.clone(), queue.ids.clone(), int(queue.written)


def trained(world, chunk=None, steps=4):
    """An ITC objective trained by SGD, alone or inside DDP, in chunks or not: losses and its whole state."""
    from pairs_for_tests import make_objective, pair_batches

    from mllm_vision.training.trainer.gradient_cache import cached_backward

    objective = make_objective("itc", queue_size=19, momentum=0.8).train()
    model = DistributedDataParallel(objective) if world > 1 else objective
    optimizer = torch.optim.SGD([value for value in objective.parameters() if value.requires_grad], lr=0.1)
    losses, sizes = [], [8 // world] * world
    for step, batch in enumerate(pair_batches(steps, 8)):
        batch = {key: share(value, sizes) for key, value in batch.items()}
        optimizer.zero_grad()
        if chunk is None:
            output = model(**batch)
            output.loss.backward()
        else:
            no_sync = {"no_sync": model.no_sync} if world > 1 else {}
            output = cached_backward(objective, batch, chunk, model=model, check=True, **no_sync)
        optimizer.step()
        objective.epoch = (step + 1) / 3
        objective.after_step((step + 1) / steps)
        losses.append(output.loss.item())
    return losses, {name: value.detach().clone() for name, value in objective.state_dict().items()}


def bytes_sent_in_forward():
    """How many buffer entries DDP sends with each forward pass: the queue must not be among them."""
    from pairs_for_tests import make_objective

    objective = make_objective("itc", queue_size=5000)
    model = DistributedDataParallel(objective)
    return sum(buffer.numel() for buffer in model.modules_buffers), objective.queue.features.numel()
