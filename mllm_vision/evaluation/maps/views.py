"""Images beside the random views that a method learns from: the first thing to look at when it does not learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mllm_vision.data.images.dataset import ImageCollator
from mllm_vision.data.records.sampling import draw_key
from mllm_vision.evaluation.images import data_uri, displayed, draw_rows, usable_images

LOCAL = 4  # local crops shown of an image


def view_samples(
    records: Any,
    column: str,
    make_views: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    processor: Any,
    *,
    count: int = 4,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Some images, drawn at random, each with its views of the first epoch.

    Args:
        records: rows with an image; `column`: of the image.
        make_views: a `ViewMaker`. processor: whose mean and deviation it normalises with.
        count: images. seed: of the run.

    Returns:
        For each image {"image": data URI, "views": data URIs}; for the report (`arrays["views"]`).
    """
    images, kept = usable_images(records, column, draw_rows(len(records), count, seed))
    if not images:
        return []
    rows = [{"image": each, "key": draw_key(seed, 0, row)} for each, row in zip(images, kept, strict=True)]
    made = make_views(ImageCollator()(rows))
    found = []
    for place, image in enumerate(images):
        views = [*made["views"][place], *made.get("local_views", made["views"][:, :0])[place][:LOCAL]]
        found.append({"image": data_uri(image), "views": [data_uri(displayed(view, processor)) for view in views]})
    return found
