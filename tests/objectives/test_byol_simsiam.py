"""BYOL and SimSiam: losses and gradients against the equations, heads, targets, statistics, what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_encoder import LinearEncoder, layout, make_method, sgd_steps, tiny_encoder, view_batch
from oracles import moco as oracle
from torch import nn

METHODS = ["byol", "simsiam"]


def small(name, **config):
    """The method in float64 around a linear encoder, and a batch of views."""
    torch.manual_seed(4)
    objective = make_method(name, LinearEncoder(12, 6).double(), **config).double().train()
    return objective, torch.randn(7, 2, 3, 2, 2, dtype=torch.float64)


def perceptron(head, rows):
    """An `MLPHead` by hand, in numpy: linear, BatchNorm over these rows, ReLU, ..."""
    for part in head:
        if isinstance(part, nn.Linear):
            rows = rows @ part.weight.detach().numpy().T + (0 if part.bias is None else part.bias.detach().numpy())
        elif isinstance(part, nn.ReLU):
            rows = np.maximum(rows, 0)
        else:
            affine = (part.weight.detach().numpy(), part.bias.detach().numpy()) if part.affine else (1.0, 0.0)
            rows = oracle.batch_norm(rows, *affine)
    return rows


def vectors(encoder, views):
    return [(encoder.backbone(views[:, side].flatten(1))).detach().numpy() for side in (0, 1)]


def test_byols_loss_is_the_papers():
    """Equation 2 both ways, summed; every head sees one view at a time; the target is the slow copy's."""
    objective, views = small("byol")
    sgd_steps(objective, [{"views": views.flip(0)}])  # so that the target is not the student
    output = objective(views=views)
    slow = objective.teacher.module
    predictions = [
        perceptron(objective.predictor, perceptron(objective.head, h)) for h in vectors(objective.encoder, views)
    ]
    targets = [perceptron(slow["head"], h) for h in vectors(slow["encoder"], views)]
    expected = sum(oracle.squared_distance(predictions[side], targets[1 - side]) for side in (0, 1))
    assert output.loss.item() == pytest.approx(expected, rel=1e-9)
    wrong = sum(oracle.squared_distance(predictions[side], targets[side]) for side in (0, 1))
    assert abs(wrong - expected) > 1e-3
    output.loss.backward()
    assert all(value.grad is None for value in objective.teacher.parameters())
    assert all(value.grad is not None for value in objective.parameters() if value.requires_grad)


