"""DINO: algorithm 1 step by step, the centre, the schedules, what stands still, and what a trainer is told."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from linear_encoder import LinearEncoder, make_method, sgd_steps, tiny_encoder, view_batch
from oracles import distillation as oracle
from torch import nn

from mllm_vision.objectives.dino import DINO
from mllm_vision.training.recipe.arguments import RecipeArguments
from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer

SMALL = {"out_dim": 16, "head_hidden": 12, "head_bottleneck": 6}


def crops(rows, local=3, seed=0):
    """A batch with global and local crops."""
    batch = view_batch(rows, seed)
    return batch | {"local_views": batch["views"][:, :1, :, :16, :16].repeat(1, local, 1, 1, 1)}


class NoHead(nn.Identity):
    """Logits that are the encoder's vector."""

    out_features = 5


class PlainDino(DINO):
    """No head, and every step an epoch."""

    def build_head(self, width):
        return NoHead()

    def after_step(self, progress):
        super().after_step(progress)
        self.epoch += 1.0


def test_steps_are_those_of_algorithm_one():
    """Losses of six steps, and weights, teacher and centre after them; momentum and temperature rise meanwhile."""
    torch.manual_seed(0)
    encoder = LinearEncoder(12, 5).double()
    config = DINO.Config(momentum=0.7, centre_momentum=0.6, student_temperature=0.4, teacher_temperature_start=0.2)
    config.teacher_temperature, config.teacher_temperature_warmup_epochs = 0.3, 4.0
    objective = PlainDino(encoder, config).double().train()
    paper = oracle.LinearDino(
        encoder.backbone.weight.detach().numpy(),
        centre_momentum=0.6, momentum=0.7, student_temperature=0.4, teacher_temperature=0.2, rate=0.5,
    )  # fmt: skip
    batches = [{"views": torch.randn(4, 2, 3, 2, 2, dtype=torch.float64)} for _ in range(6)]
    expected = []
    for step, batch in enumerate(batches):
        paper.cold = [0.2, 0.7 / 3, 0.8 / 3, 0.3, 0.3, 0.3][step]
        paper.momentum = 1 - 0.3 * (math.cos(math.pi * step / 6) + 1) / 2
        expected.append(paper.step(*(batch["views"][:, side].flatten(1).numpy() for side in (0, 1))))
    assert sgd_steps(objective, batches, rate=0.5) == pytest.approx(expected, rel=1e-9)
    for ours, theirs in (
        (encoder.backbone.weight, paper.student),
        (objective.teacher.module["encoder"].backbone.weight, paper.teacher),
        (objective.centring.centre, paper.centre),
    ):
        np.testing.assert_allclose(ours.detach(), theirs, rtol=1e-8, atol=1e-11)


def test_the_teacher_follows_along_a_cosine():
    objective = make_method("dino", **SMALL)
    assert [round(objective.momentum_at(share), 6) for share in (0.0, 0.5, 1.0)] == [0.996, 0.998, 1.0]
    assert make_method("dino", **SMALL, momentum_rises=False).momentum_at(0.5) == 0.996
    before = objective.teacher.module["head"].last_layer.weight.clone()
    nn.init.zeros_(objective.head.last_layer.weight)
    objective.progress = 0.5  # the step that ends is the one in the middle
    objective.after_step(0.6)
    torch.testing.assert_close(objective.teacher.module["head"].last_layer.weight, 0.998 * before)
    objective.after_step(0.7)  # a loop that tells no progress: that of the last step
    follows = 0.998 * objective.momentum_at(0.6)
    torch.testing.assert_close(objective.teacher.module["head"].last_layer.weight, follows * before)


def test_the_centre_moves_after_the_step_and_not_before():
    objective = make_method("dino", **SMALL).train()
    batch = crops(4)
    for _ in range(2):  # a second look at the batch moves nothing more
        objective(**batch)
    assert not objective.centring.centre.any()
    with torch.no_grad():
        mean = objective.teacher.module["head"](objective.embed(**objective.select_columns(batch))["teacher"]).mean(
            (0, 1)
        )
    objective.after_step(0.1)
    torch.testing.assert_close(objective.centring.centre, 0.1 * mean)
    objective.eval()(**batch)
    objective.after_step(0.2)
    torch.testing.assert_close(objective.centring.centre, 0.1 * mean)
    assert "centring.centre" in objective.state_dict()


def test_the_teachers_temperature_warms_up():
    objective = make_method("dino", **SMALL)
    found = []
    for epoch in (0.0, 0.9, 1.0, 15.5, 29.0, 30.0, 80.0):
        objective.epoch = epoch
        found.append(objective.teacher_temperature)
    official = np.linspace(0.04, 0.07, 30)  # the code's, an entry an epoch
    assert found == pytest.approx([*official[[0, 0, 1, 15, 29]], 0.07, 0.07])
    short = make_method("dino", **SMALL, teacher_temperature_warmup_epochs=0.5)  # less than an epoch: with every step
    short.epochs_a_step = 0.125
    found = []
    for epoch in (0.0, 0.125, 0.25, 0.375, 0.5, 2.0):
        short.epoch = epoch
        found.append(short.teacher_temperature)
    assert found == pytest.approx([*np.linspace(0.04, 0.07, 4), 0.07, 0.07])
    at_once = make_method("dino", **SMALL, teacher_temperature_warmup_epochs=0)
    assert at_once.teacher_temperature == 0.07


