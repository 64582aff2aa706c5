"""SigLIP from the paper's algorithm 1, with duplicates of captions and images as positives."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import named
from .pairs import Adam, features, matrix, same


def train(start, batches, given):
    dual, losses = start.load(start.backbone, "dual."), []
    optimizer = Adam(dual.named_parameters(), given, matrix)
    for batch in batches:
        image, text = features(dual, batch)
        logits = image @ text.T * dual.logit_scale.exp() + dual.logit_bias
        labels = 2.0 * same(torch.stack([batch["caption_ids"], batch["image_ids"]], 1)) - 1
        loss = -F.logsigmoid(labels * logits).sum() / len(image)
        optimizer.step(loss, len(batches))
        losses.append(loss.item())
    return losses, named(dual=dual)
