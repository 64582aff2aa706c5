"""What the ranks do in test_engine; importable, because workers unpickle by name."""

from __future__ import annotations

import torch
from work import share

from mllm_vision import distributed
from mllm_vision.functional.image_text import clip_loss, siglip_loss
from mllm_vision.functional.infonce import info_nce, nt_xent


def _run(loss, leaves, weight=1.0):
    """Loss and gradients as DDP's mean over ranks leaves them: rows gathered, parameters averaged."""
    rows, parameters = leaves
    for leaf in (*rows, *parameters):
        leaf.grad = None
    value = loss()
    (weight * value).backward()
    world = distributed.world_size()
    found = [distributed.all_gather(leaf.grad) / world for leaf in rows]
    own = [leaf.grad.clone() for leaf in parameters]
    mean = [distributed.all_reduce(grad.clone()) / world for grad in own]
    return value.item(), found, mean, own


def every_loss(image, text, bank, ids, dense, sizes, scale, bias, tile, exchange):
    """All losses with every kind of relation: {name: (value, gathered gradients, averaged, own)}."""
    own = [share(rows, sizes).clone().requires_grad_() for rows in (image, text)]
    s, b = (torch.tensor(v, dtype=image.dtype, requires_grad=True) for v in (scale, bias))
    keys = bank.clone().requires_grad_()
    mine = share(dense, sizes)
    given = {
        "none": None,
        "ids": share(ids, sizes),
        "dense": mine,
        "callable": lambda rows, columns: dense[rows, columns],
        "sparse": mine.to_sparse_coo(),
    }
    how = {"tile_size": tile, "exchange": exchange}
    results = {}
    for name, relations in given.items():
        more = how | {"relations": relations}
        results["clip", name] = _run(lambda m=more: clip_loss(*own, s, **m), (own, [s]))
        results["siglip", name] = _run(lambda m=more: siglip_loss(*own, s, b, **m), (own, [s, b]))
    temperature = torch.tensor(1 / scale, dtype=image.dtype, requires_grad=True)
    results["nt_xent", ""] = _run(lambda: nt_xent(*own, temperature=temperature, **how), (own, [temperature]))
    results["info_nce", ""] = _run(lambda: info_nce(*own, temperature=temperature, **how), (own, [temperature]))
    banked = (own, [temperature, keys])
    results["info_nce", "bank"] = _run(lambda: info_nce(*own, keys, temperature=temperature, **how), banked)
    return results


def steep(image, text, sizes, scale, exchange):
    """Scores too far apart for one shift, in fp32, with a gradient weight as a loss scaler would give."""
    own = [share(rows, sizes).float().requires_grad_() for rows in (image, text)]
    s = torch.tensor(scale, requires_grad=True)
    return _run(lambda: clip_loss(*own, s, tile_size=3, exchange=exchange), (own, [s]), weight=1024.0)


def ring(sizes):
    """Which blocks a rank meets, and the gradient of its own rows when each rank adds its number plus one."""
    me = distributed.rank()
    local = torch.full((sizes[me], 2), float(me))
    columns = distributed.Columns(sizes, None, "ring")
    met = []
    blocks = columns.iterate(columns.hold(local), gradient=True)
    for start, block, gradient in blocks:
        met.append((start, block.clone()))
        gradient += me + 1
    return met, blocks.gradient


def subgroups(image, text, scale):
    """Two groups side by side: ranks 0 and 2 share one batch, rank 1 has its own."""
    import torch.distributed as dist

    groups = [dist.new_group([0, 2]), dist.new_group([1])]
    me = distributed.rank()
    group = groups[me % 2]
    sizes = [[3, 5], [8]][me % 2]
    first = 0 if me != 2 else sizes[0]
    last = first + sizes[0 if me != 2 else 1]
    results = []
    for exchange in ("gather", "ring"):
        own = [rows[first:last].clone().requires_grad_() for rows in (image, text)]
        loss = clip_loss(*own, scale, group=group, tile_size=2, exchange=exchange)
        loss.backward()
        results.append((loss.item(), own[0].grad / len(sizes), first, last))
    return results
