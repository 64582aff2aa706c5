"""Checks that several losses share."""

from __future__ import annotations

from torch import Tensor


def check_rows(**features: Tensor) -> None:
    """Raises ValueError unless all are `[N, D]` of one shape, with N and D above 0."""
    shapes = [list(feature.shape) for feature in features.values()]
    if len(shapes[0]) != 2 or 0 in shapes[0] or any(shape != shapes[0] for shape in shapes):
        names, wanted = " and ".join(features), "all be [N, D]" if len(shapes) > 1 else "be [N, D]"
        raise ValueError(f"{names} must {wanted} with N > 0 and D > 0, got {' and '.join(map(str, shapes))}")


def check_positive(**values: float) -> None:
    """Raises ValueError for a value that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}={value} must be positive")
