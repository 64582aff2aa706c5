"""CLIP from the paper's figure 3, with duplicates of captions and images as positives that share the row."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from . import named
from .pairs import Adam, features, matrix, same


def train(start, batches, given):
    dual, losses = start.load(start.backbone, "dual."), []
    optimizer = Adam(dual.named_parameters(), given, matrix)
    for batch in batches:
        image, text = features(dual, batch)
        logits = image @ text.T * dual.logit_scale.exp()
        target = same(torch.stack([batch["caption_ids"], batch["image_ids"]], 1)).to(logits.dtype)
        target = target / target.sum(1, keepdim=True)
        loss = -((target * F.log_softmax(logits, 1)).sum(1) + (target * F.log_softmax(logits.T, 1)).sum(1)).mean() / 2
        optimizer.step(loss, len(batches))
        with torch.no_grad():
            dual.logit_scale.clamp_(0, math.log(100))
        losses.append(loss.item())
    return losses, named(dual=dual)
