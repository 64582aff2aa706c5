"""SupCon as an objective: classes, rows without a label, more views than two, and labels that are missing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from views_for_tests import make_method, view_batch

from mllm_vision.functional.infonce import nt_xent
from mllm_vision.objectives.supcon import SupCon

LABELS = torch.tensor([0, 1, 0, 2, 2, 0])
SMALL = {"head_out": 16}


def by_loops(z, labels, temperature):
    """Equation 2 of the paper, view by view; a view without a positive counts as zero."""
    z = z / np.linalg.norm(z, axis=-1, keepdims=True)
    rows = z.reshape(-1, z.shape[-1])
    classes = np.repeat(labels, z.shape[1])
    losses = []
    for i, row in enumerate(rows):
        scores = rows @ row / temperature
        denominator = sum(math.exp(scores[k]) for k in range(len(rows)) if k != i)
        positives = [k for k in range(len(rows)) if k != i and classes[k] == classes[i]]
        losses.append(-np.mean([scores[k] - math.log(denominator) for k in positives]) if positives else 0.0)
    return np.mean(losses)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_it_is_the_papers_loss(views, temperature):
    objective = make_method(SupCon, temperature=temperature, **SMALL)
    batch = view_batch(views=views)
    z = objective.embed(batch, LABELS)["z"].detach().double().numpy()
    expected = by_loops(z, LABELS.numpy(), temperature)
    output = objective(views=batch, labels=LABELS)
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)
    assert output.metrics["labelled"].item() == 1


def test_rows_without_a_label_are_positives_of_themselves_alone():
    objective = make_method(SupCon, **SMALL)
    labels = torch.tensor([0, -1, 0, -1, -1, 3])
    batch = view_batch()
    z = objective.embed(batch, labels)["z"].detach().double().numpy()
    output = objective(views=batch, labels=labels)
    expected = by_loops(z, np.array([0, 11, 0, 13, 14, 3]), 0.07)
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)
    assert output.metrics["labelled"].item() == 0.5
    none = objective(views=batch, labels=torch.full((6,), -1)).loss
    z1, z2 = torch.tensor(z).unbind(1)
    assert none.item() == pytest.approx(nt_xent(z1, z2, temperature=0.07).item(), rel=1e-4)


def test_collapsed_features_cost_what_chance_says_however_the_classes_fall():
    objective = make_method(SupCon, **SMALL)
    same = {"h": torch.ones(6, 2, 32), "z": torch.ones(6, 2, 16)}
    for labels in (LABELS, torch.zeros(6, dtype=torch.int64), torch.arange(6)):
        assert objective.loss({**same, "labels": labels}).loss.item() == pytest.approx(math.log(11), rel=1e-5)
    assert objective.chance_loss(6) == pytest.approx(math.log(11))


def test_classes_draw_together_and_labels_matter():
    objective = make_method(SupCon, encoder={"initializer_range": 0.2}, temperature=0.1, **SMALL)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    labels, batch = torch.arange(16) % 2, view_batch(16)
    for _ in range(40):
        output = objective(views=batch, labels=labels)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    z = nn.functional.normalize(objective.embed(batch, labels)["z"][:, 0].detach(), dim=1)
    cosines, same = z @ z.T, labels[:, None] == labels[None]
    assert cosines[same].mean() > cosines[~same].mean() + 0.5


def test_the_head_is_the_official_one():
    head = make_method(SupCon, **SMALL).head
    assert [type(module) for module in head] == [nn.Linear, nn.ReLU, nn.Linear]  # no BatchNorm
    assert head[0].weight.shape == (32, 32) and head[2].weight.shape == (16, 32)
    assert SupCon.Config().head_out == 128 and SupCon.Config().temperature == 0.07


def test_what_is_refused():
    with pytest.raises(ValueError, match="needs the column 'labels'.*--label_column"):
        make_method(SupCon, **SMALL)(views=view_batch())
    with pytest.raises(ValueError, match="temperature=0"):
        make_method(SupCon, temperature=0, **SMALL)
    with pytest.raises(ValueError, match="V >= 2"):
        make_method(SupCon, **SMALL)(views=view_batch(views=1), labels=LABELS)
