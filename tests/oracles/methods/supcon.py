"""SupCon from the official code (HobbitLong/SupContrast: losses.py, main_supcon.py), without its factor T / 0.07.

As documented, the cosine begins after the warm-up and moves with every step, where it moves once an epoch there.
"""

from __future__ import annotations

import torch

from . import labelled_loop, unit


def batch_loss(z, labels, given):
    z, rows = unit(z), len(labels)
    labels = torch.where(labels < 0, -1 - torch.arange(rows), labels).repeat(2)  # without a label: a class alone
    others = 1 - torch.eye(2 * rows, dtype=z.dtype)
    same = (labels[:, None] == labels).to(z.dtype) * others
    logits = z @ z.T / given["temperature"]
    log_prob = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    return -((same * log_prob).sum(1) / same.sum(1)).mean()


def train(start, batches, given):
    return labelled_loop(start, batches, given, batch_loss)
