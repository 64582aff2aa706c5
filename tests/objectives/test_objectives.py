"""CLIP and SigLIP as objectives: initial values, clamping, duplicates, names, chunks."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from oracles import image_text as oracle
from pairs_for_tests import make_dual, make_objective, pair_batches

from mllm_vision.objectives import Objective, list_objectives, load_objective
from mllm_vision.objectives.clip import CLIP
from mllm_vision.objectives.siglip import SigLIP


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_loss_is_the_oracles_with_duplicates_as_positives(kind):
    objective = make_objective(kind)
    batch = pair_batches(1, 8)[0]
    with torch.no_grad():
        output = objective(**batch)
        image = objective.dual.image_features(batch["pixel_values"]).double().numpy()
        text = objective.dual.text_features(batch["input_ids"], batch["attention_mask"]).double().numpy()
        ids = torch.stack([batch["caption_ids"], batch["image_ids"]], 1).tolist()
        positives = oracle.positives_from_ids(ids)
        assert positives.sum() > 8  # the batch does hold duplicates
        if kind == "clip":
            expected = oracle.clip(image, text, 1 / 0.07, positives)[0]
            plain = oracle.clip(image, text, 1 / 0.07)[0]
        else:
            expected = oracle.siglip(image, text, 10.0, -10.0, positives)[0]
            plain = oracle.siglip(image, text, 10.0, -10.0)[0]
        assert output.loss.item() == pytest.approx(expected, rel=1e-4)
        objective.config.duplicate_positives = False
        assert objective(**batch).loss.item() == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_embedding_in_chunks_is_embedding_at_once(kind):
    objective = make_objective(kind)
    batch = pair_batches(1, 8)[0]
    whole = objective.embed(**batch)
    chunks = [objective.embed(**{key: value[i : i + 3] for key, value in batch.items()}) for i in (0, 3, 6)]
    joined = {key: torch.cat([chunk[key] for chunk in chunks]) for key in whole}
    torch.testing.assert_close(objective.loss(joined).loss, objective(**batch).loss, rtol=1e-5, atol=1e-6)


def test_clip_starts_at_the_papers_temperature_and_stays_within_its_clamp():
    objective = make_objective("clip")
    assert objective.dual.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    with torch.no_grad():
        objective.dual.logit_scale.fill_(9.0)
    objective.after_step(0.5)
    assert objective.dual.logit_scale.exp().item() == pytest.approx(100.0)
    with torch.no_grad():
        objective.dual.logit_scale.fill_(-1.0)
    objective.after_step(0.5)
    assert objective.dual.logit_scale.item() == 0.0
    kept = CLIP(objective.dual, CLIP.Config(initial_logit_scale=None))
    assert kept.dual.logit_scale.item() == 0.0
    with pytest.raises(ValueError, match="must lie in"):
        make_objective("clip", initial_logit_scale=200.0)


def test_siglip_starts_as_the_paper_says():
    objective = make_objective("siglip")
    assert objective.dual.logit_scale.item() == pytest.approx(math.log(10))
    assert objective.dual.logit_bias.item() == -10
    assert make_objective("siglip", initial_logit_bias=-2.71).dual.logit_bias.item() == pytest.approx(-2.71)
    with pytest.raises(ValueError, match="needs a logit bias"):
        SigLIP(make_dual("clip"))
    with pytest.raises(ValueError, match="has no bias"):
        CLIP(make_dual("clip", bias=-1.0))


@pytest.mark.parametrize("n", [2, 16, 1000])
def test_chance_is_the_loss_of_a_model_that_knows_nothing(n):
    flat = np.ones((n, 3)) if n < 100 else None
    clip, siglip = make_objective("clip"), make_objective("siglip")
    assert clip.chance_loss(n) == pytest.approx(math.log(n))
    if flat is not None:
        assert oracle.clip(flat, flat, 5.0)[0] == pytest.approx(clip.chance_loss(n))
        # the bias alone, at its best, with features that say nothing
        near = -math.log(n - 1) + np.linspace(-0.4, 0.4, 41)
        best = min(oracle.siglip(flat, flat, 0.0, bias)[0] for bias in near)
        assert siglip.chance_loss(n) == pytest.approx(best, rel=1e-5)
    assert siglip.chance_loss(n) < math.log(n) + 1


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_forward_names_the_columns_and_every_trainable_parameter_has_a_gradient(kind):
    """**kwargs would make the Trainer believe the loss scaled; a parameter without gradient stops DDP."""
    objective = make_objective(kind)
    parameters = inspect.signature(objective.forward).parameters
    assert list(parameters) == ["pixel_values", "input_ids", "attention_mask", "caption_ids", "image_ids"]
    output = objective(**pair_batches(1, 8)[0])
    output.loss.backward()
    without = [name for name, value in objective.named_parameters() if value.requires_grad and value.grad is None]
    assert without == []
    assert all(not value.requires_grad for value in output.metrics.values())
    assert objective.encoder is objective.dual.vision


def test_dinov2s_mask_token_does_not_train():
    objective = CLIP(make_dual("dinov2"))
    objective(**pair_batches(1, 8)[0]).loss.backward()
    assert [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_few_steps_learn_the_pairs(kind):
    torch.manual_seed(0)
    objective = make_objective(kind, **({"initial_logit_bias": -2.71} if kind == "siglip" else {})).train()
    batch = pair_batches(1, 8, seed=3)[0] | {"caption_ids": torch.arange(8), "image_ids": torch.arange(8)}
    batch["pixel_values"] = torch.randn(8, 3, 32, 32)
    batch["input_ids"][:, :6] = torch.randint(5, 200, (8, 6))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=5e-3 if kind == "siglip" else 2e-3)
    for step in range(40):
        loss = objective(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(step / 40)
    assert loss.item() < 0.3 * objective.chance_loss(8)


def test_names():
    assert {"clip", "itc", "siglip"} <= set(list_objectives())
    assert load_objective("CLIP") is CLIP and load_objective("mllm_vision.objectives.siglip:SigLIP") is SigLIP
    with pytest.raises(ValueError, match="nearest known one is 'siglip'"):
        load_objective("siglp")
    with pytest.raises(ValueError, match="cannot load"):
        load_objective("no_such_package:Thing")
    with pytest.raises(ValueError, match="not a subclass of"):
        load_objective("math:sqrt")
    assert issubclass(CLIP, Objective) and CLIP.couples_batch
