"""FaceNet's triplets (Schroff et al. 2015) and the hardest ones (Hermans et al. 2017), one by one."""

from __future__ import annotations

import torch

from . import labelled_loop, unit


def batch_loss(z, labels, given):
    z, labels = unit(z), labels.tolist()
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
    return labelled_loop(start, batches, given, batch_loss)
