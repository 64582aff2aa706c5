"""Barlow Twins and VICReg as objectives: projectors, losses behind them, branches that differ, and collapse."""

from __future__ import annotations

import pytest
import tiny
import torch
from oracles import redundancy as oracle
from torch import nn
from views_for_tests import make_method, view_batch

from mllm_vision.modules.batch_norm import GlobalBatchNorm1d
from mllm_vision.objectives.barlow_twins import BarlowTwins
from mllm_vision.objectives.vicreg import VICReg

HEAD = {"head_hidden": 24, "head_out": 16}


def projections(objective, views):
    """Both branches' projections by the modules of `head`, one after the other, as float64 arrays."""
    heads = (objective.head, getattr(objective, "second_head", None) or objective.head)
    encoders = (objective.encoder, getattr(objective, "second_encoder", None) or objective.encoder)
    found = []
    for head, encoder, view in zip(heads, encoders, views.unbind(1), strict=True):
        rows = encoder(view).pooled
        for module in head:
            rows = module(rows)
        found.append(rows.detach().double().numpy())
    return found


@pytest.mark.parametrize("lambd", [0.0051, 0.5])
def test_barlow_twins_is_the_papers_loss_of_its_projections(lambd):
    objective = make_method(BarlowTwins, lambd=lambd, **HEAD)
    views = view_batch()
    expected = oracle.barlow_twins(*projections(objective, views), lambd, 1e-5)
    assert objective(views=views).loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (3.0, 2.0, 10.0)])
def test_vicreg_is_the_papers_loss_of_its_projections(weights):
    names = dict(zip(("invariance", "variance", "covariance"), weights, strict=True))
    objective = make_method(VICReg, **names, **HEAD)
    views = view_batch()
    output = objective(views=views)
    terms = oracle.vicreg(*projections(objective, views), 1e-4)
    assert output.loss.item() == pytest.approx(sum(w * t for w, t in zip(weights, terms, strict=True)), rel=1e-4)
    told = [output.metrics[name].item() for name in names]
    assert told == pytest.approx(list(terms), rel=1e-4)


@pytest.mark.parametrize("method", [BarlowTwins, VICReg])
def test_the_projector_is_the_official_one(method):
    """Three linear layers of 8192 by default, BatchNorm and ReLU between them, no norm and no bias at the end."""
    config = method.Config()
    assert (config.head_hidden, config.head_out, config.head_layers) == (8192, 8192, 3)
    head = make_method(method, **HEAD).head
    kinds = [type(module) for module in head]
    assert kinds == [nn.Linear, GlobalBatchNorm1d, nn.ReLU] * 2 + [nn.Linear]
    assert [tuple(module.weight.shape) for module in head if isinstance(module, nn.Linear)] == [
        (24, 32), (24, 24), (16, 24),
    ]  # fmt: skip
    assert all(module.bias is None for module in head if isinstance(module, nn.Linear))
    assert all(module.affine for module in head if isinstance(module, GlobalBatchNorm1d))


@pytest.mark.parametrize("method", [BarlowTwins, VICReg])
def test_each_view_has_its_own_batch_statistics(method):
    """A shift and a gain of one view's features alone change nothing behind the BatchNorm."""
    objective = make_method(method, **HEAD)
    h = {name: value.detach() for name, value in objective.embed(view_batch()).items()}
    moved = {"h": torch.stack([h["h"][:, 0], 3 * h["h"][:, 1] + 1], 1)} if "h" in h else {**h, "h2": 3 * h["h2"] + 1}
    assert objective.loss(moved).loss.item() == pytest.approx(objective.loss(h).loss.item(), rel=1e-2)


@pytest.mark.parametrize(("method", "chance"), [(BarlowTwins, 16.0), (VICReg, 24.75)])
def test_collapsed_embeddings_cost_what_chance_says(method, chance):
    objective = make_method(method, **HEAD)
    h = torch.ones(8, 2, 32)
    loss = objective.loss({"h": h, "h1": h[:, 0], "h2": h[:, 1]}).loss.item()
    assert loss == pytest.approx(chance, rel=1e-5) == objective.chance_loss(8)


