"""SupCon from the official code (HobbitLong/SupContrast: losses.py, main_supcon.py), without its factor T / 0.07.

As documented, the cosine begins after the warm-up and moves with every step, where it moves once an epoch there.
"""

from __future__ import annotations

import torch

from . import mlp, named, unit, vectors, warm_cosine


def train(start, batches, given):
    width, hidden, out = given["width"], given["head_hidden"], given["head_out"]
    encoder = start.load(start.backbone, "encoder.backbone.")
    head = start.load(mlp(width, hidden, out, biases=(True, True), norm=False), "head.")
    weights = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(weights, given["rate"], momentum=0.9, weight_decay=given["weight_decay"])
    losses = []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = warm_cosine(
            step, len(batches), given["warmup"], given["rate"], 0.001 * given["rate"]
        )
        z = unit(head(vectors(encoder, torch.cat(batch["views"].unbind(1)))))
        rows = len(batch["views"])
        labels = torch.where(batch["labels"] < 0, -1 - torch.arange(rows), batch["labels"])  # without: a class alone
        labels = labels.repeat(2)
        others = 1 - torch.eye(2 * rows, dtype=z.dtype)
        same = (labels[:, None] == labels).to(z.dtype) * others
        logits = z @ z.T / given["temperature"]
        log_prob = logits - (logits.exp() * others).sum(1, keepdim=True).log()
        loss = -((same * log_prob).sum(1) / same.sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, named(encoder__backbone=encoder, head=head)
