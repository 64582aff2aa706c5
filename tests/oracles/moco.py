"""MoCo and its kin from the papers, in float64 numpy: lists for the queue, gradients worked out by hand."""

from __future__ import annotations

import numpy as np

from .image_text import unit
from .infonce import info_nce


class LinearMoCo:
    """Algorithm 1 of He et al. 2020 with a linear encoder A and a linear head H, b: query and key z = H A x + b."""

    def __init__(self, encoder, head, bias, *, momentum, size, temperature, rate, symmetric=False):
        self.fast = [encoder.copy(), head.copy(), bias.copy()]
        self.slow = [encoder.copy(), head.copy(), bias.copy()]
        self.momentum, self.size, self.temperature, self.rate = momentum, size, temperature, rate
        self.symmetric = symmetric
        self.queue = []  # oldest first

    def step(self, x1, x2):
        """Keys, loss, gradient step, momentum update, enqueue, dequeue; returns the loss."""
        pairs = [(x1, x2), (x2, x1)] if self.symmetric else [(x1, x2)]
        gradients = [np.zeros_like(value) for value in self.fast]
        loss, keys = 0.0, []
        for x_query, x_key in pairs:
            encoder, head, bias = self.fast
            hidden = x_query @ encoder.T
            z = hidden @ head.T + bias
            slow = self.slow
            key = unit(x_key @ slow[0].T @ slow[1].T + slow[2])
            bank = np.array(self.queue) if self.queue else None
            value, at_z, *_ = info_nce(z, key, bank, self.temperature)
            loss += value
            for index, part in enumerate(((at_z @ head).T @ x_query, at_z.T @ hidden, at_z.sum(0))):
                gradients[index] += part
            keys.append(key)
        self.fast = [value - self.rate * at for value, at in zip(self.fast, gradients, strict=True)]
        self.slow = [
            self.momentum * slow + (1 - self.momentum) * fast for slow, fast in zip(self.slow, self.fast, strict=True)
        ]
        for row in zip(*keys, strict=True):
            self.queue += list(row)
        self.queue = self.queue[-self.size :]
        return loss


def symmetric_contrast(queries, keys, temperature):
    """Algorithm 1 of Chen, Xie and He 2021: ctr(q1, k2) + ctr(q2, k1), each 2 T times its cross-entropy."""
    first = info_nce(queries[0], keys[1], None, temperature)[0]
    second = info_nce(queries[1], keys[0], None, temperature)[0]
    return 2 * temperature * first + 2 * temperature * second


def squared_distance(predictions, targets):
    """Equation 2 of Grill et al. 2020: mean over rows of |unit(p) - unit(z)|^2."""
    difference = unit(predictions) - unit(targets)
    return float((difference**2).sum(1).mean())


def batch_norm(rows, weight, bias, eps=1e-5):
    """Ioffe and Szegedy 2015, algorithm 1."""
    return (rows - rows.mean(0)) / np.sqrt(rows.var(0) + eps) * weight + bias


def sincos(width, row, column):
    """The position of one patch: sine and cosine of its row, then of its column, at width / 4 frequencies."""
    found = []
    for place in (row, column):
        angles = [place / 10000 ** (index / (width // 4)) for index in range(width // 4)]
        found += [np.sin(angle) for angle in angles] + [np.cos(angle) for angle in angles]
    return np.array(found)
