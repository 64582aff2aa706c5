"""MoCo v3 from the official code (facebookresearch/moco-v3: builder.py, main_moco.py).

A ViT with AdamW, or a ResNet with LARS.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import Lars, cosine, follow, mlp, named, set_rate, slow_copy, unit, vectors, warm_cosine


def train(start, batches, given):
    width, hidden, out = given["width"], given["head_hidden"], given["head_out"]
    encoder = start.load(start.backbone, "encoder.backbone.")
    plain = {"affine": False}
    vit = encoder.config.model_type == "vit"
    widths = (width, hidden, hidden, out) if vit else (width, hidden, out)
    projector = start.load(mlp(*widths, biases=(False,) * (len(widths) - 1), last_norm=plain), "head.")
    predictor = start.load(mlp(out, hidden, out, biases=(False, False), last_norm=plain if vit else None), "predictor.")
    base = torch.nn.ModuleList([encoder, projector])
    momentum = slow_copy(base)
    weights = [weight for part in (base, predictor) for weight in part.parameters() if weight.requires_grad]
    losses, temperature = [], 0.2 if vit else 1.0
    if vit:
        settings = {"weight_decay": given["weight_decay"], "eps": given["adam_epsilon"]}
        optimizer = torch.optim.AdamW(weights, given["rate"], **settings)
    else:
        optimizer = Lars(weights, given["weight_decay"])

    def contrast(q, k):
        logits = unit(q) @ unit(k).T / temperature
        return F.cross_entropy(logits, torch.arange(len(q))) * 2 * temperature

    def of_step(share):  # adjust_moco_momentum
        return cosine(given["momentum"], 1.0, share)

    for step, batch in enumerate(batches):
        rate = warm_cosine(step, len(batches), given["warmup"], given["rate"])
        x1, x2 = batch["views"].unbind(1)
        follow(momentum, base, of_step(step / len(batches)))  # before the keys
        h1, h2 = vectors(encoder, x1), vectors(encoder, x2)
        z1, z2 = projector(h1), projector(h2)
        q1, q2 = predictor(z1), predictor(z2)
        with torch.no_grad():
            k1, k2 = momentum[1](vectors(momentum[0], x1)), momentum[1](vectors(momentum[0], x2))
        loss = contrast(q1, k2) + contrast(q2, k1)
        loss.backward()
        if vit:
            set_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad()
        else:
            optimizer.step(rate)
        losses.append(loss.item())
    follow(momentum, base, of_step(1.0))  # what the next step would begin with
    return losses, named(
        encoder__backbone=encoder, head=projector, predictor=predictor,
        teacher__module__encoder__backbone=momentum[0], teacher__module__head=momentum[1],
    )  # fmt: skip
