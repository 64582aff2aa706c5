"""Contrastive, triplet and DCL as objectives: pairs and classes, rows without a label, chance, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from views_for_tests import make_method, view_batch

from mllm_vision.functional.pairs import STRATEGIES
from mllm_vision.objectives.contrastive import Contrastive, next_of_class
from mllm_vision.objectives.simclr import SimCLR
from mllm_vision.objectives.triplet import Triplet

LABELS = torch.tensor([0, 1, 0, 2, 2, 0])
SMALL = {"head_out": 16}
SAME = {"h": torch.ones(6, 2, 32), "z": torch.ones(6, 2, 16)}


def test_each_member_of_a_class_meets_the_next_one():
    assert next_of_class(LABELS).tolist() == [2, 1, 5, 4, 3, 0]
    assert next_of_class(torch.arange(4)).tolist() == [0, 1, 2, 3]
    assert next_of_class(torch.zeros(3, dtype=torch.int64)).tolist() == [1, 2, 0]


def test_collapsed_rows_cost_what_chance_says():
    contrastive = make_method(Contrastive, margin=1.5, **SMALL)
    distinct = contrastive.loss({**SAME, "labels": torch.full((6,), -1)}).loss
    assert distinct.item() == pytest.approx(contrastive.chance_loss(6)) == pytest.approx(1.5**2 / 2)
    two = contrastive.loss({**SAME, "labels": torch.tensor([0, 0, 1, 1, 2, 2])})  # three of six pairs differ
    assert two.metrics["positives"].item() == 2 and two.loss.item() == pytest.approx(1.5**2 / 4)
    assert contrastive.chance_loss(6, 2.0) == pytest.approx(1.5**2 / 2 * 4 / 5)  # of pairs drawn at random
    for mining in STRATEGIES:
        triplet = make_method(Triplet, mining=mining, **SMALL)
        output = triplet.loss({**SAME, "labels": LABELS})
        assert output.metrics["hardest"].item() == pytest.approx(0.2)
        wanted = triplet.chance_loss(6)
        assert wanted is None if mining == "batch_semi_hard" else output.loss.item() == pytest.approx(wanted)
    dcl = make_method(SimCLR, decoupled=True, head_last_norm="batch", **SMALL)
    assert (
        dcl.chance_loss(6) == pytest.approx(2 * math.log(10)) and "information_bound" not in dcl(view_batch()).metrics
    )


def test_a_row_without_a_label_is_alone():
    """It has its own other view as a positive, and is a negative of all others, of unlabelled ones too."""
    alone, given = torch.full((6,), -1), torch.arange(6)
    for method in (make_method(Contrastive, margin=5.0, **SMALL), make_method(Triplet, mining="batch_all", **SMALL)):
        batch = view_batch()
        without, named = (method(views=batch, labels=labels) for labels in (alone, given))
        torch.testing.assert_close(without.loss, named.loss)
        assert without.metrics["labelled"] == 0 and named.metrics["labelled"] == 1


def test_a_batch_of_one_class_has_no_triplets():
    output = make_method(Triplet, **SMALL)(views=view_batch(), labels=torch.zeros(6, dtype=torch.int64))
    assert output.loss == 0 and output.metrics["active"] == 0 and "hardest" not in output.metrics


@pytest.mark.parametrize(
    ("method", "config"),
    [(Contrastive, {"margin": 2.0}), *((Triplet, {"mining": mining}) for mining in STRATEGIES)],
)
def test_classes_draw_together(method, config):
    objective = make_method(method, encoder={"initializer_range": 0.2}, **config, **SMALL)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    labels = torch.arange(16) % 2
    batch = view_batch(16) + 2.0 * labels[:, None, None, None, None]  # the second class is brighter
    for _ in range(80):
        order = torch.randperm(16)
        output = objective(views=batch[order], labels=labels[order])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    z = objective.embed(batch, labels)["z"][:, 0].detach()
    z = nn.functional.normalize(z, dim=1) if objective.config.normalize else z
    distances, same = torch.cdist(z, z), labels[:, None] == labels[None]
    assert distances[same].mean() < 0.5 * distances[~same].mean()


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        (Contrastive, {"margin": 0}, "margin=0 must be positive"),
        (Triplet, {"margin": -1}, "margin=-1 must be positive"),
        (Triplet, {"mining": "batch_semihard"}, "nearest known one is 'batch_semi_hard'"),
        (SimCLR, {"dcl_sigma": 0.5}, "belongs to --decoupled"),
        (SimCLR, {"dcl_sigma": 0.0, "decoupled": True}, "must be positive"),
    ],
)
def test_what_is_refused(method, config, message):
    with pytest.raises(ValueError, match=message):
        make_method(method, **config, **SMALL)
