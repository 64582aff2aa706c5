"""SimCLR from the official code (google-research/simclr: objective.py, model_util.py, lars_optimizer.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import mlp, named, unit, vectors, warm_cosine


def _dcl(one, other, among, across, given):
    """The official code of DCL and DCLW: positive and negative part, the weights with a gradient."""
    likeness = (one * other).sum(1)
    positive = -likeness / given["temperature"]
    if given["dcl_sigma"] is not None:
        positive = positive * (2 - len(one) * torch.softmax(likeness / given["dcl_sigma"], 0))
    return (positive + torch.logsumexp(torch.cat([among, across], 1), 1)).mean()


def train(start, batches, given):
    width, hidden, out = given["width"], given["head_hidden"], given["head_out"]
    encoder = start.load(start.backbone, "encoder.backbone.")
    head = start.load(mlp(width, hidden, out, biases=(False, False), last_norm={}), "head.")
    head[-1].bias.requires_grad_(False)  # its last BatchNorm has no centre
    weights = [weight for part in (encoder, head) for weight in part.parameters() if weight.requires_grad]
    buffers, losses = [torch.zeros_like(weight) for weight in weights], []
    for step, batch in enumerate(batches):
        views = torch.cat(batch["views"].unbind(1))  # the first views, then the second: one batch for BatchNorm
        a, b = unit(head(vectors(encoder, views))).chunk(2)
        rows, temperature = len(a), given["temperature"]
        own = torch.eye(rows, dtype=a.dtype) * 1e9
        aa, bb = a @ a.T / temperature - own, b @ b.T / temperature - own
        ab, ba = a @ b.T / temperature, b @ a.T / temperature
        labels = torch.arange(rows)
        if given["decoupled"]:
            loss = _dcl(a, b, aa, ab - own, given) + _dcl(b, a, bb, ba - own, given)
        else:
            loss = F.cross_entropy(torch.cat([ab, aa], 1), labels) + F.cross_entropy(torch.cat([ba, bb], 1), labels)
        loss.backward()
        rate = warm_cosine(step, len(batches), given["warmup"], given["rate"])
        with torch.no_grad():
            for weight, buffer in zip(weights, buffers, strict=True):
                gradient, trust = weight.grad, 1.0
                if weight.ndim > 1:  # exclude_from_weight_decay, and so from adaptation
                    gradient = gradient + given["weight_decay"] * weight
                    trust = 0.001 * weight.norm() / gradient.norm() if weight.norm() * gradient.norm() > 0 else 1.0
                buffer.mul_(0.9).add_(rate * trust * gradient)  # the rate inside of the momentum
                weight.sub_(buffer)
                weight.grad = None
        losses.append(loss.item())
    return losses, named(encoder__backbone=encoder, head=head)
