"""The slope of an oracle by central differences, for losses whose gradient by hand would be a page of its own."""

from __future__ import annotations

import numpy as np


def slope(function, arrays, directions, step=1e-6):
    """d function(arrays + h directions) / dh at h = 0: the gradient's product with the directions."""
    values = [
        function(*(array + sign * step * way for array, way in zip(arrays, directions, strict=True)))
        for sign in (1, -1)
    ]
    return (values[0] - values[1]) / (2 * step)


def check_gradients(leaves, function, arrays, *, rtol, atol, seed=0):
    """The gradients of torch leaves against the oracle's slopes along two random directions.

    Random directions see every entry at once: a wrong one shows with probability one.
    """
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(array, dtype=np.float64) for array in arrays]
    for _ in range(2):
        directions = [rng.normal(size=array.shape) for array in arrays]
        ours = sum((leaf.grad.numpy() * way).sum() for leaf, way in zip(leaves, directions, strict=True))
        np.testing.assert_allclose(ours, slope(function, arrays, directions), rtol=rtol, atol=atol)
