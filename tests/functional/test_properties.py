"""What holds of every loss whatever the rows: order of rows and views, lengths, finite gradients, precision, memory.

Each loss is in the table once; a test asks that none of `functional/` is missing.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mllm_vision.functional
from mllm_vision.functional import distillation, geometry, image_text, infonce, pairs, prototypes, redundancy
from mllm_vision.functional.engine import tiles
from mllm_vision.functional.momentum_contrast import momentum_contrast
from mllm_vision.functional.reconstruction import masked_reconstruction

D, WIDTH = 6, 5
CENTRES = [F.normalize(torch.randn(k, D, generator=torch.Generator().manual_seed(k)), dim=1) for k in (3, 4)]


@dataclass(frozen=True)
class Case:
    """A loss of rows x, y `[N, D]` with classes c `[N]` below 3, and what leaves it as it is.

    Attributes:
        loss: of (x, y, c).
        swap: exchanging x and y. lengths: of each row by itself. shift: of all rows by one vector.
    """

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    swap: bool = False
    lengths: bool = False
    shift: bool = False


def _assigned(classes: Tensor) -> list[Tensor]:
    return [classes, 3 - classes]


def _crops(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Student logits and teacher probabilities `[N, 2, D]` of two views."""
    views = torch.stack([x, y], dim=1)
    return views, (_full(views.detach(), views) / 0.5).softmax(-1)


def _full(value: Tensor, like: Tensor) -> Tensor:
    return value.to(torch.promote_types(like.dtype, torch.float32))


def _rolled(x: Tensor, y: Tensor) -> Tensor:
    """Two negatives `[N, 2, D]` of each row's own."""
    return torch.stack([x.roll(2, 1), y.roll(1, 1)], dim=1).detach()


