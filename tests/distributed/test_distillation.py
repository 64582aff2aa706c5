"""Teacher-student losses, k-means and its prototypes: two and three ranks, uneven ones too, are one process."""

from __future__ import annotations

import distillation_work as work
import pytest
import torch

SIZES = [[5, 5], [2, 7, 1]]


@pytest.mark.parametrize("sizes", SIZES)
def test_losses_over_ranks_are_those_of_the_whole_batch(gloo, sizes):
    torch.manual_seed(0)
    student, taught = torch.randn(10, 3, 6, dtype=torch.float64), torch.randn(10, 3, 6, dtype=torch.float64).softmax(-1)
    mask = torch.rand(10, 3) < 0.5
    torch.manual_seed(0)  # as the workers begin
    expected = work.row_losses(student, taught, mask, [10])
    for found in gloo.run(len(sizes), work.row_losses, student, taught, mask, sizes):
        for name, (value, gradient) in expected.items():
            assert found[name][0] == pytest.approx(value, rel=1e-9), name
            assert gradient.abs().max() > 1e-4
            torch.testing.assert_close(found[name][1], gradient, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("sizes", [[5, 5], [0, 7, 3]])
def test_the_teachers_side_agrees(gloo, sizes):
    logits = torch.randn(10, 6, dtype=torch.float64)
    expected = work.teacher_side(logits, [10])
    for found in gloo.run(len(sizes), work.teacher_side, logits, sizes):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sizes", [[20, 20], [0, 31, 9]])
def test_clusters_do_not_depend_on_the_ranks(gloo, sizes):
    rows = torch.randn(40, 4)
    rows[:12] = rows[0]  # so that some centroids start without rows
    expected = work.clusters(rows, 9, [40])
    for centroids, assignments, similarity, phi in gloo.run(len(sizes), work.clusters, rows, 9, sizes):
        assert torch.equal(assignments, expected[1])
        torch.testing.assert_close(centroids, expected[0], rtol=1e-5, atol=1e-6)
        assert similarity == pytest.approx(expected[2], rel=1e-6)
        torch.testing.assert_close(phi, expected[3], rtol=1e-5, atol=1e-6)
