"""Pictures for evaluators: rows to PIL, and thumbnails small enough for a JSON file."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from typing import Any

from mllm_vision.data.images import BadImage, load_image

logger = logging.getLogger(__name__)


def as_list(value: Any) -> list[Any]:
    """A caption or a list of captions as a list; None becomes the empty list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def column_of(columns: dict[str, str], role: str, what: str) -> str:
    """``columns[role]``, or a ValueError that names what was bound.

    Raises:
        ValueError: the role is not bound to a column.
    """
    if not columns.get(role):
        raise ValueError(
            f"{what} needs a column for {role!r}; bound columns are {columns}. Pass columns={{{role!r}: ...}}"
        )
    return columns[role]


def check_columns(records: Any, columns: dict[str, str], roles: Sequence[str], what: str) -> None:
    """Refuse an empty dataset or a binding to a column that is not there.

    Raises:
        ValueError: with the columns that were found.
    """
    if len(records) == 0:
        raise ValueError(f"{what}: the dataset has no rows")
    found = list(getattr(records, "column_names", None) or records[0].keys())
    for role in roles:
        column = column_of(columns, role, what)
        if column not in found:
            raise ValueError(f"{what}: column {column!r} (for {role!r}) is not in the data; found {found}")


def draw_rows(total: int, count: int | None, seed: int = 0) -> list[int]:
    """`count` of the rows 0 to total - 1, drawn at random by `seed`, ascending; all of them with None or too few.

    Neither the first rows nor every n-th one show what is in the data: rows come sorted by class, or with the classes
    taking turns.
    """
    import torch

    if count is None or count >= total:
        return list(range(total))
    return sorted(torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist())


def usable_images(records: Any, column: str, indices: Sequence[int]) -> tuple[list[Any], list[int]]:
    """Load the pictures of some rows; rows whose picture is bad are left out and reported.

    Returns:
        (pictures, the indices they came from).
    """
    pictures, kept = [], []
    for index in indices:
        try:
            pictures.append(load_image(records[index][column]))
            kept.append(index)
        except BadImage as error:
            logger.warning("row %d is left out of the evaluation: %s", index, error)
    return pictures, kept


def data_uri(image: Any, size: int = 96) -> str:
    """A thumbnail as a ``data:`` URI: PNG for small pictures (exact), JPEG for larger ones."""
    image = image.convert("RGB")
    buffer = io.BytesIO()
    if max(image.size) <= size:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image = image.copy()
        image.thumbnail((size, size))
        image.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def displayed(pixel_values: Any, processor: Any) -> Any:
    """The preprocessed picture ``[3, H, W]`` back as a PIL picture: exactly what the model sees, crop
    included.
    """
    import torch
    from PIL import Image

    mean = torch.tensor(getattr(processor, "image_mean", None) or [0.0] * 3)[:, None, None]
    std = torch.tensor(getattr(processor, "image_std", None) or [1.0] * 3)[:, None, None]
    pixels = (pixel_values.detach().cpu().float() * std + mean).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def rounded(grid: Any) -> list[list[float]]:
    """A map `[h, w]` as nested lists of three digits, for a JSON file."""
    return [[float(f"{value:.3g}") for value in row] for row in grid.detach().cpu().tolist()]
