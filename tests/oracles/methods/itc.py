"""ALBEF's image-text contrast from the official code (salesforce/ALBEF: model_pretrain.py, optim_factory.py).

As documented: an empty queue at first, duplicates told by ids, and the ramp by the epochs done.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import follow, named, slow_copy
from .pairs import Adam, features, same


def decays(name, weight):
    """`add_weight_decay`: `len(shape) == 1` and biases do not; the temperature has no dimension, and decays.

    CLIP's class token has one dimension where timm's has three.
    """
    return weight.ndim != 1 or name.endswith("class_embedding")


def train(start, batches, given):
    dual = start.load(start.backbone, "dual.")
    dual.logit_scale.requires_grad_(False)
    temp = torch.nn.Parameter(start.state["temperature"].clone())
    towers, queue, queue_ids, losses = slow_copy(dual).eval(), None, None, []
    optimizer = Adam([("temp", temp), *dual.named_parameters()], given, decays)
    for step, batch in enumerate(batches):
        with torch.no_grad():
            temp.clamp_(0.001, 0.5)
            follow(towers, dual, given["momentum"])
            image_m, text_m = features(towers, batch)
        image, text = features(dual, batch)
        ids = torch.stack([batch["caption_ids"], batch["image_ids"]], 1)
        keys = torch.cat([image_m, text_m], 1)
        columns = keys if queue is None else torch.cat([keys, queue])
        images, texts = columns.chunk(2, 1)
        positive = same(ids, ids if queue is None else torch.cat([ids, queue_ids])).double()
        positive = positive / positive.sum(1, keepdim=True)
        alpha = given["alpha"] * min(1.0, step / given["steps_per_epoch"] / given["alpha_ramp_epochs"])
        loss = 0
        for query, slow, key in ((image, image_m, texts), (text, text_m, images)):
            with torch.no_grad():
                target = alpha * (slow @ key.T / temp).softmax(1) + (1 - alpha) * positive
            loss = loss - (target * F.log_softmax(query @ key.T / temp, 1)).sum(1).mean() / 2
        optimizer.step(loss, len(batches))
        queue = columns.new_empty(0, columns.shape[1]) if queue is None else queue
        queue_ids = ids[:0] if queue_ids is None else queue_ids
        queue = torch.cat([queue, keys])[-given["queue_size"] :]
        queue_ids = torch.cat([queue_ids, ids])[-given["queue_size"] :]
        losses.append(loss.item())
    with torch.no_grad():
        temp.clamp_(0.001, 0.5)
        dual.logit_scale.copy_(-temp.log())
        follow(towers, dual, given["momentum"])
    state = named(dual=dual, teacher__module=towers) | {"temperature": temp.detach()}
    state.pop("teacher.module.logit_scale")  # nobody reads it
    return losses, state
