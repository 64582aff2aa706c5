"""Hadsell et al. 2006, equation 4 without its halves, pair by pair; the pairs as the method's docstring names them."""

from __future__ import annotations

import torch

from . import mlp, named, vectors, warm_cosine


def batch_loss(first, second, labels, given):
    rows, terms = len(labels), []
    for i in range(rows):
        partner = i  # alone in its class, or without one
        for step in range(1, rows + 1):
            j = (i + step) % rows
            if labels[i] >= 0 and labels[j] == labels[i]:
                partner = j
                break
        terms.append(((first[i] - second[partner]) ** 2).sum())
        j = (i + 1) % rows
        squared = ((first[i] - second[j]) ** 2).sum()
        similar = labels[i] >= 0 and labels[i] == labels[j]
        terms.append(squared if similar else torch.clamp(given["margin"] - squared.sqrt(), min=0) ** 2)
    return sum(terms) / len(terms)


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
        z = head(vectors(encoder, torch.cat(batch["views"].unbind(1))))
        loss = batch_loss(*z.chunk(2), batch["labels"].tolist(), given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, named(encoder__backbone=encoder, head=head)
