"""MoCo v1 and v2 from the official code (facebookresearch/moco: builder.py, main_moco.py) and its CIFAR-10 notebook.

As documented, the queue starts empty instead of with random vectors: in the first step the keys of the batch's other
images stand in for it. A slow copy's BatchNorms see its rows in another order and in groups, as on several GPUs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mllm_vision.functional.random import uniform

from . import follow, named, slow_copy, unit, vectors


class SplitBatchNorm(torch.nn.BatchNorm2d):
    """The notebook's: every group of rows by its own statistics, and the running ones by the mean of the groups."""

    groups = 1

    def forward(self, rows):
        if not self.training:
            return super().forward(rows)
        self.num_batches_tracked += 1
        old, found, new = (self.running_mean.clone(), self.running_var.clone()), [], []
        for part in rows.chunk(self.groups):
            mean, variance = (value.clone() for value in old)
            found.append(F.batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps))
            new.append((mean, variance))
        self.running_mean.copy_(torch.stack([mean for mean, _ in new]).mean(0))
        self.running_var.copy_(torch.stack([variance for _, variance in new]).mean(0))
        return torch.cat(found)


def split(network, groups):
    for norm in network.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.__class__, norm.groups = SplitBatchNorm, groups
    return network


class Queue:
    """The last keys, in the order of their coming."""

    def __init__(self, size):
        self.size, self.keys = size, None

    def add(self, keys):
        keys = keys if self.keys is None else torch.cat([self.keys, keys])
        self.keys = keys[-self.size :].detach()


def contrast(query, key, queue, temperature):
    """Cross-entropy of each query to its key against the queue; without one against the batch's other keys."""
    if queue.keys is None:
        return F.cross_entropy(query @ key.T / temperature, torch.arange(len(query)))
    positive = (query * key).sum(1, keepdim=True)
    logits = torch.cat([positive, query @ queue.keys.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


def networks(start, head, groups):
    """(query network, key network): encoder and head each."""
    encoder = split(start.load(start.backbone, "encoder.backbone."), groups)
    fast = torch.nn.ModuleList([encoder, start.load(head, "head.")])
    return fast, slow_copy(fast)


def state_of(fast, slow):
    """Their weights by name."""
    both = {"encoder__backbone": fast[0], "head": fast[1]}
    return named(**both, teacher__module__encoder__backbone=slow[0], teacher__module__head=slow[1])


def keys_of(slow, views, seeds):
    """Keys of the views, their rows dealt anew for BatchNorm and put back."""
    order = uniform(seeds, 1000, 1)[:, 0].argsort(stable=True)
    with torch.no_grad():
        return unit(slow[1](vectors(slow[0], views[order])))[order.argsort()]


def train(start, batches, given, head, rate_at):
    fast, slow = networks(start, head, given["batch_norm_groups"])
    queue, losses = Queue(given["queue_size"]), []
    optimizer = torch.optim.SGD(fast.parameters(), given["rate"], momentum=0.9, weight_decay=given["weight_decay"])
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate_at(step, len(batches))
        first, second = batch["views"].unbind(1)
        follow(slow, fast, given["momentum"])  # the key encoder is updated first
        query = unit(fast[1](vectors(fast[0], first)))
        key = keys_of(slow, second, batch["seeds"])
        loss = contrast(query, key, queue, given["temperature"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue.add(key)
        losses.append(loss.item())
    follow(slow, fast, given["momentum"])  # what the next step would begin with
    return losses, state_of(fast, slow)
