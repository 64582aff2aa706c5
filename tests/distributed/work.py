"""What the ranks do in the tests of this folder; importable, because workers unpickle by name."""

from __future__ import annotations

import warnings

import torch

from mllm_vision import distributed
from mllm_vision.functional.image_text import clip_loss, siglip_loss


def share(rows, sizes):
    """This rank's part of rows that every rank holds."""
    start = sum(sizes[: distributed.rank()])
    return rows[start : start + sizes[distributed.rank()]]


def collectives(sizes):
    rank = distributed.rank()
    rows = torch.full((sizes[rank], 2), float(rank + 1), requires_grad=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        gathered = distributed.all_gather_with_grad(rows)
        weights = torch.arange(gathered.numel(), dtype=torch.float32).view_as(gathered) * (rank + 1)
        (gathered * weights).sum().backward()
    averaged = distributed.mean_over_ranks({"b": torch.tensor(float(rank)), "a": torch.tensor(1.0)})
    return {
        "gathered": gathered.detach().clone(),
        "gradient": rows.grad.clone(),
        "ids": distributed.all_gather(torch.tensor([rank] * sizes[rank])),
        "counts": distributed.row_counts(rows),
        "mean": {key: value.item() for key, value in averaged.items()},
        "world": distributed.world_size(),
        "deprecated": [str(warning.message) for warning in told if "deprecated" in str(warning.message)],
    }


def losses(image, text, ids, dense, sizes, scale, bias):
    """Value and gradients of both losses with every kind of relation, after DDP's mean over ranks."""
    results = {}
    for name, relations in (("none", None), ("ids", ids), ("dense", dense)):
        for kind in ("clip", "siglip"):
            i, t = share(image, sizes).clone().requires_grad_(), share(text, sizes).clone().requires_grad_()
            s = torch.tensor(scale, dtype=image.dtype, requires_grad=True)
            b = torch.tensor(bias, dtype=image.dtype, requires_grad=True)
            own = None if relations is None else share(relations, sizes)
            loss = clip_loss(i, t, s, relations=own) if kind == "clip" else siglip_loss(i, t, s, b, relations=own)
            loss.backward()
            world = distributed.world_size()
            parameters = {"scale": s.grad} | ({"bias": b.grad} if kind == "siglip" else {})
            averaged = {}
            for key, value in parameters.items():
                value = value.clone()
                torch.distributed.all_reduce(value)
                averaged[key] = value / world
            gathered = [distributed.all_gather(x.grad) / world for x in (i, t)]
            results[name, kind] = (loss.item(), *gathered, averaged)
    return results


def objective_steps(kind, world, steps=3):
    """An objective trained by plain SGD, alone or inside DDP: losses, metrics, and all parameters at the end."""
    from pairs_for_tests import make_objective, pair_batches
    from torch.nn.parallel import DistributedDataParallel

    objective = make_objective(kind).train()
    model = DistributedDataParallel(objective) if world > 1 else objective
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    seen = []
    for step, batch in enumerate(pair_batches(steps, 8)):
        sizes = [8 // world] * world
        output = model(**{key: share(value, sizes) for key, value in batch.items()})
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        objective.after_step((step + 1) / steps)
        metrics = distributed.mean_over_ranks(output.metrics)
        seen.append((output.loss.item(), {key: value.item() for key, value in metrics.items()}))
    return seen, {name: value.detach().clone() for name, value in objective.named_parameters()}
