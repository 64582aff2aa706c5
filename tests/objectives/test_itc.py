"""ITC as an objective: the algorithm step by step against the oracle, duplicates, chunks, the ramp, resuming."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import momentum as oracle
from pairs_for_tests import make_dual, make_objective, pair_batches
from torch import nn

from mllm_vision.objectives import load_objective
from mllm_vision.objectives.itc import ITC


class LinearTowers(nn.Module):
    """What an `ImageTextObjective` asks of a pair, with towers that can be worked out by hand."""

    vision = SimpleNamespace(backbone=SimpleNamespace(model_type="vit"))

    def __init__(self, pixels: int, words: int, embed_dim: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(pixels, embed_dim, bias=False), nn.Linear(words, embed_dim, bias=False)
        self.logit_scale, self.logit_bias, self.embed_dim = nn.Parameter(torch.tensor(0.0)), None, embed_dim

    def image_features(self, pixel_values, patch_dropout=0.0):
        return self.image(pixel_values)

    def text_features(self, input_ids, attention_mask=None):
        return self.text(input_ids)


def test_steps_are_those_of_the_papers_algorithm():
    """Twelve steps of SGD, a queue of 7 under batches of 5, duplicates: every weight, the queue and every loss."""
    torch.manual_seed(3)
    rng = np.random.default_rng(3)
    epoch = 8  # steps
    dual = LinearTowers(6, 4, 3).double()
    objective = ITC(dual, ITC.Config(queue_size=7, momentum=0.9, initial_logit_scale=5.0)).double().train()
    paper = oracle.LinearAlbef(
        dual.image.weight.detach().numpy(), dual.text.weight.detach().numpy(), math.log(5.0),
        momentum=0.9, size=7, alpha=0.4, rate=0.5,
    )  # fmt: skip
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.5)
    for step in range(12):
        x_image, x_text = rng.normal(size=(5, 6)), rng.normal(size=(5, 4))
        ids = rng.integers(0, 9, size=(5, 2))
        expected = paper.step(x_image, x_text, ids.tolist(), step / epoch)
        output = objective(
            torch.tensor(x_image), torch.tensor(x_text), None, torch.tensor(ids[:, 0]), torch.tensor(ids[:, 1])
        )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        objective.epoch = (step + 1) / epoch
        objective.after_step((step + 1) / 12)
        assert output.loss.item() == pytest.approx(expected, rel=1e-9), step
        assert output.metrics["alpha"].item() == pytest.approx(0.4 * min(1, step / epoch), rel=1e-6)
    for mine, theirs in zip((dual.image, dual.text), paper.weights, strict=True):
        np.testing.assert_allclose(mine.weight.detach().numpy(), theirs, rtol=1e-8, atol=1e-9)
    # the oracle lets its momentum weights follow at the start of the next step, as the official code does
    slow = [0.9 * weight + 0.1 * fast for weight, fast in zip(paper.slow, paper.weights, strict=True)]
    np.testing.assert_allclose(objective.teacher.module.image.weight.numpy(), slow[0], rtol=1e-8, atol=1e-9)
    queued = {tuple(np.round(np.concatenate(row[:2]), 4)) for row in paper.queue}
    assert {tuple(np.round(row.numpy(), 4)) for row in objective.queue.rows} == queued
    assert sorted(map(tuple, objective.queue.ids.tolist())) == sorted(tuple(row[2]) for row in paper.queue)
    assert dual.logit_scale.item() == pytest.approx(paper.log_scale, rel=1e-9)


def stepped(steps: int = 3, size: int = 8, **config):
    """A tiny objective after some steps, so that its queue and its momentum towers have moved."""
    objective = make_objective("itc", **({"queue_size": 11, "momentum": 0.8} | config)).train()
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    for step, batch in enumerate(pair_batches(steps, size)):
        optimizer.zero_grad()
        objective(**batch).loss.backward()
        optimizer.step()
        objective.after_step((step + 1) / steps)
    return objective


def test_duplicates_in_batch_and_queue_are_positives():
    objective = stepped()
    batch = pair_batches(4, 8)[3]
    with torch.no_grad():
        rows = {key: value.double().numpy() for key, value in objective.embed(**batch).items() if key != "ids"}
        output = objective(**batch)
        queue_image, queue_text = (part.double().numpy() for part in objective.queue.rows.chunk(2, dim=1))
    ids = torch.stack([batch["caption_ids"], batch["image_ids"]], 1).tolist()
    queue_ids = objective.queue.ids.tolist()
    own = oracle.positives(ids, queue_ids)
    assert any(j >= 8 for row in own for j in row) and any(len(set(row) & set(range(8))) > 1 for row in own)
    given = (
        rows["image"], rows["text"], rows["image_momentum"], rows["text_momentum"],
        objective.logit_scale.exp().item(), 0.4, list(queue_image), list(queue_text),
    )  # fmt: skip
    assert output.loss.item() == pytest.approx(oracle.itc(*given, own)["loss"], rel=1e-4)
    objective.config.duplicate_positives = False
    plain = oracle.itc(*given, [[i] for i in range(8)])["loss"]
    assert objective(**batch).loss.item() == pytest.approx(plain, rel=1e-4)
    assert abs(plain - output.loss.item()) > 1e-3


def test_pairs_without_ids_are_no_duplicates_of_one_another():
    objective = stepped()
    batch = pair_batches(1, 8)[0]
    without = {key: batch[key] for key in ("pixel_values", "input_ids", "attention_mask")}
    assert objective.embed(**without)["ids"].tolist() == [[-1, -1]] * 8
    with_one = objective.embed(**without, image_ids=batch["image_ids"])["ids"]
    assert with_one[:, 0].unique().tolist() == [-1] and torch.equal(with_one[:, 1], batch["image_ids"])
    loss = objective(**without).loss.item()
    objective.config.duplicate_positives = False
    assert objective(**without).loss.item() == pytest.approx(loss, rel=1e-6)


def test_embedding_in_chunks_is_embedding_at_once_and_leaves_no_trace():
    objective = stepped()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    batch = pair_batches(4, 8)[3]
    whole = objective.embed(**batch)
    chunks = [objective.embed(**{key: value[i : i + 3] for key, value in batch.items()}) for i in (0, 3, 6)]
    joined = {key: torch.cat([chunk[key] for chunk in chunks]) for key in whole}
    torch.testing.assert_close(objective.loss(joined).loss, objective(**batch).loss, rtol=1e-5, atol=1e-6)
    assert not whole["image_momentum"].requires_grad and whole["image"].requires_grad
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())


def test_alpha_rises_over_the_first_epoch_and_the_queue_fills_once_a_step():
    objective = make_objective("itc", queue_size=20).train()
    batches, seen = pair_batches(5, 8), []
    for step, batch in enumerate(batches):
        metrics = objective(**batch).metrics
        objective(**batch)  # a second look at the batch enqueues nothing more
        seen.append((metrics["alpha"].item(), metrics["queue_rows"].item()))
        objective.epoch = (step + 1) / 4
        objective.after_step((step + 1) / 40)
    assert seen == [(pytest.approx(a), q) for a, q in [(0, 0), (0.1, 8), (0.2, 16), (0.3, 20), (0.4, 20)]]
    objective.eval()(**batches[0])
    kept = objective.queue.rows.clone()
    objective.after_step(1.0)  # nothing is pending: looking in evaluation mode puts nothing in
    assert torch.equal(objective.queue.rows, kept)
    alone = make_objective("itc", alpha_ramp_epochs=0.5).train()
    for progress, share in ((0.1, 0.2), (0.4, 0.8), (0.9, 1.0)):
        alone.after_step(progress)  # no trainer told an epoch: the training is one
        assert alone.alpha == pytest.approx(0.4 * share)
    assert make_objective("itc", alpha_ramp_epochs=0.0).alpha == pytest.approx(0.4)


def test_saved_and_loaded_it_goes_on_exactly():
    one = stepped(3)
    other = make_objective("itc", queue_size=11, momentum=0.8).train()
    state = {name: value.clone() for name, value in one.state_dict().items()}
    other.load_state_dict(state)
    assert {"queue.features", "queue.id_table", "queue.written", "alpha_share"} <= set(state)
    for objective in (one, other):
        optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
        for batch in pair_batches(6, 8)[3:]:
            optimizer.zero_grad()
            objective(**batch).loss.backward()
            optimizer.step()
            objective.after_step(1.0)
    after = other.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in one.state_dict().items())
    assert any(not torch.equal(value, state[name]) for name, value in after.items())


def test_the_momentum_towers_are_a_copy_that_neither_trains_nor_drops():
    objective = make_objective("itc").train()
    trained = {name for name, value in objective.named_parameters() if value.requires_grad}
    assert {name.partition(".")[0] for name in trained} == {"dual", "temperature"} and "dual.logit_scale" not in trained
    assert not any(module.training for module in objective.teacher.modules())
    batch = pair_batches(1, 4)[0]
    found = objective.embed(**batch)
    torch.testing.assert_close(found["image_momentum"], found["image"])  # the copy starts as the pair
    objective(**batch).loss.backward()
    assert [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not any(name.startswith(("teacher", "queue")) for name in dict(objective.dual.named_parameters()))


def test_without_a_queue_it_contrasts_the_batch():
    objective = stepped(queue_size=0)
    assert objective.queue is None and objective.chance_loss(8) == pytest.approx(math.log(8))
    batch = pair_batches(1, 8)[0]
    with torch.no_grad():
        rows = {key: value.double().numpy() for key, value in objective.embed(**batch).items() if key != "ids"}
        ids = torch.stack([batch["caption_ids"], batch["image_ids"]], 1).tolist()
        expected = oracle.itc(
            rows["image"], rows["text"], rows["image_momentum"], rows["text_momentum"],
            objective.logit_scale.exp().item(), 0.4, [], [], oracle.positives(ids, []),
        )  # fmt: skip
        assert objective(**batch).loss.item() == pytest.approx(expected["loss"], rel=1e-4)


def test_chance_is_the_loss_of_features_that_say_nothing():
    objective = stepped()
    assert objective.chance_loss(8) == pytest.approx(math.log(8 + 11))
    flat = torch.ones(8, 16)
    objective.queue.features.fill_(1 / 4)
    rows = dict.fromkeys(("image", "text", "image_momentum", "text_momentum"), flat)
    assert objective.loss(rows).loss.item() == pytest.approx(objective.chance_loss(8), rel=1e-5)


@pytest.mark.parametrize("direct", [True, False])
def test_the_scale_stays_within_the_official_codes_clamp(direct):
    """Whichever is learnt; the pair's own log scale, which is saved and evaluated, says the same."""
    objective = make_objective("itc", learn_temperature=direct)
    assert objective.dual.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    learnt = objective.temperature if direct else objective.dual.logit_scale
    for value, expected in ((9.0, 1000.0), (-1.0, 2.0)):
        with torch.no_grad():
            learnt.fill_(math.exp(-value) if direct else value)
        objective.after_step(0.5)
        assert objective.dual.logit_scale.exp().item() == pytest.approx(expected)
        assert objective.scale_limits == (2.0, 1000.0)


