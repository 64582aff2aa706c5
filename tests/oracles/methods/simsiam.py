"""SimSiam from the official code (facebookresearch/simsiam: builder.py, main_simsiam.py).

As documented, the cosine moves with every step, where it moves once an epoch there.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity

from . import cosine, mlp, named, vectors


def train(start, batches, given):
    width, hidden, out = given["width"], given["head_hidden"], given["head_out"]
    encoder = start.load(start.backbone, "encoder.backbone.")
    head = mlp(width, hidden, hidden, out, biases=(False, False, False), last_norm={"affine": False})
    projector = start.load(head, "head.")
    predictor = start.load(mlp(out, given["predictor_hidden"], out, biases=(False, True)), "predictor.")
    optimizer = torch.optim.SGD(
        [{"params": [*encoder.parameters(), *projector.parameters()]}, {"params": list(predictor.parameters())}],
        given["rate"], momentum=0.9, weight_decay=given["weight_decay"],
    )  # fmt: skip
    losses = []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = cosine(given["rate"], 0.0, step / len(batches))  # the second: --fix-pred-lr
        first, second = batch["views"].unbind(1)
        h1, h2 = vectors(encoder, first), vectors(encoder, second)
        z1, z2 = projector(h1), projector(h2)
        p1, p2 = predictor(z1), predictor(z2)
        loss = -(cosine_similarity(p1, z2.detach()).mean() + cosine_similarity(p2, z1.detach()).mean()) * 0.5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, named(encoder__backbone=encoder, head=projector, predictor=predictor)
