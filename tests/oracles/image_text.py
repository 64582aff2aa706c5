"""CLIP's and SigLIP's losses from the papers, with gradients worked out by hand."""

from __future__ import annotations

import numpy as np


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def through_norm(x, gradient):
    """Gradient with respect to x of a function of x / |x|, given the gradient at x / |x|."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    direction = x / length
    return (gradient - direction * (gradient * direction).sum(1, keepdims=True)) / length


def positives_from_ids(ids):
    """Loops on purpose: [N][K] ids to a 0/1 matrix; rows are positives when any column agrees."""
    n = len(ids)
    matrix = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            matrix[i, j] = float(any(a == b for a, b in zip(ids[i], ids[j], strict=True)))
    return matrix


def clip(image, text, scale, relations=None):
    """Figure 3 of Radford et al. 2021 with soft targets; (loss, d image, d text, d scale)."""
    n = len(image)
    relations = np.eye(n) if relations is None else relations
    i, t = unit(image), unit(text)
    cosine = i @ t.T
    z = scale * cosine
    loss, at_z = 0.0, np.zeros_like(z)
    for row in range(n):  # image to text
        q = relations[row] / relations[row].sum()
        e = np.exp(z[row] - z[row].max())
        p = e / e.sum()
        log_p = z[row] - z[row].max() - np.log(e.sum())
        loss += -(q * log_p).sum() / (2 * n)
        at_z[row] += (p - q) / (2 * n)
    for column in range(n):  # text to image
        q = relations[:, column] / relations[:, column].sum()
        e = np.exp(z[:, column] - z[:, column].max())
        p = e / e.sum()
        log_p = z[:, column] - z[:, column].max() - np.log(e.sum())
        loss += -(q * log_p).sum() / (2 * n)
        at_z[:, column] += (p - q) / (2 * n)
    gradients = through_norm(image, scale * at_z @ t), through_norm(text, scale * at_z.T @ i)
    return loss, *gradients, (at_z * cosine).sum()


def siglip(image, text, scale, bias, relations=None):
    """Algorithm 1 of Zhai et al. 2023; (loss, d image, d text, d scale, d bias)."""
    n = len(image)
    relations = np.eye(n) if relations is None else relations
    i, t = unit(image), unit(text)
    cosine = i @ t.T
    z = scale * cosine + bias
    loss, at_z = 0.0, np.zeros_like(z)
    for a in range(n):
        for b in range(n):
            for y, weight in ((1.0, relations[a, b]), (-1.0, 1.0 - relations[a, b])):
                m = y * z[a, b]
                loss += weight * np.logaddexp(0.0, -m) / n
                at_z[a, b] += weight * -y * np.exp(-np.logaddexp(0.0, m)) / n
    gradients = through_norm(image, scale * at_z @ t), through_norm(text, scale * at_z.T @ i)
    return loss, *gradients, (at_z * cosine).sum(), at_z.sum()
