"""Images for evaluators: rows to PIL, and thumbnails small enough for a JSON file."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from typing import Any

from mllm_vision.data.images.decoding import in_threads, load_image
from mllm_vision.data.images.files import first_image
from mllm_vision.data.records.forms import warn_of_further_images
from mllm_vision.data.records.sampling import BadRow, draw_rows, judge, only_columns

__all__ = [
    "as_list",
    "check_columns",
    "column_of",
    "data_uri",
    "displayed",
    "draw_rows",
    "leave_out",
    "rounded",
    "row_image",
    "usable_images",
]

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
    if "image" in roles:
        warn_of_further_images(records, columns["image"])


def usable_images(
    records: Any, column: str, indices: Sequence[int], refused: dict[Any, BadRow] | None = None
) -> tuple[list[Any], list[int]]:
    """Load the images of some rows; rows whose image is bad are left out and logged once.

    What a training takes is taken here, by the same judgement: of a list of images the first one.

    Args:
        records: the rows; `column` holds the image. indices: rows wanted.
        refused: row -> why it was left out, is added to.

    Returns:
        (images, the indices they came from).
    """
    refused = {} if refused is None else refused
    rows = only_columns(records, [column])

    def encoded(index: int) -> Any:
        return first_image(rows[index].get(column))

    def decoded(pair: tuple[int, Any]) -> Any:
        return pair[1] if isinstance(pair[1], BadRow) else judge(f"row {pair[0]}", load_image, pair[1])

    # the rows are read here, one after the other: not every kind of records may be read from several threads
    values = [judge(f"row {index}", encoded, index) for index in indices]
    images, kept = [], []
    for index, found in zip(indices, in_threads(decoded, list(zip(indices, values, strict=True))), strict=True):
        if isinstance(found, BadRow):
            leave_out(refused, index, found)
            continue
        images.append(found)
        kept.append(index)
    return images, kept


def leave_out(refused: dict[Any, BadRow], row: Any, why: BadRow) -> None:
    """Note that a row is left out, and tell of it the first time."""
    if row not in refused:
        logger.warning("left out of the evaluation: %s", why)
    refused[row] = why


def row_image(records: Any, column: str, index: int) -> Any:
    """The decoded image of one row; BadImage where there is none."""
    return load_image(first_image(records[index].get(column)))


def data_uri(image: Any, size: int = 96) -> str:
    """A thumbnail as a ``data:`` URI: PNG for small images (exact), JPEG for larger ones."""
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
    """The preprocessed image ``[3, H, W]`` back as a PIL image: exactly what the model sees, crop
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