def train(objective, steps=30, lr=0.05):
    optimizer = torch.optim.SGD([value for value in objective.parameters() if value.requires_grad], lr=lr, momentum=0.9)
    for step in range(steps):
        output = objective(views=view_batch(32, seed=step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    return output


def test_vicreg_shrinks_without_its_variance_term():
    start = make_method(VICReg, **HEAD)(views=view_batch(32)).metrics
    whole = train(make_method(VICReg, **HEAD), lr=0.002).metrics
    without = train(make_method(VICReg, variance=0.0, covariance=0.0, **HEAD), lr=0.1).metrics
    assert without["variance"] > start["variance"] + 0.1  # towards 1, where no dimension varies
    assert without["invariance"] < 0.02 * start["invariance"]
    assert whole["variance"] < 0.5 * start["variance"]


def test_branches_may_be_different_networks():
    objective = make_method(
        VICReg, second_encoder="resnet", second_encoder_overrides={
            "embedding_size": 8, "hidden_sizes": [8, 24], "depths": [1, 1], "layer_type": "basic",
        }, **HEAD,
    )  # fmt: skip
    views = view_batch()
    h = objective.embed(views)
    assert h["h1"].shape == (6, 32) and h["h2"].shape == (6, 24)
    assert objective.second_head is not objective.head
    output = objective(views=views)
    expected = oracle.vicreg(*projections(objective, views), 1e-4)
    assert output.loss.item() == pytest.approx(25 * expected[0] + 25 * expected[1] + expected[2], rel=1e-4)
    output.loss.backward()
    for part in (objective.encoder, objective.second_encoder, objective.head, objective.second_head):
        assert all(value.grad is not None for value in part.parameters() if value.requires_grad)
    assert type(objective.encoder.backbone).__name__ == "ViTModel"  # the artifact is the first
    with pytest.raises(ValueError, match="BatchNorm layers of the encoder"):
        objective.check_chunks(2)
    with pytest.raises(ValueError, match=r"V >= 2, got \[6, 1,"):
        objective.embed(views[:, :1])


def test_a_second_encoder_may_be_a_checkpoint(tmp_path):
    make_method(VICReg, "clip", **HEAD).encoder.save_pretrained(tmp_path)
    objective = make_method(VICReg, second_encoder=str(tmp_path), **HEAD)
    assert objective.second_encoder.config.model_type == "clip_vision_model"


def test_expanders_apart_for_one_encoder():
    objective = make_method(VICReg, shared_expander=False, **HEAD)
    assert objective.second_encoder is None
    views = view_batch()
    terms = oracle.vicreg(*projections(objective, views), 1e-4)
    assert objective(views=views).metrics["invariance"].item() == pytest.approx(terms[0], rel=1e-4)
    assert make_method(VICReg, **HEAD).second_head is None


def test_an_encoder_with_batchnorm_sees_one_view_at_a_time():
    objective = make_method(BarlowTwins, "resnet", **HEAD)
    views = view_batch(8)
    h = objective.embed(views)["h"]
    expected = torch.stack([objective.encoder(view).pooled for view in views.unbind(1)], 1)
    torch.testing.assert_close(h, expected)


@pytest.mark.parametrize("method", [BarlowTwins, VICReg])
def test_training_defaults_are_flags(method):
    from mllm_vision.training.recipe.arguments import RecipeArguments

    given = RecipeArguments(output_dir="unused", **method.training_defaults)
    assert given.base_learning_rate == 0.2 and given.lr_scaling == "linear" and given.weight_decay == 1e-6
    assert given.base_bias_learning_rate == (0.0048 if method is BarlowTwins else None)


def test_what_is_refused():
    with pytest.raises(ValueError, match="lambd=-1"):
        make_method(BarlowTwins, lambd=-1, **HEAD)
    with pytest.raises(ValueError, match="variance=-2: no weight|variance=-2, covariance"):
        make_method(VICReg, variance=-2, **HEAD)
    with pytest.raises(ValueError, match="second_encoder_overrides without second_encoder"):
        make_method(VICReg, second_encoder_overrides=tiny.SIZES, **HEAD)
    with pytest.raises(FileNotFoundError, match="resnett"):
        make_method(VICReg, second_encoder="resnett", **HEAD)
    for method in (BarlowTwins, VICReg):
        with pytest.raises(ValueError, match="--per_device_train_batch_size 2"):
            make_method(method, **HEAD).before_training(10, 1)
        with pytest.raises(ValueError, match=r"V >= 2|views"):
            make_method(method, **HEAD)(views=view_batch(views=1))
