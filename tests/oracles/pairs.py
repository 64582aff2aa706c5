"""Contrastive and triplet losses from the papers, and the mining of triplets by three nested loops."""

from __future__ import annotations

import numpy as np


def contrastive(x1, x2, y, margin):
    """Equation 4 of Hadsell et al. 2006, without its halves."""
    total = 0.0
    for a, b, label in zip(x1, x2, y, strict=True):
        d = np.sqrt(((a - b) ** 2).sum())
        total += (1 - label) * d**2 + label * max(0.0, margin - d) ** 2
    return total / len(x1)


def squared(a, b, normalize=True):
    if normalize:
        a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return float(((a - b) ** 2).sum())


def triplet(anchor, positive, negative, margin, normalize=True):
    """Equation 2 of Schroff et al. 2015."""
    rows = zip(anchor, positive, negative, strict=True)
    return np.mean([max(0.0, squared(a, p, normalize) - squared(a, n, normalize) + margin) for a, p, n in rows])


def mine(x, labels, margin, strategy, normalize=True):
    """(triplets with what the strategy takes of them, number of candidates), by definition."""
    n = len(x)
    d = np.array([[squared(a, b, normalize) for b in x] for a in x])
    found, candidates = [], 0
    for a in range(n):
        positives = [p for p in range(n) if p != a and labels[p] == labels[a]]
        negatives = [m for m in range(n) if labels[m] != labels[a]]
        if strategy == "batch_all":
            candidates += len(positives) * len(negatives)
            found += [(a, p, m) for p in positives for m in negatives if d[a, p] - d[a, m] + margin > 0]
        elif strategy == "batch_hard" and positives and negatives:
            candidates += 1
            found.append((a, max(positives, key=lambda p: d[a, p]), min(negatives, key=lambda m: d[a, m])))
        elif strategy == "batch_semi_hard":
            for p in positives:
                candidates += 1
                semi = [m for m in negatives if d[a, p] < d[a, m] < d[a, p] + margin]
                if semi:
                    found.append((a, p, min(semi, key=lambda m: d[a, m])))
    return found, candidates


def batch(x, labels, margin, strategy, normalize=True):
    """(loss, active fraction): mean over the triplets that were found."""
    found, candidates = mine(x, labels, margin, strategy, normalize)
    if not found:
        return 0.0, 0.0
    losses = [squared(x[a], x[p], normalize) - squared(x[a], x[m], normalize) + margin for a, p, m in found]
    active = sum(value > 0 for value in losses)
    return np.mean(np.maximum(0.0, losses)), active / candidates