LOSSES: dict[str, Case] = {
    "pairs.contrastive": Case(lambda x, y, c: pairs.contrastive(x, y, c > 0), swap=True, shift=True),
    "pairs.triplet": Case(lambda x, y, c: pairs.triplet(x, y, y.roll(1, 1)), lengths=True),
    **{
        f"pairs.batch_triplet {kind}": Case(
            lambda x, y, c, kind=kind: pairs.batch_triplet(torch.cat([x, y]), c.repeat(2), strategy=kind)[0],
            swap=True,
            lengths=True,
        )
        for kind in ("batch_all", "batch_hard", "batch_semi_hard")
    },
    "infonce.nt_xent": Case(lambda x, y, c: infonce.nt_xent(x, y), swap=True, lengths=True),
    "infonce.info_nce": Case(lambda x, y, c: infonce.info_nce(x, y), lengths=True),
    "infonce.info_nce bank": Case(lambda x, y, c: infonce.info_nce(x, y, _full(CENTRES[0], x)), lengths=True),
    "infonce.info_nce own": Case(lambda x, y, c: infonce.info_nce(x, y, _rolled(x, y)), lengths=True),
    "infonce.dcl": Case(lambda x, y, c: infonce.dcl(x, y), swap=True, lengths=True),
    "infonce.dcl weighted": Case(lambda x, y, c: infonce.dcl(x, y, sigma=0.5), swap=True, lengths=True),
    "infonce.sup_con": Case(lambda x, y, c: infonce.sup_con(torch.stack([x, y], 1), c), swap=True, lengths=True),
    "redundancy.barlow_twins": Case(lambda x, y, c: redundancy.barlow_twins(x, y), swap=True, shift=True),
    "redundancy.vicreg": Case(lambda x, y, c: redundancy.vicreg(x, y), swap=True, shift=True),
    "redundancy.invariance_term": Case(lambda x, y, c: redundancy.invariance_term(x, y), swap=True, shift=True),
    "redundancy.variance_term": Case(lambda x, y, c: redundancy.variance_term(x), shift=True),
    "redundancy.covariance_term": Case(lambda x, y, c: redundancy.covariance_term(x), shift=True),
    "distillation.negative_cosine": Case(
        lambda x, y, c: distillation.negative_cosine(x, y, stop_gradient=False), swap=True, lengths=True
    ),
    "distillation.dino_loss": Case(lambda x, y, c: distillation.dino_loss(*_crops(x, y)), swap=True),
    "distillation.ibot_loss": Case(
        lambda x, y, c: distillation.ibot_loss(*_crops(x, y), torch.stack([c > 0, c < 2], 1))
    ),
    "distillation.dino_loss sinkhorn": Case(
        lambda x, y, c: distillation.dino_loss(
            torch.stack([x, y], 1), distillation.sinkhorn_knopp(x, temperature=5.0)[:, None]
        )
    ),
    "distillation.koleo": Case(lambda x, y, c: distillation.koleo(x), lengths=True),
    "prototypes.proto_nce": Case(
        lambda x, y, c: prototypes.proto_nce(
            x, [_full(each, x) for each in CENTRES], [torch.full((3,), 0.2), torch.full((4,), 0.4)], _assigned(c)
        ),
        lengths=True,
    ),
    "reconstruction.masked_reconstruction": Case(
        lambda x, y, c: masked_reconstruction(
            x[:, None], y[:, None], torch.ones_like(c[:, None], dtype=torch.bool)
        ).mean()
    ),
    "image_text.clip_loss": Case(lambda x, y, c: image_text.clip_loss(x, y, 5.0), swap=True, lengths=True),
    "image_text.siglip_loss": Case(lambda x, y, c: image_text.siglip_loss(x, y, 5.0, -2.0), swap=True, lengths=True),
    "momentum_contrast.momentum_contrast": Case(
        lambda x, y, c: momentum_contrast(x, y, x.roll(1, 1).detach(), y.roll(1, 1).detach(), 5.0),
        swap=True,
        lengths=True,
    ),
    "geometry.alignment": Case(lambda x, y, c: geometry.alignment(x, y), swap=True, lengths=True),
    "geometry.uniformity": Case(lambda x, y, c: geometry.uniformity(x), lengths=True),
}
# functions that make or measure what a loss needs, and so are tested with it
NO_LOSS = {"triplet_masks", "mine_triplets", "mutual_information_bound"}
NO_LOSS |= {"centred_softmax", "sinkhorn_knopp", "spherical_kmeans", "concentration", "patchify", "unpatchify"}
NO_LOSS |= {"spectrum", "effective_rank", "rankme", "alpha_req", "spread", "participation_ratio"}  # test_geometry.py
TOOLS = {"checks", "masking", "precision", "random"}

every_loss = pytest.mark.parametrize("name", LOSSES)
sizes = {"n": st.integers(2, 9), "seed": st.integers(0, 2**16)}


def rows(n: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, n, D, generator=generator, dtype=torch.float64).to(dtype)
    return x, y, torch.randint(0, 3, (n,), generator=generator), generator


def test_every_loss_is_in_the_table():
    public = set()
    for module in pkgutil.iter_modules(mllm_vision.functional.__path__):
        if module.name not in TOOLS:
            found = importlib.import_module(f"mllm_vision.functional.{module.name}")
            for name, value in vars(found).items():
                if inspect.isfunction(value) and value.__module__ == found.__name__ and not name.startswith("_"):
                    public.add(f"{module.name}.{name}")
    assert {name for name in public if name.split(".")[1] not in NO_LOSS} == {name.split(" ")[0] for name in LOSSES}


@every_loss
@settings(max_examples=15, deadline=None)
@given(**sizes)
def test_the_order_of_rows_is_no_matter(name, n, seed):
    x, y, c, generator = rows(n, seed)
    order, loss = torch.randperm(n, generator=generator), LOSSES[name].loss
    torch.testing.assert_close(loss(x[order], y[order], c[order]), loss(x, y, c))


@pytest.mark.parametrize("name", [name for name, case in LOSSES.items() if case.swap])
@settings(max_examples=15, deadline=None)
@given(**sizes)
def test_views_may_be_swapped(name, n, seed):
    x, y, c, _ = rows(n, seed)
    loss = LOSSES[name].loss
    torch.testing.assert_close(loss(y, x, c), loss(x, y, c))


