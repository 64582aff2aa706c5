"""Patches and the masked error: identities, an oracle in plain loops, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_vision.functional.reconstruction import masked_reconstruction, patchify, unpatchify


def test_patchify_cuts_as_loops_do():
    pixels = torch.randn(2, 3, 6, 4)
    expected = [
        [image[:, top : top + 2, left : left + 2].permute(1, 2, 0).flatten() for top in (0, 2, 4) for left in (0, 2)]
        for image in pixels
    ]
    assert torch.equal(patchify(pixels, 2), torch.stack([torch.stack(row) for row in expected]))
    assert torch.equal(unpatchify(patchify(pixels, 2), 2, 6), pixels)


def test_error_is_that_of_loops():
    rng = np.random.default_rng(0)
    predicted, target = rng.normal(size=(2, 3, 5, 12))
    mask = rng.random((3, 5)) < 0.5
    mask[2] = False
    expected = []
    for row in range(3):
        errors = []
        for patch in np.flatnonzero(mask[row]):
            true = target[row, patch]
            true = (true - true.mean()) / np.sqrt(true.var(ddof=1) + 1e-6)
            errors.append(np.mean((predicted[row, patch] - true) ** 2))
        expected.append(np.mean(errors) if errors else 0.0)
    given = (torch.tensor(predicted), torch.tensor(target), torch.tensor(mask))
    np.testing.assert_allclose(masked_reconstruction(*given).numpy(), expected, rtol=1e-12)


def test_what_is_visible_does_not_count_and_scale_and_shift_are_no_matter():
    predicted, target = torch.randn(2, 4, 6, 12).unbind(0)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:, ::2] = True
    error = masked_reconstruction(predicted, target, mask)
    changed = torch.where(mask[..., None], predicted, predicted + 7)
    assert torch.equal(masked_reconstruction(changed, target, mask), error)
    torch.testing.assert_close(masked_reconstruction(predicted, 3 * target + 2, mask), error, rtol=1e-4, atol=1e-5)
    zero = masked_reconstruction(torch.zeros_like(predicted), 9 * target, mask)
    torch.testing.assert_close(zero, torch.full((4,), 1 - 1 / 12), rtol=1e-4, atol=1e-5)


def test_autocast_computes_in_full_precision():
    predicted, target = torch.randn(2, 2, 3, 12).unbind(0)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error = masked_reconstruction(predicted, target, mask)
    assert error.dtype == torch.float32
    assert torch.equal(error, masked_reconstruction(predicted, target, mask))


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"cannot be cut into patches of 5"):
        patchify(torch.zeros(1, 3, 8, 8), 5)
    with pytest.raises(ValueError, match=r"do not fit images of height 9"):
        unpatchify(torch.zeros(1, 4, 12), 2, 9)
    with pytest.raises(ValueError, match=r"mask \[B, N\], got \[1, 4, 12\]"):
        masked_reconstruction(torch.zeros(1, 4, 12), torch.zeros(1, 4, 12), torch.ones(1, 3, dtype=torch.bool))
