"""FaceNet's triplets (Schroff et al. 2015) and the hardest ones (Hermans et al. 2017), one by one."""

from __future__ import annotations

import torch

from . import mlp, named, unit, vectors, warm_cosine


def batch_loss(z, labels, given):
    classes = [label if label >= 0 else -1 - i for i, label in enumerate(labels)] * 2
    margin, mining, terms = given["margin"], given["mining"], []
    d = ((z[:, None] - z[None]) ** 2).sum(-1)
    everyone = range(len(classes))
    for a in everyone:
        positives = [p for p in everyone if p != a and classes[p] == classes[a]]
        negatives = [n for n in everyone if classes[n] != classes[a]]
        if mining == "batch_hard":
            terms.append(torch.clamp(max(d[a, p] for p in positives) - min(d[a, n] for n in negatives) + margin, min=0))
            continue
        for p in positives:
            if mining == "batch_all":
                terms += [d[a, p] - d[a, n] + margin for n in negatives if d[a, p] - d[a, n] + margin > 0]
            elif semi_hard := [d[a, n] for n in negatives if d[a, p] < d[a, n] < d[a, p] + margin]:
                terms.append(d[a, p] - min(semi_hard) + margin)
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
        loss = batch_loss(unit(z), batch["labels"].tolist(), given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, named(encoder__backbone=encoder, head=head)
