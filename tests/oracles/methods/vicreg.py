"""VICReg from the official code (facebookresearch/vicreg, main_vicreg.py)."""

from __future__ import annotations

import torch.nn.functional as F

from . import Lars, mlp, named, vectors, warm_cosine


def _covariance(z):
    centred = z - z.mean(0)
    c = centred.T @ centred / (len(z) - 1)
    return (c.square().sum() - c.diagonal().square().sum()) / z.shape[1]


def _hinge(z):
    return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2


def train(start, batches, given):
    width, hidden, out = given["width"], given["head_hidden"], given["head_out"]
    encoder = start.load(start.backbone, "encoder.backbone.")
    # the official expander has biases before its BatchNorms, which do nothing
    head = start.load(mlp(width, hidden, hidden, out, biases=(False, False, False)), "head.")
    optimizer, losses = Lars([*encoder.parameters(), *head.parameters()], given["weight_decay"]), []
    for step, batch in enumerate(batches):
        first, second = batch["views"].unbind(1)
        h1, h2 = vectors(encoder, first), vectors(encoder, second)
        x, y = head(h1), head(h2)
        loss = 25 * F.mse_loss(x, y) + 25 * (_hinge(x) + _hinge(y)) + _covariance(x) + _covariance(y)
        loss.backward()
        peak = given["rate"]
        optimizer.step(warm_cosine(step, len(batches), given["warmup"], peak, 0.001 * peak))
        losses.append(loss.item())
    return losses, named(encoder__backbone=encoder, head=head)
