"""Pictures beside the random views that a method learns from: the first thing to look at when it does not learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mllm_vision.data.pictures import PictureCollator
from mllm_vision.data.sampling import draw_key

from .images import data_uri, displayed, draw_rows, usable_images

LOCAL = 4  # local crops shown of a picture


def view_samples(
    records: Any,
    column: str,
    make_views: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    processor: Any,
    *,
    count: int = 4,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Some pictures, drawn at random, each with its views of the first epoch.

    Args:
        records: rows with a picture; `column`: of the picture.
        make_views: a `ViewMaker`. processor: whose mean and deviation it normalises with.
        count: pictures. seed: of the run.

    Returns:
        For each picture {"image": data URI, "views": data URIs}; for the report (`arrays["views"]`).
    """
    pictures, kept = usable_images(records, column, draw_rows(len(records), count, seed))
    if not pictures:
        return []
    rows = [{"image": each, "key": draw_key(seed, 0, row)} for each, row in zip(pictures, kept, strict=True)]
    made = make_views(PictureCollator()(rows))
    found = []
    for place, picture in enumerate(pictures):
        views = [*made["views"][place], *made.get("local_views", made["views"][:, :0])[place][:LOCAL]]
        found.append({"image": data_uri(picture), "views": [data_uri(displayed(view, processor)) for view in views]})
    return found
