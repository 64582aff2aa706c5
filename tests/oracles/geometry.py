"""Measures of a cloud of embeddings from their papers, by eigenvalues and loops over pairs."""

from __future__ import annotations

import numpy as np


def spectrum(x, center=True):
    """Eigenvalues of the covariance, descending."""
    x = x - x.mean(axis=0) if center else x
    values = np.linalg.eigvalsh(x.T @ x / len(x))[::-1]
    return np.maximum(values[: min(x.shape)], 0)


def _entropy_rank(shares):
    return np.exp(-sum(p * np.log(p) for p in shares if p > 0))


def effective_rank(x, center=True):
    """Equations 3-5 of Roy and Vetterli 2007."""
    values = np.sqrt(spectrum(x, center))
    return _entropy_rank(values / values.sum())


def rankme(x, epsilon):
    """Equations 1-2 of Garrido et al. 2023."""
    values = np.sqrt(spectrum(x, center=False))
    return _entropy_rank(values / values.sum() + epsilon)


def alpha_req(x, last):
    """The slope of log eigenvalue on log index, by numpy's own least squares."""
    values = spectrum(x)[:last]
    return -np.polyfit(np.log(np.arange(1, last + 1)), np.log(values), 1)[0]


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def alignment(x, y, alpha):
    """Section 4.1.1 of Wang and Isola 2020."""
    return np.mean([np.linalg.norm(a - b) ** alpha for a, b in zip(unit(x), unit(y), strict=True)])


def uniformity(x, t):
    """Section 4.1.2 of Wang and Isola 2020."""
    x, n = unit(x), len(x)
    pairs = [np.exp(-t * np.sum((x[i] - x[j]) ** 2)) for i in range(n) for j in range(i)]
    return np.log(np.mean(pairs))


def spread(x):
    """The square root of one minus the mean cosine of two different rows."""
    x, n = unit(x), len(x)
    return np.sqrt(1 - np.mean([x[i] @ x[j] for i in range(n) for j in range(i)]))


def participation_ratio(x):
    """Equation 4 of Gao et al. 2017, of the unit vectors."""
    values = spectrum(unit(x))
    return values.sum() ** 2 / (values**2).sum()
