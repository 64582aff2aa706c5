"""How the parameters of views are distributed: as the papers say, and as the usual per-image transforms draw them."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import random_image

from mllm_vision.data import ImageCollator, ViewMaker
from mllm_vision.data.views.draws import View, ViewParameters, draw_view
from mllm_vision.data.views.views import POLICIES, ViewPolicy

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
FOLDER = str(Path(__file__).resolve().parents[2] / "scripts" / "benchmark")
MANY = 6000


@pytest.fixture(scope="module")
def usual_transforms():
    """The benchmark's per-image transforms, with Python's own random numbers."""
    sys.path.insert(0, FOLDER)
    try:
        yield importlib.import_module("pil_views")
    finally:
        sys.path.remove(FOLDER)
        sys.modules.pop("pil_views", None)


def drawn(view: View, size: tuple[int, int] = (300, 300), number: int = 0) -> ViewParameters:
    return draw_view(view, number, torch.arange(MANY), torch.tensor(size).expand(MANY, 2))


# scale, flip, jitter with its probability, grey, blur and solarise of each view; official code of each paper
COLOURS = (0.4, 0.4, 0.4, 0.1)
BYOL = (0.4, 0.4, 0.2, 0.1)
PAPERS = {
    "simclr": [((0.08, 1.0), 0.5, COLOURS, 0.8, 0.2, 0.5, 0.0)] * 2,
    "moco_v1": [((0.2, 1.0), 0.5, (0.4, 0.4, 0.4, 0.4), 1.0, 0.2, 0.0, 0.0)] * 2,
    "moco_v2": [((0.2, 1.0), 0.5, COLOURS, 0.8, 0.2, 0.5, 0.0)] * 2,
    "byol": [((0.08, 1.0), 0.5, BYOL, 0.8, 0.2, 1.0, 0.0), ((0.08, 1.0), 0.5, BYOL, 0.8, 0.2, 0.1, 0.2)],
    "moco_v3": [((0.08, 1.0), 0.5, BYOL, 0.8, 0.2, 1.0, 0.0), ((0.08, 1.0), 0.5, BYOL, 0.8, 0.2, 0.1, 0.2)],
    "barlow_twins": [((0.08, 1.0), 0.5, BYOL, 0.8, 0.2, 1.0, 0.0), ((0.08, 1.0), 0.5, BYOL, 0.8, 0.2, 0.1, 0.2)],
    "vicreg": [((0.08, 1.0), 0.5, BYOL, 0.8, 0.2, 1.0, 0.0), ((0.08, 1.0), 0.5, BYOL, 0.8, 0.2, 0.1, 0.2)],
    "simsiam": [((0.2, 1.0), 0.5, COLOURS, 0.8, 0.2, 0.5, 0.0)] * 2,
    "pcl": [((0.2, 1.0), 0.5, COLOURS, 0.8, 0.2, 0.5, 0.0)] * 2,
    "supcon": [((0.2, 1.0), 0.5, COLOURS, 0.8, 0.2, 0.0, 0.0)] * 2,
    "dino": [((0.4, 1.0), 0.5, BYOL, 0.8, 0.2, 1.0, 0.0), ((0.4, 1.0), 0.5, BYOL, 0.8, 0.2, 0.1, 0.2)],
    "dinov2": [((0.32, 1.0), 0.5, BYOL, 0.8, 0.2, 1.0, 0.0), ((0.32, 1.0), 0.5, BYOL, 0.8, 0.2, 0.1, 0.2)],
    "mae": [((0.2, 1.0), 0.5, (0.0,) * 4, 0.8, 0.0, 0.0, 0.0)],
    "clip": [((0.9, 1.0), 0.0, (0.0,) * 4, 0.8, 0.0, 0.0, 0.0)],
}


BILINEAR = {"moco_v1", "moco_v2", "moco_v3", "simsiam", "pcl", "supcon"}  # the others resize with a cubic
TENTH = {"simclr", "byol"}  # whose code has a kernel of a tenth of the side


def near(share: torch.Tensor, probability: float) -> bool:
    """Whether the share of True is within five deviations of a coin of that probability."""
    deviation = (probability * (1 - probability) / share.numel()) ** 0.5
    return abs(float(share.double().mean()) - probability) <= 5 * deviation


@pytest.mark.parametrize("name", PAPERS)
def test_parameters_are_distributed_as_the_papers_say(name: str) -> None:
    policy = ViewMaker(name, 32, **PLAIN).policy
    assert set(PAPERS) == set(POLICIES) and len(policy.views) == len(PAPERS[name])
    assert policy.resample == ("bilinear" if name in BILINEAR else "bicubic")
    assert policy.blur_share == (0.1 if name in TENTH else None)
    for number, (view, expected) in enumerate(zip(policy.views, PAPERS[name], strict=True)):
        scale, flip, jitter, jitter_probability, gray, blur, solarize = expected
        p = drawn(view, number=number)
        area = (p.height * p.width).double() / 300**2
        assert scale[0] - 0.02 < float(area.min()) and float(area.max()) <= scale[1] and near(p.flip, flip)
        aspect = (p.width / p.height).log()
        assert float(aspect.abs().max()) < np.log(4 / 3) + 0.05 and abs(float(aspect.mean())) < 0.03
        assert near(p.gray, gray) and near(p.sigma > 0, blur) and near(p.solarize, solarize)
        if blur:
            sigma = p.sigma[p.sigma > 0]
            assert float(sigma.min()) >= 0.1 and float(sigma.max()) <= 2.0 and abs(float(sigma.mean()) - 1.05) < 0.12
        changed = p.factors[(p.factors != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(dim=1)]
        assert near((p.factors[:, 0] != 1.0), jitter_probability if jitter[0] else 0.0)
        for column, (strength, centre) in enumerate(zip(jitter, (1.0, 1.0, 1.0, 0.0), strict=True)):
            if strength:
                off = changed[:, column] - centre
                assert float(off.abs().max()) <= strength + 1e-6 and abs(float(off.mean())) < 0.05 * strength
                assert abs(float(off.std()) - strength / 3**0.5) < 0.03 * strength  # uniform
    orders = {tuple(order) for order in p.order.tolist()}
    assert len(orders) == 24 and all(near(p.order[:, 0] == kind, 0.25) for kind in range(4))


def test_local_crops() -> None:
    """DINO: 8 crops of 5 to 40 % of the area, 96 of 224 pixels, in whole patches; DINOv2: to 32 %, 98 of 224."""
    dino, dinov2 = ViewMaker("dino", 224, **PLAIN, patch_size=16), ViewMaker("dinov2", 224, **PLAIN, patch_size=14)
    assert (dino.local_size, dinov2.local_size, dino.policy.local_views) == (96, 98, 8)
    assert ViewMaker("dino", 32, **PLAIN, patch_size=4).local_size == 12
    p = drawn(dino.policy.local)
    area = (p.height * p.width).double() / 300**2
    assert float(area.min()) > 0.04 and float(area.max()) < 0.41 and near(p.sigma > 0, 0.5)
    assert dinov2.policy.local.scale == (0.05, 0.32) and dinov2.policy.views[0].scale == (0.32, 1.0)
    made = ViewMaker("dino", 32, **PLAIN, patch_size=4)(ImageCollator()([{"image": random_image(0, 40)}]))
    assert made["views"].shape == (1, 2, 3, 32, 32) and made["local_views"].shape == (1, 8, 3, 12, 12)
    flat = made["local_views"][0].flatten(1)
    assert len({tuple(view.tolist()) for view in flat}) == 8  # each its own
    alike = ViewMaker(ViewPolicy((View(),), "one view", local=View(), local_views=2, local_share=1.0), 32, **PLAIN)
    one = alike(ImageCollator()([{"image": random_image(0, 40)}]))
    assert not torch.equal(one["views"][0, 0], one["local_views"][0, 0])  # nor those of the views


def test_views_of_a_image_and_its_changes_are_independent() -> None:
    """No two numbers of a view, nor of two views, go together."""
    half = View(
        scale=(0.08, 0.5), jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=0.5, gray=0.5, blur=0.5, solarize=0.5
    )
    columns = []
    for number in (0, 1):
        p = drawn(half, number=number)
        columns += [p.top / (300 - p.height + 1), p.left / (300 - p.width + 1), p.height * p.width, p.height / p.width]
        columns += [p.flip, p.gray, p.sigma > 0, p.solarize, p.factors[:, 0] != 1.0, *p.factors.unbind(1)]
        columns += [*(p.order[:, 0] == kind for kind in range(3)), p.order[:, 1] == 0]
        columns += [torch.where(p.sigma > 0, p.sigma, 1.05)]
    together = torch.corrcoef(torch.stack([column.float() for column in columns])) - torch.eye(len(columns))
    for start in (13, 31):  # the places of the four steps do depend on each other
        together[start : start + 4, start : start + 4] = 0.0
    assert len(columns) == 36 and float(together.abs().max()) < 5 / MANY**0.5


def furthest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of the two distributions (Kolmogorov-Smirnov)."""
    places = torch.cat([a, b]).double().unique()
    shares = [torch.searchsorted(x.double().sort().values, places, right=True) / len(x) for x in (a, b)]
    return float((shares[0] - shares[1]).abs().max())