def test_simsiams_loss_is_the_papers():
    objective, views = small("simsiam")
    z = [perceptron(objective.head, h) for h in vectors(objective.encoder, views)]
    predictions = [perceptron(objective.predictor, rows) for rows in z]
    cosines = [1 - oracle.squared_distance(predictions[side], z[1 - side]) / 2 for side in (0, 1)]
    assert objective(views=views).loss.item() == pytest.approx(-sum(cosines) / 2, rel=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_no_gradient_goes_through_the_targets(name):
    """The gradient is that of a loss whose targets are numbers; with `stop_gradient` off it is another one."""
    objective, views = small(name)
    objective(views=views).loss.backward()
    found = objective.head[0].weight.grad.clone()
    objective.zero_grad()
    z = [objective.head(h) for h in objective.features(objective.encoder, views).unbind(1)]
    # at the start BYOL's slow copy is the student, so that one way of writing serves both
    numbers = [torch.from_numpy(value.detach().numpy().copy()) for value in z]
    cosines = [
        nn.functional.cosine_similarity(objective.predictor(z[side]), numbers[1 - side]).mean() for side in (0, 1)
    ]
    by_hand = 4 - 2 * sum(cosines) if name == "byol" else -sum(cosines) / 2
    by_hand.backward()
    torch.testing.assert_close(found, objective.head[0].weight.grad, rtol=1e-8, atol=1e-10)
    objective.zero_grad()
    objective.stop_gradient = False
    loss = objective(views=views).loss
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert (objective.head[0].weight.grad - found).abs().max() > 1e-3 * found.abs().max()


@pytest.mark.parametrize("name", METHODS)
def test_swapping_the_views_changes_nothing(name):
    objective, views = small(name)
    torch.testing.assert_close(objective(views=views).loss, objective(views=views.flip(1)).loss)


def test_byols_target_has_norm_statistics_of_its_own():
    objective = make_method("byol").train()
    batch = view_batch(6)
    norms = objective.head[1], objective.teacher.module["head"][1]
    sgd_steps(objective, [batch, view_batch(6, seed=1)], rate=0.5)
    assert [int(norm.num_batches_tracked) for norm in norms] == [4, 4]  # two views a step
    assert not torch.equal(norms[0].running_mean, norms[1].running_mean)
    objective.eval()
    assert not norms[1].training
    objective(**batch)
    assert norms[1].num_batches_tracked == 4
    objective.train()
    assert norms[1].training and not objective.teacher.module["encoder"].training


def test_the_heads_are_the_papers():
    byol = make_method("byol", head_hidden=4096, head_out=256)
    assert layout(byol.head) == [(32, 4096, True), "norm", (4096, 256, False)]
    assert layout(byol.predictor) == [(256, 4096, True), "norm", (4096, 256, False)]
    simsiam = make_method("simsiam", head_hidden=2048, head_out=2048, predictor_hidden=512)
    assert layout(simsiam.head) == [
        (32, 2048, False), "norm", (2048, 2048, False), "norm", (2048, 2048, False), "norm without affine",
    ]  # fmt: skip
    assert layout(simsiam.predictor) == [(2048, 512, False), "norm", (512, 2048, True)]
    assert type(byol).Config().head_hidden == 4096 and type(byol).Config().momentum == 0.996
    config = type(simsiam).Config()
    assert (config.head_hidden, config.head_out, config.predictor_hidden) == (2048, 2048, 512)


def test_byols_lars_has_the_rate_outside_of_the_momentum(tmp_path):
    """Its official code multiplies by the rate last: while that falls, the momentum of earlier steps falls with it."""
    from mllm_vision.objectives import load_objective
    from mllm_vision.training.optim.arguments import OptimizerArguments
    from mllm_vision.training.optim.optimizers import optimizer_class

    settings = load_objective("byol").training_defaults
    cls, given = optimizer_class(OptimizerArguments(output_dir=str(tmp_path), use_cpu=True, **settings))
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    optimizer = cls([weight], lr=0.2, **given)
    expected, velocity = weight.detach().clone(), 0.0
    for rate in (0.2, 0.1, 0.05):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.tensor([[0.6, -0.8]], dtype=torch.float64)
        optimizer.step()
        velocity = 0.9 * velocity + 0.001 * expected.norm() * weight.grad  # the gradient's norm is one
        expected = expected - rate * velocity
    torch.testing.assert_close(weight.detach(), expected)


def test_simsiams_predictor_keeps_its_rate():
    assert make_method("simsiam").rates() == {"predictor": "constant"}
    assert make_method("simsiam", fixed_predictor_rate=False).rates() == {}
    without = make_method("simsiam")
    without.predictor = nn.Identity()  # as the collapse is shown: there is nothing to hold then
    assert without.rates() == {}


@pytest.mark.parametrize("name", METHODS)
def test_an_encoder_with_batch_norm_sees_one_view_at_a_time(name):
    objective = make_method(name, tiny_encoder("resnet")).train()
    batch = view_batch(5)
    h = objective.embed(views=batch["views"])["student" if name == "byol" else "h"]
    alone = [objective.encoder(view, tokens=False).pooled for view in batch["views"].unbind(1)]
    torch.testing.assert_close(h, torch.stack(alone, dim=1))
    together = objective.encoder(batch["views"].flatten(0, 1), tokens=False).pooled.unflatten(0, (5, 2))
    assert (h - together).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2", "moco_v3", *METHODS])
def test_the_papers_settings_are_arguments_that_the_trainer_takes(name, tmp_path):
    from mllm_vision.objectives import load_objective
    from mllm_vision.training.optim.arguments import OptimizerArguments

    settings = load_objective(name).training_defaults
    arguments = OptimizerArguments(output_dir=str(tmp_path), use_cpu=True, **settings)
    rows = 8 * arguments.per_device_train_batch_size
    assert arguments.lr_scaling == "linear" and rows > 0
    expected = {"moco_v3": (1.5e-4, 0.1), "byol": (0.2, 1.5e-6), "simsiam": (0.05, 1e-4)}
    assert (arguments.base_learning_rate, arguments.weight_decay) == expected.get(name, (0.03, 1e-4))


def test_what_is_refused():
    for name in METHODS:
        objective = make_method(name)
        with pytest.raises(ValueError, match=rf"{type(objective).__name__} needs views .* V >= 2, got \[3, 1,"):
            objective.embed(view_batch(3)["views"][:, :1])
        with pytest.raises(ValueError, match="head_hidden=0|hidden=0"):
            make_method(name, head_hidden=0)
        with pytest.raises(ValueError, match="this one has 1"):
            objective.before_training(10, 1)
    with pytest.raises(ValueError, match="would change 6 BatchNorm layers|would change [0-9]+ BatchNorm layers"):
        make_method("simsiam", tiny_encoder("resnet")).check_chunks(2)
