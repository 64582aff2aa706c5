"""MoCo v1: a linear head, and the rate falls to a tenth at 60 and 80 % of the training (epochs 120 and 160 of 200)."""

from __future__ import annotations

from torch import nn

from . import moco


def train(start, batches, given):
    def rate(step, steps):
        return given["rate"] * 0.1 ** sum(step >= share * steps for share in (0.6, 0.8))

    return moco.train(start, batches, given, nn.Linear(given["width"], given["dim"]), rate)
