"""Barlow Twins and VICReg from the papers and their official code, by loops over dimensions."""

from __future__ import annotations

import numpy as np


def correlation(z1, z2, eps):
    """Equation 2 of Zbontar et al. 2021, with the official BatchNorm's eps."""
    n, d = z1.shape
    c = np.zeros((d, d))
    for i in range(d):
        for j in range(d):
            a, b = z1[:, i] - z1[:, i].mean(), z2[:, j] - z2[:, j].mean()
            c[i, j] = (a * b).sum() / n / np.sqrt(((a * a).sum() / n + eps) * ((b * b).sum() / n + eps))
    return c


def barlow_twins(z1, z2, lambd, eps):
    c = correlation(z1, z2, eps)
    d = len(c)
    on = sum((1 - c[i, i]) ** 2 for i in range(d))
    return on + lambd * sum(c[i, j] ** 2 for i in range(d) for j in range(d) if i != j)


def vicreg(z1, z2, eps):
    """Algorithm 1 of Bardes et al. 2022: (invariance, variance, covariance) without weights."""
    d = z1.shape[1]
    invariance = ((z1 - z2) ** 2).mean()
    variance = covariance = 0.0
    for z in (z1, z2):
        c = np.cov(z.T, ddof=1).reshape(d, d)
        for i in range(d):
            variance += max(0.0, 1 - np.sqrt(c[i, i] + eps)) / d / 2
            covariance += sum(c[i, j] ** 2 for j in range(d) if j != i) / d
    return invariance, variance, covariance