@pytest.mark.parametrize("size", [(300, 300), (200, 500), (9, 12)])
def test_crops_are_distributed_as_those_of_the_usual_transform(usual_transforms, size: tuple[int, int]) -> None:
    """Against a loop of at most ten tries with Python's own random numbers: area, shape and place, as they are used."""
    rng, high, wide = random.Random(5), *size
    usual = [usual_transforms.draw_simclr((wide, high), rng) for _ in range(MANY)]
    left, top, right, bottom = torch.tensor([view.box for view in usual]).unbind(1)
    p = drawn(POLICIES["simclr"].views[0], size)
    limit = 1.95 * (2 / MANY) ** 0.5  # passed by one in a thousand
    for ours, theirs in (
        (p.top, top), (p.left, left), (p.height, bottom - top), (p.width, right - left), (p.top + p.height, bottom),
        (p.left + p.width, right), (p.height * p.width, (bottom - top) * (right - left)),
        (p.width / p.height, (right - left) / (bottom - top)),
    ):  # fmt: skip
        assert furthest(ours, theirs) < limit
    landscape = drawn(View(scale=(0.05, 0.1), ratio=(2.0, 3.0)))
    assert float((landscape.width / landscape.height).min()) > 1.9  # the ratio is width over height


def test_every_strength_is_uniform() -> None:
    p = drawn(View(jitter=(0.4, 1.5, 0.2, 0.1), jitter_probability=1.0, blur=1.0, sigma=(0.5, 3.0)))
    even = (torch.arange(MANY) + 0.5) / MANY
    ends = ((0.6, 1.4), (0.0, 2.5), (0.8, 1.2), (-0.1, 0.1))  # none below zero
    for column, (low, high) in zip([*p.factors.unbind(1), p.sigma], [*ends, (0.5, 3.0)], strict=True):
        assert furthest(column, low + (high - low) * even) < 1.95 * MANY**-0.5


def test_crops_stay_inside() -> None:
    """Of any image, a single pixel and a panorama that no crop fits included."""
    for size in ((1, 1), (2, 300), (300, 2), (32, 32), (7, 5)):
        for view in (POLICIES["simclr"].views[0], POLICIES["clip"].views[0]):
            p = drawn(view, size)
            assert int(p.top.min()) >= 0 and int(p.left.min()) >= 0 and int(p.height.min()) >= 1
            assert int((p.top + p.height).max()) <= size[0] and int((p.left + p.width).max()) <= size[1]
    centred = drawn(View(scale=(0.9, 1.0)), (10, 1000))
    assert set(centred.left.tolist()) == {493} and set(centred.width.tolist()) == {13}
