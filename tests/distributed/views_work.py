"""What the ranks do in test_image_methods.py; importable, because workers unpickle by name."""

from __future__ import annotations

import sys

import torch
from torch.nn.parallel import DistributedDataParallel
from views_for_tests import make_method, view_batch

from mllm_vision import distributed
from mllm_vision.objectives import load_objective
from mllm_vision.training.trainer.gradient_cache import cached_backward


def batch_of(count, step):
    """A batch of `count` rows, with labels of which some are missing, and seeds."""
    labels = torch.arange(count) % 4 - 1
    return {
        "views": view_batch(count, seed=step).double(),
        "labels": labels,
        "seeds": torch.arange(count) + 1000 * step,
    }


def build(name, config, folder=None):
    """A method around a tiny encoder; `folder` is where a method outside the package lies."""
    if folder is not None and folder not in sys.path:
        sys.path.insert(0, folder)
    return make_method(load_objective(name), encoder={"initializer_range": 0.2}, **config)


def trained(name, config, sizes, chunk=None, folder=None, steps=3, rate=0.05):
    """Losses and the state after some steps of SGD, on as many ranks as there are sizes, in chunks or not.

    In float64, so that steps that magnify rounding do not hide what differs.
    """
    objective = build(name, config, folder).double()
    model = DistributedDataParallel(objective) if len(sizes) > 1 else objective
    optimizer = torch.optim.SGD([value for value in objective.parameters() if value.requires_grad], lr=rate)
    start, losses = sum(sizes[: distributed.rank()]), []
    for step in range(steps):
        batch = objective.select_columns(batch_of(sum(sizes), step))
        batch = {name: rows[start : start + sizes[distributed.rank()]] for name, rows in batch.items()}
        optimizer.zero_grad()
        if chunk is None:
            output = model(**batch)
            output.loss.backward()
        else:
            no_sync = {"no_sync": model.no_sync} if len(sizes) > 1 else {}
            output = cached_backward(objective, batch, chunk, model=model, check=True, **no_sync)
        optimizer.step()
        objective.after_step((step + 1) / steps)
        losses.append(output.loss.item())
    return losses, {name: value.detach().clone() for name, value in objective.state_dict().items()}
