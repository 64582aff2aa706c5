"""What the ranks do in test_losses; importable, because workers unpickle by name."""

from __future__ import annotations

from functools import partial
from unittest.mock import patch

import torch
from work import share

from mllm_vision import distributed
from mllm_vision.functional import pairs, redundancy
from mllm_vision.functional.infonce import dcl, info_nce, sup_con
from mllm_vision.functional.pairs import STRATEGIES, batch_triplet, contrastive, triplet
from mllm_vision.functional.redundancy import barlow_twins, vicreg


def coupled_losses(exchange="gather", tile=None):
    """{name: loss of (z1, z2, labels, temperature)}; the temperature is learnt where there is one."""
    how = {"tile_size": tile, "exchange": exchange}

    def stacked(z1, z2, labels, temperature):
        return sup_con(torch.stack([z1, z2], 1), labels, temperature=temperature, **how)

    def own_negatives(z1, z2, labels, temperature):
        return info_nce(z1, z2, torch.stack([z1.roll(1, 1), z2 - z1], 1), temperature=temperature, **how)

    found = {
        "contrastive": lambda z1, z2, labels, t: contrastive(z1, z2, labels > 0, margin=4.0),
        "triplet": lambda z1, z2, labels, t: triplet(z1, z2, z2.roll(1, 1), margin=0.7),
        "info_nce with negatives of each": own_negatives,
        "dcl": lambda z1, z2, labels, t: dcl(z1, z2, temperature=t, **how),
        "dclw": lambda z1, z2, labels, t: dcl(z1, z2, temperature=t, sigma=0.5, **how),
        "sup_con": stacked,
        "sup_con without labels": lambda z1, z2, labels, t: stacked(z1, z2, None, t),
        "barlow_twins": lambda z1, z2, labels, t: barlow_twins(z1, z2),
        "barlow_twins by rows": lambda z1, z2, labels, t: barlow_twins(*widened(z1, z2)),
        "vicreg": lambda z1, z2, labels, t: vicreg(z1, z2),
        "vicreg by rows": lambda z1, z2, labels, t: vicreg(*widened(z1, z2)),
    }
    for strategy in STRATEGIES:
        found[strategy] = partial(_triplet, strategy=strategy)
    return found


def widened(*views):
    """More dimensions than twice the rows, none of them a copy of another."""
    return [torch.cat([view * (k + 1) ** 0.5 + view.roll(k, 1) ** 2 for k in range(6)], dim=1) for view in views]


def _triplet(z1, z2, labels, temperature, *, strategy):
    return batch_triplet(z1 + z2, labels, strategy=strategy, margin=0.7)[0]


def every_loss(z1, z2, labels, temperature, sizes, exchange, tile):
    """{name: (value, gradients of the gathered rows, the temperature's on this rank)}, as DDP's mean leaves them."""
    results = {}
    strip = tile * len(z1) if tile else pairs.STRIP
    for name, loss in coupled_losses(exchange, tile).items():
        rows = [share(z, sizes).clone().requires_grad_() for z in (z1, z2)]
        t = torch.tensor(temperature, dtype=z1.dtype, requires_grad=True)
        with patch.object(pairs, "STRIP", strip), patch.object(redundancy, "STRIP", strip):
            value = loss(*rows, share(labels, sizes), t)
        value.backward()
        gathered = [distributed.all_gather(row.grad) / distributed.world_size() for row in rows]
        results[name] = value.item(), gathered, 0.0 if t.grad is None else t.grad.item()
    return results
