"""Every image method on two ranks: losses, weights, teachers, queues and centres are those of one process."""

from __future__ import annotations

import pytest
import torch
from method_work import batch_norm, resnet_trained, trained
from methods_for_tests import IMAGE_METHODS, assert_same
from methods_for_tests import trained as alone
from torch import nn


@pytest.mark.parametrize("name", IMAGE_METHODS)
def test_two_ranks_are_one(gloo, name):
    wanted = alone(name)
    first, second = gloo.run(2, trained, name, 2)
    assert_same(first, wanted)
    assert_same(second, first)


@pytest.mark.parametrize("name", [name for name in IMAGE_METHODS if name not in ("mae", "dinov2")])
def test_two_ranks_are_one_with_a_resnet(gloo, name):
    """--sync_batch_norm: the encoder's BatchNorm too, and the teacher's, whose rows MoCo shuffles among the ranks."""
    wanted = alone(name, kind="resnet_global")
    assert any(
        key.endswith("running_var") and not torch.equal(value, torch.ones_like(value))
        for key, value in wanted[1].items()
    )
    for found in gloo.run(2, resnet_trained, name):
        assert_same(found, wanted)


def test_two_ranks_in_chunks(gloo):
    """Gradient caching, DDP and the BatchNorm of all ranks together."""
    wanted = alone("simclr")
    for found in gloo.run(2, trained, "simclr", 2, 3):
        assert_same(found, wanted)


@pytest.mark.parametrize(
    ("sizes", "shape", "kind", "momentum", "affine"),
    [
        ([3, 3], (6, 4), "GlobalBatchNorm1d", 0.1, True),
        ([1, 5], (6, 4), "GlobalBatchNorm1d", None, True),
        ([4, 2], (6, 3, 2, 2), "GlobalBatchNorm2d", 0.1, False),
    ],
)
def test_batch_norm_of_two_ranks_is_torchs_of_all_rows(gloo, sizes, shape, kind, momentum, affine):
    """Output, gradient of rows and weights, running statistics; ranks may hold different numbers of rows."""
    rows = torch.randn(shape) * 3 + 100  # a large mean: plain sums of squares would lose the variance
    norm = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](shape[1], momentum=momentum, affine=affine)
    if affine:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2, shape[1]))
            norm.bias.copy_(torch.linspace(-1, 1, shape[1]))
    wanted_rows = rows.clone().requires_grad_()
    wanted = norm(wanted_rows)
    wanted.sin().sum().backward()
    for out, gradient, weights, state in gloo.run(2, batch_norm, rows, sizes, kind, momentum, affine):
        torch.testing.assert_close(out, wanted.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradient, wanted_rows.grad, rtol=1e-3, atol=1e-4)
        for found, value in zip(weights, norm.parameters(), strict=True):
            torch.testing.assert_close(found, value.grad, rtol=1e-3, atol=1e-3)
        for key, value in norm.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-4)
