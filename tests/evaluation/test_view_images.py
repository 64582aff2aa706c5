"""The images and views that a page shows are those that the training sees."""

from __future__ import annotations

import base64
import io

import numpy as np
import tiny
from PIL import Image

from mllm_vision.data import ImageCollator, ImageDataset, ViewMaker
from mllm_vision.encoder.build import build_backbone
from mllm_vision.evaluation.images import draw_rows
from mllm_vision.evaluation.maps.views import view_samples


def opened(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_views_are_the_trainings_own():
    records = [{"image": tiny.random_image(place, 40)} for place in range(9)]
    records[4]["image"] = b"not an image"
    _, processor = build_backbone("vit", image_size=32, patch_size=8)
    mean, std = processor.image_mean, processor.image_std
    make = ViewMaker("dino", 32, mean, std, patch_size=8)
    found = view_samples(records, "image", make, processor, count=4, seed=3)
    kept = [row for row in draw_rows(9, 4, seed=3) if row != 4]
    assert len(found) == len(kept) == 3  # the one that cannot be read is left out
    dataset = ImageDataset(records, seed=3)
    batch = make(ImageCollator()([dataset[row] for row in kept]))
    for place, entry in enumerate(found):
        assert len(entry["views"]) == 2 + 4
        for uri, view in zip(entry["views"], [*batch["views"][place], *batch["local_views"][place][:4]], strict=True):
            pixels = (view * np.array(std)[:, None, None] + np.array(mean)[:, None, None]) * 255
            np.testing.assert_allclose(opened(uri), pixels.permute(1, 2, 0).clamp(0, 255), atol=0.51)
    assert view_samples([{"image": b"none"}], "image", make, processor) == []


def test_rows_are_drawn_at_random():
    """Every row is as likely as another, and a draw is the seed's alone."""
    assert draw_rows(5, None) == draw_rows(5, 9) == [0, 1, 2, 3, 4]
    draws = [draw_rows(10, 4, seed) for seed in range(400)]
    assert draws[3] == draw_rows(10, 4, 3) and all(len(set(rows)) == 4 and rows == sorted(rows) for rows in draws)
    counts = np.bincount(np.concatenate(draws), minlength=10)
    assert counts.min() > 110 and counts.max() < 210  # 160 each, with a deviation of 10