def test_only_the_student_sees_the_local_crops():
    objective = make_method("dino", **SMALL).train()
    batch = crops(3)
    embeddings = objective.embed(**objective.select_columns(batch))
    assert embeddings["student"].shape == (3, 5, 32) and embeddings["teacher"].shape == (3, 2, 32)
    assert embeddings["student"].requires_grad and not embeddings["teacher"].requires_grad
    torch.testing.assert_close(embeddings["student"][:, :2], embeddings["teacher"])  # one weight at the start
    without = objective.embed(views=batch["views"])
    torch.testing.assert_close(without["student"], embeddings["student"][:, :2])
    objective.replaying = True
    assert set(objective.embed(views=batch["views"])) == {"student"}


def test_a_collapse_shows_in_the_metrics():
    objective = make_method("dino", **SMALL, teacher_temperature_warmup_epochs=0).train()
    uniform = objective.loss({"student": torch.zeros(4, 2, 32), "teacher": torch.zeros(4, 2, 32)}).metrics
    one_for_all = torch.randn(1, 1, 32)
    same = objective.loss({"student": one_for_all.expand(4, 2, 32), "teacher": one_for_all.expand(4, 2, 32)}).metrics
    for metrics in (uniform, same):
        # every image gets the same answer: how sure it is and how evenly the prototypes are used are one number
        assert metrics["teacher_entropy"].item() == pytest.approx(metrics["prototype_entropy"].item(), abs=1e-4)
    assert objective.chance_loss(4) == pytest.approx(math.log(16))


def test_small_data_get_fewer_prototypes():
    def prototypes(rows, **config):
        objective = make_method("dino", head_hidden=8, head_bottleneck=4, **config)
        objective.before_training(rows, 32)
        sizes = {len(objective.head.last_layer.weight), len(objective.teacher.module["head"].last_layer.weight)}
        assert sizes == {len(objective.centring.centre)}
        torch.testing.assert_close(objective.teacher.module["head"].state_dict(), objective.head.state_dict())
        return sizes.pop()

    assert [prototypes(19_999), prototypes(20_000), prototypes(None)] == [1024, 65536, 65536]
    assert prototypes(500, out_dim=40) == 40


class _Rows(torch.utils.data.Dataset):
    """So many rows of views as the pipeline hands them over."""

    def __init__(self, rows, local=1):
        self.columns = crops(rows, local) | {"index": torch.arange(rows)}

    def __len__(self):
        return len(self.columns["index"])

    def __getitem__(self, row):
        return {name: column[row] for name, column in self.columns.items()}


def test_a_training_follows_the_papers_settings(tmp_path):
    """Two epochs with the method's own defaults: frozen prototypes, rising weight decay, clipping of each gradient."""
    from transformers import TrainerCallback

    objective = make_method("dino", **SMALL, student_temperature=0.001)  # steep, so that gradients need clipping
    first = objective.head.last_layer.weight.detach().clone()
    seen = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            norms = [value.grad.norm().item() for value in objective.parameters() if value.grad is not None]
            seen.append(
                {"largest": max(norms), "decay": max(group["weight_decay"] for group in optimizer.param_groups)}
            )

        def on_step_end(self, args, state, control, **kwargs):
            seen[-1]["still"] = torch.equal(objective.head.last_layer.weight, first)

    arguments = RecipeArguments(
        output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", **DINO.training_defaults,
    )  # fmt: skip
    ObjectiveTrainer(model=objective, args=arguments, train_dataset=_Rows(16), callbacks=[Watch()]).train()
    assert [step["still"] for step in seen] == [True] * 4 + [False] * 4  # four steps an epoch
    assert max(step["largest"] for step in seen) == pytest.approx(3.0, rel=1e-4)
    decays = [step["decay"] for step in seen]
    assert decays[0] == pytest.approx(0.04, abs=0.02) and decays[-1] > 0.35 and decays == sorted(decays)
    assert arguments.lr_scale == 4 / 256 and arguments.learning_rate == 5e-4 * 4 / 256


def test_what_is_refused():
    for name, value in (("student_temperature", 0), ("teacher_temperature_warmup_epochs", -1), ("centre_momentum", 1)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            make_method("dino", **SMALL, **{name: value})
    with pytest.raises(ValueError, match="centring='mean' must be one of 'centre', 'sinkhorn', 'none'"):
        make_method("dino", **SMALL, centring="mean")
    with pytest.raises(ValueError, match="V >= 2"):
        make_method("dino", **SMALL)(views=torch.randn(2, 1, 3, 32, 32))


def test_a_resnet_with_batch_norm_in_its_head_trains():
    objective = make_method("dino", tiny_encoder("resnet"), **SMALL, head_batch_norm=True).train()
    sgd_steps(objective, [crops(4)])
    assert all(value.grad is not None for value in objective.parameters() if value.requires_grad)
