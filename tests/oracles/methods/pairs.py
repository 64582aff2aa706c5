"""What the loops of the image-text methods share: the towers' features, AdamW as their papers have it."""

from __future__ import annotations

import torch

from . import cosine, unit


def features(dual, batch):
    """Unit vectors of images and texts."""
    image = dual.image_features(batch["pixel_values"])
    return unit(image), unit(dual.text_features(batch["input_ids"], batch["attention_mask"]))


def same(ids, others=None):
    """1 where two rows share a caption or an image, or are the same row."""
    others = ids if others is None else others
    return ((ids[:, None] == others) & (ids[:, None] >= 0)).any(-1)


class Adam:
    """AdamW on a cosine with warm-up, clipped by the norm of all gradients where that is asked for."""

    def __init__(self, named, given, decays):
        named = [(name, weight) for name, weight in named if weight.requires_grad]
        groups = [{"params": [w], "weight_decay": given["weight_decay"] if decays(n, w) else 0.0} for n, w in named]
        betas = (0.9, given["adam_beta2"])
        self.weights = [weight for _, weight in named]
        self.optimizer = torch.optim.AdamW(groups, given["rate"], betas=betas, eps=given["adam_epsilon"])
        self.given, self.taken = given, 0

    def step(self, loss, steps):
        given, step = self.given, self.taken
        rate, warmup = given["rate"], given["warmup"]
        now = rate * step / warmup if step < warmup else cosine(rate, 0.0, (step - warmup) / (steps - warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = now
        self.optimizer.zero_grad()
        loss.backward()
        if given["max_grad_norm"]:
            torch.nn.utils.clip_grad_norm_(self.weights, given["max_grad_norm"])
        self.optimizer.step()
        self.taken += 1


def matrix(name, weight):
    """What decays in CLIP and SigLIP: neither gains nor biases, nor positions."""
    return weight.ndim > 1 and "position_embedding" not in name
