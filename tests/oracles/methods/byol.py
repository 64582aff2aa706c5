"""BYOL from the official code (deepmind-research/byol/byol_experiment.py): one update of online and target networks."""

from __future__ import annotations

import torch

from . import Lars, cosine, follow, mlp, named, slow_copy, unit, vectors, warm_cosine


def train(start, batches, given):
    width, hidden, out = given["width"], given["head_hidden"], given["head_out"]
    encoder = start.load(start.backbone, "encoder.backbone.")
    projector = start.load(mlp(width, hidden, out, biases=(True, False)), "head.")
    predictor = start.load(mlp(out, hidden, out, biases=(True, False)), "predictor.")
    online = torch.nn.ModuleList([encoder, projector])
    target = slow_copy(online)
    weights = [*encoder.parameters(), *projector.parameters(), *predictor.parameters()]
    optimizer, steps, losses = Lars(weights, given["weight_decay"]), len(batches), []

    def regression(x, y):
        return (unit(x) - unit(y)).square().sum(-1).mean()

    for step, batch in enumerate(batches):
        first, second = batch["views"].unbind(1)
        h1, h2 = vectors(encoder, first), vectors(encoder, second)
        with torch.no_grad():
            t1, t2 = vectors(target[0], first), vectors(target[0], second)
            t1, t2 = target[1](t1), target[1](t2)
        p1, p2 = projector(h1), projector(h2)
        p1, p2 = predictor(p1), predictor(p2)
        loss = regression(p1, t2) + regression(p2, t1)
        loss.backward()
        optimizer.step(warm_cosine(step, steps, given["warmup"], given["rate"]))
        # target_ema(global_step): the momentum of this step, with the weights after it
        follow(target, online, cosine(given["momentum"], 1.0, step / steps))
        losses.append(loss.item())
    return losses, named(
        encoder__backbone=encoder, head=projector, predictor=predictor,
        teacher__module__encoder__backbone=target[0], teacher__module__head=target[1],
    )  # fmt: skip
