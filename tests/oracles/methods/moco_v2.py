"""MoCo v2: a head of two layers, and a cosine.

As documented, the cosine moves with every step, where it moves once an epoch there.
"""

from __future__ import annotations

from . import cosine, mlp, moco


def train(start, batches, given):
    head = mlp(given["width"], given["head_hidden"], given["dim"], biases=(True, True), norm=False)
    return moco.train(start, batches, given, head, lambda step, steps: cosine(given["rate"], 0.0, step / steps))
