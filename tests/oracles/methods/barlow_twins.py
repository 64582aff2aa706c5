"""Barlow Twins from the official code (facebookresearch/barlowtwins, main.py)."""

from __future__ import annotations

import torch

from . import Lars, mlp, named, vectors, warm_cosine


def train(start, batches, given):
    width, hidden, out = given["width"], given["head_hidden"], given["head_out"]
    encoder = start.load(start.backbone, "encoder.backbone.")
    head = start.load(mlp(width, hidden, hidden, out, biases=(False, False, False)), "head.")
    norm = torch.nn.BatchNorm1d(out, affine=False).double()
    optimizer, losses = Lars([*encoder.parameters(), *head.parameters()], given["weight_decay"]), []
    for step, batch in enumerate(batches):
        first, second = batch["views"].unbind(1)
        h1, h2 = vectors(encoder, first), vectors(encoder, second)
        z1, z2 = head(h1), head(h2)
        c = norm(z1).T @ norm(z2) / len(z1)
        on_diagonal = (c.diagonal() - 1).square().sum()
        loss = on_diagonal + given["lambd"] * (c.square().sum() - c.diagonal().square().sum())
        loss.backward()
        steps, warmup = len(batches), given["warmup"]
        rates = (warm_cosine(step, steps, warmup, peak, 0.001 * peak) for peak in (given["rate"], given["bias_rate"]))
        optimizer.step(*rates)
        losses.append(loss.item())
    return losses, named(encoder__backbone=encoder, head=head)
