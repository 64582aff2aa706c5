"""DINO from the official code (facebookresearch/dino: main_dino.py, utils.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from . import cosine, follow, inclusive_cosine, named, set_rate, slow_copy, unit


class Head(nn.Module):
    """`DINOHead`: an MLP with GELU, unit length, then rows of unit length times g."""

    def __init__(self, width, hidden, bottleneck, prototypes):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.last_layer = nn.ParameterDict(
            {"weight": torch.empty(prototypes, bottleneck), "norm": torch.empty(prototypes)}
        )

    def forward(self, x):
        rows = unit(self.last_layer["weight"]) * self.last_layer["norm"][:, None]
        return unit(self.mlp(x)) @ rows.T


def vectors(backbone, pixels):
    return backbone(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]


def adamw(parts, rate, keep):
    """One group a parameter, with its name; decay where `keep` says."""
    groups = [
        {"params": [weight], "name": name, "decays": keep(name, weight)}
        for part in parts for name, weight in part.named_parameters() if weight.requires_grad
    ]  # fmt: skip
    return torch.optim.AdamW(groups, rate)


def train(start, batches, given):
    encoder = start.load(start.backbone, "encoder.backbone.")
    head = start.load(Head(given["width"], given["head_hidden"], given["head_bottleneck"], given["out_dim"]), "head.")
    head.last_layer["norm"].requires_grad_(False)  # norm_last_layer
    student = nn.ModuleList([encoder, head])
    teacher, centre = slow_copy(student), torch.zeros(given["out_dim"], dtype=torch.float64)
    optimizer = adamw([student], given["rate"], lambda name, weight: not (name.endswith(".bias") or weight.ndim == 1))
    steps, every, losses = len(batches), given["steps_per_epoch"], []
    warm = int(given["teacher_temperature_warmup_epochs"])
    low, high = given["teacher_temperature_start"], given["teacher_temperature"]
    temperatures = [low + (high - low) * epoch / (warm - 1) for epoch in range(warm)] + [high] * steps
    for step, batch in enumerate(batches):
        set_rate(optimizer, inclusive_cosine(step, steps, given["warmup"], given["rate"], 1e-6))
        decay = cosine(given["weight_decay"], given["weight_decay_end"], step / steps)
        for group in optimizer.param_groups:
            group["weight_decay"] = decay if group["decays"] else 0.0
        large, small = batch["views"].unbind(1), batch["local_views"].unbind(1)
        temperature = temperatures[step // every]
        with torch.no_grad():
            said = [teacher[1](vectors(teacher[0], view)) for view in large]
            targets = [((logits - centre) / temperature).softmax(-1) for logits in said]
        logits = [head(vectors(encoder, view)) / given["student_temperature"] for view in (*large, *small)]
        terms = [
            -(target * F.log_softmax(view, -1)).sum(-1).mean()
            for seen, target in enumerate(targets) for number, view in enumerate(logits) if number != seen
        ]  # fmt: skip
        loss = sum(terms) / len(terms)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            (weight,) = group["params"]
            weight.grad.mul_(min(1.0, given["max_grad_norm"] / (weight.grad.norm().item() + 1e-6)))
            if step // every < given["freeze_last_layer_epochs"] and "last_layer" in group["name"]:
                weight.grad = None
        optimizer.step()
        centre = centre * 0.9 + torch.cat(said).mean(0) * 0.1
        follow(teacher, student, cosine(given["momentum"], 1.0, step / steps))
        losses.append(loss.item())
    return losses, {"centring.centre": centre} | named(
        encoder__backbone=encoder, head=head,
        teacher__module__encoder__backbone=teacher[0], teacher__module__head=teacher[1],
    )  # fmt: skip