@pytest.mark.parametrize("name", [name for name, case in LOSSES.items() if case.lengths])
@settings(max_examples=15, deadline=None)
@given(**sizes)
def test_lengths_of_rows_are_no_matter(name, n, seed):
    """And the gradient stands upright on the row, since along it nothing changes."""
    x, y, c, generator = rows(n, seed)
    loss = LOSSES[name].loss
    factors = torch.rand(2, n, 1, generator=generator, dtype=torch.float64).mul(9).add(0.1)
    torch.testing.assert_close(loss(factors[0] * x, factors[1] * y, c), loss(x, y, c))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x, y, c), x)
    torch.testing.assert_close((gradient * x.detach()).sum(1), torch.zeros(n, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [name for name, case in LOSSES.items() if case.shift])
@settings(max_examples=15, deadline=None)
@given(**sizes)
def test_a_common_offset_is_no_matter(name, n, seed):
    x, y, c, generator = rows(n, seed)
    loss, offset = LOSSES[name].loss, torch.randn(D, generator=generator, dtype=torch.float64).mul(10)
    torch.testing.assert_close(loss(x + offset, y + offset, c), loss(x, y, c), rtol=1e-6, atol=1e-8)


@every_loss
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 7),
    seed=st.integers(0, 2**16),
    size=st.sampled_from([0.0, 1e-20, 1e-6, 1.0, 1e4]),
    shape=st.sampled_from(["rows", "one row", "one number", "equal views", "opposite views"]),
)
def test_value_and_gradient_are_finite(name, n, seed, size, shape):
    """In fp32, for rows that have collapsed, vanish, coincide with their other view, or are very long."""
    x, y, c, _ = rows(n, seed, torch.float32)
    if shape == "one row":
        x, y = x[:1].expand(n, -1), x[:1].expand(n, -1)
    elif shape == "one number":
        x, y = torch.ones_like(x), torch.ones_like(y)
    elif shape.endswith("views"):
        y = x if shape == "equal views" else -x
    x, y = ((size * each).clone().requires_grad_() for each in (x, y))
    loss = LOSSES[name].loss(x, y, c)
    assert torch.isfinite(loss), loss
    for each, gradient in zip("xy", torch.autograd.grad(loss, (x, y), allow_unused=True), strict=True):
        assert gradient is None or torch.isfinite(gradient).all(), (each, gradient)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(name, dtype):
    """Inside autocast, of features as it leaves them: the fp32 value of the same numbers, gradients of their type."""
    x, y, c, _ = rows(8, 1, dtype)
    half, full = ([each.detach().to(kind).requires_grad_() for each in (x, y)] for kind in (dtype, torch.float32))
    with torch.autocast("cpu", dtype=dtype):
        loss = LOSSES[name].loss(*half, c)
    assert loss.dtype in (torch.float32, torch.float64)
    expected = LOSSES[name].loss(*full, c)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    found = [torch.autograd.grad(value, each, allow_unused=True) for value, each in ((loss, half), (expected, full))]
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.float(), theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item() + 1e-6)


@every_loss
def test_no_matrix_of_all_pairs_is_ever_made(name, monkeypatch):
    """Forward and backward: no tensor is longer than a few copies of the features, with tiles and strips made small."""
    n, largest = 120, 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in tree_leaves(out):
                if isinstance(value, Tensor):
                    largest = max(largest, value.numel())
            return out

    monkeypatch.setattr(tiles, "TILE_ON_CPU", 16)
    for module in (pairs, redundancy, geometry):
        monkeypatch.setattr(module, "STRIP", 16 * n)
    monkeypatch.setattr("mllm_vision.functional.momentum_contrast._TILE_ELEMENTS", 16 * n)
    x, y, c, _ = rows(n, 0)
    with Watch():
        LOSSES[name].loss(x.requires_grad_(), y.requires_grad_(), c).backward()
    assert 0 < largest <= 4 * n * D < n * n / 4
