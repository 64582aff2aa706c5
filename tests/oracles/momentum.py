"""ALBEF's image-text contrast from the paper, in float64 numpy, with gradients worked out by hand.

Written from equations 1, 2 and 6 of Li et al. 2021 and the paper's algorithm (appendix A): loops over rows, an
explicit list for the queue, an explicit average for the momentum weights. It shares no code with the package.
"""

from __future__ import annotations

import numpy as np

from .image_text import through_norm, unit


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def direction(query, teacher_query, columns, positives, scale, alpha):
    """One of the two directions: (mean of H over rows, its entropy-free twin by equation 6, d query, d scale).

    `positives[i]` are the column numbers that belong to row i.
    """
    n = len(query)
    loss, by_paper, at_query, at_scale = 0.0, 0.0, np.zeros_like(query), 0.0
    for i in range(n):
        z = np.array([scale * float(query[i] @ column) for column in columns])
        p = softmax(z)
        log_p = z - z.max() - np.log(np.exp(z - z.max()).sum())
        q = softmax(np.array([scale * float(teacher_query[i] @ column) for column in columns]))
        y = np.zeros(len(columns))
        for j in positives[i]:
            y[j] = 1 / len(positives[i])
        target = alpha * q + (1 - alpha) * y
        loss -= (target * log_p).sum() / n
        divergence = (q * (np.log(q) - log_p)).sum()  # KL(q || p)
        by_paper += ((1 - alpha) * -(y * log_p).sum() + alpha * divergence) / n
        at_z = (p - target) / n
        at_query[i] = scale * at_z @ np.array(columns)
        at_scale += float(at_z @ (z / scale))
    return loss, by_paper, at_query, at_scale


def positives(ids, queue_ids, duplicates=True):
    """Column numbers of each row: its own, and those that share an id that is known (not negative)."""
    n, found = len(ids), []
    for i in range(n):
        columns = [*ids, *queue_ids]
        same = [
            j
            for j, other in enumerate(columns)
            if j == i or (duplicates and any(a == b and a >= 0 for a, b in zip(ids[i], other, strict=True)))
        ]
        found.append(same)
    return found


def itc(image, text, image_m, text_m, scale, alpha, image_queue, text_queue, own):
    """Equation 2 with the targets of equation 6: a dict of the loss, the paper's form of it, and all gradients.

    Features are raw and normalised here; `own[i]` are the positive columns of row i, batch first, then queue.
    """
    i, t, i_m, t_m = unit(image), unit(text), unit(image_m), unit(text_m)
    by_image = direction(i, i_m, [*t_m, *text_queue], own, scale, alpha)
    by_text = direction(t, t_m, [*i_m, *image_queue], own, scale, alpha)
    return {
        "loss": (by_image[0] + by_text[0]) / 2,
        "paper": (by_image[1] + by_text[1]) / 2,
        "image": through_norm(image, by_image[2] / 2),
        "text": through_norm(text, by_text[2] / 2),
        "scale": (by_image[3] + by_text[3]) / 2,
    }


class LinearAlbef:
    """The whole method with linear towers: the paper's algorithm as plain lists, for a comparison step by step."""

    def __init__(self, image_weight, text_weight, log_scale, *, momentum, size, alpha, rate):
        self.weights = [image_weight.copy(), text_weight.copy()]
        self.slow = [image_weight.copy(), text_weight.copy()]
        self.log_scale, self.momentum, self.size, self.alpha, self.rate = log_scale, momentum, size, alpha, rate
        self.queue = []  # oldest first: (image feature, text feature, ids)

    def step(self, x_image, x_text, ids, share_of_epoch):
        """Momentum update, momentum features, loss, gradient step, enqueue: the official order. Returns the loss."""
        self.slow = [
            self.momentum * slow + (1 - self.momentum) * fast
            for slow, fast in zip(self.slow, self.weights, strict=True)
        ]
        image, text = x_image @ self.weights[0].T, x_text @ self.weights[1].T
        image_m, text_m = x_image @ self.slow[0].T, x_text @ self.slow[1].T
        scale = np.exp(self.log_scale)
        found = itc(
            image, text, image_m, text_m, scale, self.alpha * min(1.0, share_of_epoch),
            [row[0] for row in self.queue], [row[1] for row in self.queue],
            positives(ids, [row[2] for row in self.queue]),
        )  # fmt: skip
        self.weights[0] -= self.rate * found["image"].T @ x_image
        self.weights[1] -= self.rate * found["text"].T @ x_text
        self.log_scale = float(np.clip(self.log_scale - self.rate * found["scale"] * scale, np.log(2), np.log(1000)))
        self.queue += list(zip(unit(image_m), unit(text_m), ids, strict=True))
        self.queue = self.queue[-self.size :]
        return found["loss"]
