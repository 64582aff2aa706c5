"""Encoding many images: read, skip bad ones, share out over the ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from mllm_vision.data.records.sampling import BadRow
from mllm_vision.distributed import total_over_ranks
from mllm_vision.evaluation.base import agree_on_error, batches, gather_rows, my_share
from mllm_vision.evaluation.images import usable_images

logger = logging.getLogger(__name__)


def encode_records(
    encode: Callable[[list[Any]], torch.Tensor],
    records: Any,
    column: str,
    indices: Sequence[int],
    batch_size: int,
    refused: dict[Any, BadRow] | None = None,
) -> tuple[torch.Tensor, list[int]]:
    """Encode the images of some rows, every rank its share.

    Args:
        encode: list of PIL images to ``[n, ...]``.
        records: the rows; ``column`` holds the image.
        indices: rows wanted.
        batch_size: images read and encoded at once.
        refused: row -> why it was left out, is added to.

    Returns:
        (features ``[N, ...]`` float32 on the CPU, the row of each one), complete on every rank.

    Raises:
        ValueError: not one image could be read, or none has finite features.
    """
    indices = list(indices)
    rows: list[torch.Tensor] = []
    of: list[int] = []
    error: Exception | None = None
    read = 0
    try:
        for chunk in batches(my_share(len(indices)), batch_size):
            images, kept = usable_images(records, column, [indices[place] for place in chunk], refused)
            if images:
                features = encode(images).detach().float().cpu()
                sound = finite_rows(features, kept, f"column {column!r}")
                read += len(kept)
                rows.append(features[sound])
                of.extend(kept[place] for place in sound)
    except Exception as problem:
        error = problem
    agree_on_error(error)
    merged, found = gather_rows(rows, of)
    if not found:
        (read_by_all,) = total_over_ranks([read])
        raise ValueError(
            f"none of the {len(indices)} images in column {column!r} "
            + ("has finite features; look at the model's weights" if read_by_all else "could be read")
        )
    return merged, found


def finite_rows(features: torch.Tensor, rows: Sequence[int], where: str) -> list[int]:
    """The places of the features ``[n, ...]`` without NaN or infinity; the others are reported and left out.

    A NaN is neither a neighbour nor a score, but figures made of it look like others.
    """
    sound = features.flatten(1).isfinite().all(dim=1).tolist()
    if broken := [row for row, fine in zip(rows, sound, strict=True) if not fine]:
        logger.warning(
            "%d images of %s are left out: their features are not finite (the first is row %d)",
            len(broken), where, broken[0],
        )  # fmt: skip
    return [place for place, fine in enumerate(sound) if fine]


def encode_images(
    dual: Any,
    records: Any,
    column: str,
    indices: Sequence[int],
    batch_size: int,
    refused: dict[Any, BadRow] | None = None,
) -> tuple[torch.Tensor, list[int]]:
    """Unit image embeddings ``[N, E]`` of an image-text model and the rows they belong to."""
    features, kept = encode_records(dual.encode_images, records, column, indices, batch_size, refused)
    return F.normalize(features, dim=-1), kept