def test_a_few_steps_learn_the_pairs():
    objective = make_objective("itc", queue_size=24, momentum=0.9).train()
    batch = pair_batches(1, 8, seed=3)[0] | {"caption_ids": torch.arange(8), "image_ids": torch.arange(8)}
    batch["pixel_values"] = torch.randn(8, 3, 32, 32)
    batch["input_ids"][:, :6] = torch.randint(5, 200, (8, 6))
    optimizer = torch.optim.AdamW([value for value in objective.parameters() if value.requires_grad], lr=2e-3)
    for step in range(40):
        loss = objective(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(step / 40)
    with torch.no_grad():
        image, text = (objective.dual.image_features(batch["pixel_values"]), objective.embed(**batch)["text"])
        assert (image.argmax(0) is not None) and (objective.dual.logits(image, text).argmax(1) == torch.arange(8)).all()
    # with every pair three times in the queue, the positives share the target: its entropy is the floor
    assert loss.item() < 0.75 * objective.chance_loss(8)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="has no bias"):
        ITC(make_dual("clip", bias=-1.0))
    for config, message in (
        ({"alpha": 1.4}, "alpha=1.4 is not between"),
        ({"momentum": -0.1}, "momentum=-0.1 is not between"),
        ({"queue_size": -1}, "queue_size=-1 must not be negative"),
        ({"alpha_ramp_epochs": -1.0}, "alpha_ramp_epochs=-1.0"),
        ({"initial_logit_scale": 1.0}, r"must lie in \[2, max_logit_scale=1000.0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            make_objective("itc", **config)
    assert load_objective("itc") is ITC


def test_the_pair_it_leaves_is_a_pair_and_nothing_else(tmp_path):
    objective = stepped()
    objective.dual.save_pretrained(tmp_path)
    from mllm_vision.encoder.dual import DualEncoder

    loaded = DualEncoder.from_pretrained(tmp_path)
    batch = pair_batches(1, 4)[0]
    torch.testing.assert_close(
        loaded.image_features(batch["pixel_values"]), objective.dual.image_features(batch["pixel_values"])
    )
    assert copy.deepcopy(objective).teacher.momentum == 0.8
