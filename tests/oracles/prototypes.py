"""PCL's loss and concentrations, one cluster and one query at a time, and the k-means objective by brute force."""

from __future__ import annotations

from itertools import product

import numpy as np

from .image_text import unit


def concentration(features, centroids, assignments, temperature, alpha=10.0):
    """Equation 12 of Li et al. 2021 with the official code's lone clusters, percentiles and mean."""
    x = unit(features)
    phi = np.zeros(len(centroids))
    sizes = [int((assignments == cluster).sum()) for cluster in range(len(centroids))]
    for cluster, size in enumerate(sizes):
        if size > 1:
            distances = [np.linalg.norm(row - centroids[cluster]) for row in x[assignments == cluster]]
            phi[cluster] = np.mean(distances) / np.log(size + alpha)
    largest = phi.max()
    for cluster, size in enumerate(sizes):
        if size <= 1:
            phi[cluster] = largest
    phi = phi.clip(np.percentile(phi, 10), np.percentile(phi, 90))
    return temperature * phi / phi.mean()


def proto_nce(query, clusterings, repeats):
    """The prototypes' term of equation 11, averaged over (prototypes, phi, assignments) of each clustering.

    With `repeats` the candidates are listed as the official code lists them: the positive prototype of every row of
    the batch, then each prototype that is nobody's.
    """
    q = unit(query)
    total = 0.0
    for prototypes, phi, assigned in clusterings:
        nobodys = [j for j in range(len(prototypes)) if j not in set(assigned.tolist())]
        listed = [*assigned.tolist(), *nobodys] if repeats else list(range(len(prototypes)))
        for row, cluster in zip(q, assigned, strict=True):
            scores = np.array([row @ prototypes[j] / phi[j] for j in listed])
            own = row @ prototypes[cluster] / phi[cluster]
            total += np.logaddexp.reduce(scores) - own
    return total / len(q) / len(clusterings)


def best_clustering(features, k):
    """The largest mean cosine that any assignment of the rows to k clusters reaches (few rows only).

    The sum over a cluster of the cosines to its mean direction is the length of the sum of its rows.
    """
    x = unit(features)
    best = -np.inf
    for assignment in product(range(k), repeat=len(x)):
        lengths = [np.linalg.norm(x[np.array(assignment) == cluster].sum(0)) for cluster in range(k)]
        best = max(best, sum(lengths) / len(x))
    return best
