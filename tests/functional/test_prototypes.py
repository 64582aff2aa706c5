"""Spherical k-means, concentrations and ProtoNCE against oracles, brute force and identities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import numeric
from oracles import prototypes as oracle

from mllm_vision.functional.infonce import info_nce
from mllm_vision.functional.prototypes import concentration, proto_nce, spherical_kmeans

seeds = st.integers(0, 2**16)


def planted(clusters=4, each=30, d=8, seed=0):
    """Rows around `clusters` orthogonal directions, of any length, and which direction each belongs to."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(clusters), each)
    rows = (np.eye(d)[owner] + 0.1 * rng.normal(size=(len(owner), d))) * rng.uniform(0.5, 3, size=(len(owner), 1))
    order = rng.permutation(len(owner))
    return torch.tensor(rows[order]), torch.tensor(owner[order])


def test_planted_clusters_are_found():
    rows, owner = planted()
    found = spherical_kmeans(rows, 4, restarts=5)
    pairs = set(zip(found.assignments.tolist(), owner.tolist(), strict=True))
    assert len(pairs) == 4 and found.similarity > 0.9  # one to one
    torch.testing.assert_close(found.centroids.norm(dim=1), torch.ones(4, dtype=torch.float64))


@settings(max_examples=20, deadline=None)
@given(st.integers(4, 7), st.integers(2, 3), seeds)
def test_the_best_of_many_starts_is_what_brute_force_finds(n, k, seed):
    rows = np.random.default_rng(seed).normal(size=(n, 3))
    found = spherical_kmeans(torch.tensor(rows), k, restarts=40)
    best = oracle.best_clustering(rows, k)
    assert found.similarity <= best + 1e-9
    assert found.similarity == pytest.approx(best, rel=0.02)  # a local optimum near it at the least


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 40), st.integers(1, 5), st.sampled_from([None, 1, 7]), seeds)
def test_what_it_ends_with_is_consistent(n, k, tile, seed):
    rows = torch.tensor(np.random.default_rng(seed).normal(size=(n, 4)))
    found = spherical_kmeans(rows, k, iterations=50, tile_size=tile)
    unit = F.normalize(rows, dim=1)
    cosines = unit @ found.centroids.T
    assert torch.equal(found.assignments, cosines.argmax(1))  # every row has the nearest centroid
    assert found.similarity == pytest.approx(cosines.max(1).values.mean().item())
    for cluster in found.assignments.unique():  # and every centroid is the mean direction of its rows
        mean = unit[found.assignments == cluster].sum(0)
        torch.testing.assert_close(F.normalize(mean, dim=0), found.centroids[cluster], rtol=1e-6, atol=1e-6)


def test_more_iterations_and_more_starts_are_never_worse():
    rows = torch.randn(200, 6, dtype=torch.float64)
    reached = [spherical_kmeans(rows, 12, iterations=count).similarity for count in (1, 2, 4, 8, 30)]
    assert reached == sorted(reached) and reached[0] < reached[-1]
    assert spherical_kmeans(rows, 12, restarts=4).similarity >= spherical_kmeans(rows, 12).similarity
    again = spherical_kmeans(rows, 12, seed=3)
    assert torch.equal(again.assignments, spherical_kmeans(rows * 7, 12, seed=3).assignments)  # lengths do not matter


def test_a_centroid_without_rows_gets_some():
    """Of thirty equal rows and two others, starts mostly fall on the equal ones; three directions are there."""
    rows = torch.cat([torch.tensor([[1.0, 0.0]]).repeat(30, 1), torch.tensor([[0.0, 1.0], [0.7, 0.7]])])
    found = [spherical_kmeans(rows, 3, seed=seed) for seed in range(8)]
    assert max(len(each.assignments.unique()) for each in found) == 3
    assert all(each.centroids.isfinite().all() for each in found)
    same = spherical_kmeans(torch.ones(10, 3), 4)
    assert same.centroids.isfinite().all() and same.similarity == pytest.approx(1.0, abs=1e-5)
    every = spherical_kmeans(torch.eye(6), 6)
    assert sorted(every.assignments.tolist()) == list(range(6)) and every.similarity == pytest.approx(1.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 30), st.integers(2, 6), st.floats(0.05, 1.0), seeds)
def test_concentrations_are_the_official_codes(n, k, temperature, seed):
    rng = np.random.default_rng(seed)
    features, centroids = rng.normal(size=(n, 4)), rng.normal(size=(k, 4))
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    assigned = rng.integers(0, k, size=n)
    assigned[:2] = 0  # at least one cluster of two
    found = concentration(*map(torch.tensor, (features, centroids, assigned)), temperature=temperature)
    np.testing.assert_allclose(found, oracle.concentration(features, centroids, assigned, temperature), rtol=1e-9)
    assert found.mean().item() == pytest.approx(temperature)


def test_concentrations_of_rows_that_all_coincide_are_the_temperature():
    found = concentration(torch.ones(4, 3), F.normalize(torch.ones(2, 3), dim=1), torch.tensor([0, 0, 1, 1]))
    assert found.isfinite().all()
    torch.testing.assert_close(found.mean(), torch.tensor(0.2))
    alone = concentration(torch.eye(3), torch.eye(3), torch.arange(3), temperature=0.5)
    torch.testing.assert_close(alone, torch.full((3,), 0.5))


