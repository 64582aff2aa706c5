"""DINOv2 from the official code (facebookresearch/dinov2: ssl_meta_arch.py, train.py, param_groups.py, loss/*).

The masks are input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from . import cosine, follow, inclusive_cosine, named, slow_copy, unit
from .dino import Head, adamw


def sinkhorn(logits, temperature):
    q = (logits / temperature).exp().T
    prototypes, samples = q.shape
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / prototypes
        q = q / q.sum(0, keepdim=True) / samples
    return (q * samples).T


def koleo(rows):
    rows = unit(rows)
    cosines = (rows @ rows.T).fill_diagonal_(-1)
    nearest = rows[cosines.argmax(1)]
    return -(F.pairwise_distance(rows, nearest, eps=1e-8) + 1e-8).log().mean()


def multiplier(name, layers):
    """`get_vit_lr_decay_rate`, in the names of transformers, times 0.2 of the patch embedding."""
    if name.startswith("1."):  # the head
        return 1.0
    depth = layers + 1
    if "embeddings" in name:
        depth = 0
    elif ".layer." in name:
        depth = int(name.split(".layer.")[1].split(".")[0]) + 1
    return 0.9 ** (layers + 1 - depth) * (0.2 if "patch_embeddings" in name else 1.0)


def decays(name, weight):
    """Not what ends on bias or has norm or gamma in its name, as the official names are: g of the prototypes decays."""
    return name == "1.last_layer.norm" or not (name.endswith(".bias") or weight.ndim == 1)


def train(start, batches, given):
    encoder = start.load(start.backbone, "encoder.backbone.")
    head = start.load(Head(given["width"], given["head_hidden"], given["head_bottleneck"], given["out_dim"]), "head.")
    student = nn.ModuleList([encoder, head])
    teacher, layers = slow_copy(student), encoder.config.num_hidden_layers
    optimizer = adamw([student], given["rate"], decays)
    steps, every, losses = len(batches), given["steps_per_epoch"], []
    warm = round(given["teacher_temperature_warmup_epochs"] * every)
    low, high = given["teacher_temperature_start"], given["teacher_temperature"]
    for step, batch in enumerate(batches):
        rate = inclusive_cosine(step, steps, given["warmup"], given["rate"], 1e-6)
        decay = cosine(given["weight_decay"], given["weight_decay_end"], step / steps)
        for group in optimizer.param_groups:
            name = group["name"]
            still = "last_layer" in name and step < given["freeze_last_layer_epochs"] * every
            group["lr"] = 0.0 if still else rate * multiplier(name, layers)
            group["weight_decay"] = decay if group["decays"] else 0.0
        temperature = low + (high - low) * step / (warm - 1) if step < warm else high
        large, local, masks = batch["views"].unbind(1), batch["local_views"].unbind(1), batch["masks"]
        with torch.no_grad():
            seen = [teacher[0](view).last_hidden_state for view in large]
            cls = sinkhorn(torch.cat([teacher[1](tokens[:, 0]) for tokens in reversed(seen)]), temperature).chunk(2)
            flat = torch.cat([tokens[:, 1:][masks[:, crop]] for crop, tokens in enumerate(seen)])
            patches = sinkhorn(teacher[1](flat), temperature)
        states = [encoder(view, bool_masked_pos=masks[:, crop]).last_hidden_state for crop, view in enumerate(large)]
        crops = [head(tokens[:, 0]) for tokens in states]
        small = [head(encoder(view).last_hidden_state[:, 0]) for view in local]

        def entropy(logits, target):
            return -(target * F.log_softmax(logits / given["student_temperature"], -1)).sum(-1)

        terms = 2 + 2 * len(small)
        dino = sum(entropy(logits, target).mean() for logits in small for target in cls) / terms
        dino = dino + sum(entropy(logits, target).mean() for logits, target in zip(crops, cls, strict=True)) / terms
        each = entropy(head(torch.cat([t[:, 1:][masks[:, crop]] for crop, t in enumerate(states)])), patches)
        weights = torch.cat([(1 / m.sum(1).clamp_min(1).double())[:, None].expand_as(m)[m] for m in masks.unbind(1)])
        ibot = (each * weights).sum() / masks.flatten(0, 1).shape[0]
        loss = dino + ibot + 0.1 * sum(koleo(tokens[:, 0]) for tokens in states)
        optimizer.zero_grad()
        loss.backward()
        for part in student:  # backbone and head, each by the norm of its own
            torch.nn.utils.clip_grad_norm_(part.parameters(), given["max_grad_norm"])
        optimizer.step()
        follow(teacher, student, cosine(given["momentum"], 1.0, step / steps))
        losses.append(loss.item())
    return losses, named(
        encoder__backbone=encoder, head=head,
        teacher__module__encoder__backbone=teacher[0], teacher__module__head=teacher[1],
    )  # fmt: skip
