"""NT-Xent and InfoNCE from the papers, one row at a time, with gradients worked out by hand."""

from __future__ import annotations

import numpy as np

from .image_text import through_norm, unit


def cross_entropy(scores, positive):
    """(loss, gradient) of -log softmax(scores)[positive] for one row."""
    e = np.exp(scores - scores.max())
    gradient = e / e.sum()
    loss = -(scores[positive] - scores.max() - np.log(e.sum()))
    gradient[positive] -= 1
    return loss, gradient


def nt_xent(z1, z2, temperature):
    """Algorithm 1 of Chen et al. 2020; (loss, d z1, d z2, d temperature)."""
    n = len(z1)
    raw = np.concatenate([z1, z2])
    z = unit(raw)
    loss, at_z, at_t = 0.0, np.zeros_like(z), 0.0
    for i in range(2 * n):
        others = [k for k in range(2 * n) if k != i]
        cosine = np.array([z[i] @ z[k] for k in others])
        value, gradient = cross_entropy(cosine / temperature, others.index((i + n) % (2 * n)))
        loss += value / (2 * n)
        for g, c, k in zip(gradient, cosine, others, strict=True):
            at_z[i] += g * z[k] / temperature / (2 * n)
            at_z[k] += g * z[i] / temperature / (2 * n)
            at_t += g * c * -1 / temperature**2 / (2 * n)
    at_raw = through_norm(raw, at_z)
    return loss, at_raw[:n], at_raw[n:], at_t


def info_nce(query, positive, negatives, temperature):
    """Equation 1 of He et al. 2020; negatives None (the batch), [K, D] or [N, K, D]: (loss, gradients..., d t)."""
    n = len(query)
    q, p = unit(query), unit(positive)
    bank = None if negatives is None else negatives / np.linalg.norm(negatives, axis=-1, keepdims=True)
    at_q, at_p, at_t, loss = np.zeros_like(q), np.zeros_like(p), 0.0, 0.0
    at_bank = None if bank is None else np.zeros_like(bank)
    for i in range(n):
        if bank is None:
            keys, index = p, i
        else:
            keys, index = np.concatenate([p[i : i + 1], bank if bank.ndim == 2 else bank[i]]), 0
        cosine = keys @ q[i]
        value, gradient = cross_entropy(cosine / temperature, index)
        loss += value / n
        at_t += (gradient * cosine).sum() * -1 / temperature**2 / n
        at_q[i] += gradient @ keys / temperature / n
        at_keys = np.outer(gradient, q[i]) / temperature / n
        if bank is None:
            at_p += at_keys
        else:
            at_p[i] += at_keys[0]
            if bank.ndim == 2:
                at_bank += at_keys[1:]
            else:
                at_bank[i] += at_keys[1:]
    found = [loss, through_norm(query, at_q), through_norm(positive, at_p)]
    if bank is not None:
        width = negatives.shape[-1]
        flat = through_norm(negatives.reshape(-1, width), at_bank.reshape(-1, width))
        found.append(flat.reshape(negatives.shape))
    return (*found, at_t)


def dcl(z1, z2, temperature, sigma=None):
    """Equations 6 and 7 of Yeh et al. 2022, mean over both views; the loss alone."""
    n = len(z1)
    a, b = unit(z1), unit(z2)
    likeness = np.ones(n) if sigma is None else np.array([np.exp(a[i] @ b[i] / sigma) for i in range(n)])
    loss = 0.0
    for own, other in ((a, b), (b, a)):
        for i in range(n):
            negatives = [own[i] @ z[j] / temperature for z in (own, other) for j in range(n) if j != i]
            weight = 1.0 if sigma is None else 2 - likeness[i] / likeness.mean()
            loss += -weight * (own[i] @ other[i]) / temperature + np.logaddexp.reduce(negatives)
    return loss / (2 * n)


def sup_con(features, labels, temperature):
    """Equation 2 of Khosla et al. 2020; a view without a positive counts as zero. The loss alone."""
    n, v, d = features.shape
    z = unit(features.reshape(n * v, d))
    classes = np.repeat(labels, v)
    loss = 0.0
    for i in range(n * v):
        others = [a for a in range(n * v) if a != i]
        scores = {a: z[i] @ z[a] / temperature for a in others}
        denominator = np.logaddexp.reduce(list(scores.values()))
        positives = [p for p in others if classes[p] == classes[i]]
        loss -= sum(scores[p] - denominator for p in positives) / max(1, len(positives))
    return loss / (n * v)