def test_clusters_of_copies_have_a_temperature_to_divide_by():
    """Two images four times each, and two loose pairs: clipped or not, the official phi of the copies is zero."""
    corners = torch.eye(4)
    loose = [F.normalize(corners[place] + 0.3 * corners[place - 1], dim=0) for place in (2, 3)]
    rows = torch.stack([*corners[:2].repeat_interleave(4, 0), corners[2], loose[0], corners[3], loose[1]])
    assigned = torch.tensor([0] * 4 + [1] * 4 + [2] * 2 + [3] * 2)
    found = concentration(rows, corners, assigned, temperature=0.2)
    torch.testing.assert_close(found[:2], torch.tensor([0.02, 0.02]))
    official = oracle.concentration(rows.double().numpy(), corners.double().numpy(), assigned.numpy(), 0.2)
    assert official[:2].max() < 1e-3 and found[2:].min() > 0.2
    np.testing.assert_allclose(found[2:], official[2:], rtol=1e-5)


def clusterings(rng, n, d, sizes):
    found = []
    for k in sizes:
        centroids = rng.normal(size=(k, d))
        centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
        found.append((centroids, rng.uniform(0.1, 1.0, size=k), rng.integers(0, k, size=n)))
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.lists(st.integers(1, 7), min_size=1, max_size=3), st.booleans(), seeds)
def test_proto_nce_and_its_gradient_are_the_oracles(n, sizes, repeats, seed):
    rng = np.random.default_rng(seed)
    query, given_ = rng.normal(size=(n, 4)), clusterings(rng, n, 4, sizes)
    columns = [[torch.tensor(part) for part in column] for column in zip(*given_, strict=True)]
    leaf = torch.tensor(query, requires_grad=True)
    loss = proto_nce(leaf, *columns, repeats=repeats, tile_size=3)
    loss.backward()
    assert loss.item() == pytest.approx(oracle.proto_nce(query, given_, repeats), rel=1e-8, abs=1e-9)
    numeric.check_gradients(
        [leaf], lambda q: oracle.proto_nce(q, given_, repeats), [query], rtol=1e-5, atol=1e-6 * max(1, loss.item())
    )


def test_prototypes_that_are_the_keys_are_info_nce():
    """Every row a cluster of its own, all of one temperature: instance discrimination."""
    torch.manual_seed(0)
    query, keys = torch.randn(7, 5, dtype=torch.float64), F.normalize(torch.randn(7, 5, dtype=torch.float64), dim=1)
    phi = torch.full((7,), 0.2, dtype=torch.float64)
    for repeats in (True, False):
        loss = proto_nce(query, [keys], [phi], [torch.arange(7)], repeats=repeats)
        torch.testing.assert_close(loss, info_nce(query, keys, temperature=0.2))


def test_proto_nce_at_chance_and_under_permutation():
    torch.manual_seed(0)
    same = F.normalize(torch.ones(5, 3), dim=1)
    assigned = torch.tensor([0, 0, 2])
    args = [same], [torch.full((5,), 0.3)], [assigned]
    assert proto_nce(torch.ones(3, 3), *args, repeats=False).item() == pytest.approx(math.log(5), rel=1e-5)
    assert proto_nce(torch.ones(3, 3), *args).item() == pytest.approx(math.log(6), rel=1e-5)  # 0 stands there twice
    query, prototypes, phi = torch.randn(3, 3), F.normalize(torch.randn(5, 3), dim=1), torch.rand(5) + 0.1
    order = torch.randperm(5)
    moved = proto_nce(query, [prototypes[order]], [phi[order]], [order.argsort()[assigned]])
    torch.testing.assert_close(moved, proto_nce(query, [prototypes], [phi], [assigned]))
    torch.testing.assert_close(proto_nce(4 * query, [prototypes], [phi], [assigned], normalize=True), moved)


def test_what_is_refused():
    rows = torch.randn(6, 3)
    with pytest.raises(ValueError, match="k=7 clusters of 6 rows"):
        spherical_kmeans(rows, 7)
    with pytest.raises(ValueError, match="2 values that are not finite"):
        spherical_kmeans(torch.where(torch.arange(18).view(6, 3) < 2, torch.nan, rows), 2)
    with pytest.raises(ValueError, match="iterations=0"):
        spherical_kmeans(rows, 2, iterations=0)
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        spherical_kmeans(rows[0], 1)
    with pytest.raises(ValueError, match="temperature=0"):
        concentration(rows, rows[:2], torch.zeros(6, dtype=torch.int64), temperature=0)
    with pytest.raises(ValueError, match="as many of each"):
        proto_nce(rows, [], [], [])
    with pytest.raises(ValueError, match=r"prototypes must be \[K, 3\]"):
        proto_nce(rows, [torch.randn(4, 2)], [torch.ones(4)], [torch.zeros(6, dtype=torch.int64)])
