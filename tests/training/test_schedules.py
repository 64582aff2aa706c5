"""Schedules, clipping by parameter, scaling by batch size: values by hand; and the flags that are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers.training_args import OptimizerNames

from mllm_vision.training.optim.clipping import clip_per_module_, clip_per_parameter_
from mllm_vision.training.optim.schedules import (
    WeightDecaySchedule,
    cosine_between,
    exact_cosine,
    step_schedule,
    warn_of_warmup,
)
from mllm_vision.training.recipe.arguments import RecipeArguments
from mllm_vision.training.recipe.parser import parse_recipe, recipe_dict


def rates(steps: int, warmup: int, base: tuple[float, ...] = (1.0, 0.1), **settings) -> list[list[float]]:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in base]
    optimizer = torch.optim.SGD(groups)
    scheduler = step_schedule(optimizer, num_warmup_steps=warmup, num_training_steps=steps, **settings)
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return found


def test_step_schedule_by_hand() -> None:
    expected = [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    found = rates(10, 2)  # warm-up of 2, then a tenth at steps 6 and 8
    torch.testing.assert_close([row[0] for row in found], expected)
    torch.testing.assert_close([row[1] for row in found], [value / 10 for value in expected])
    by_steps = rates(10, 0, milestones=[3], gamma=0.5)
    torch.testing.assert_close([row[0] for row in by_steps], [1.0] * 3 + [0.5] * 7)
    with pytest.raises(ValueError, match=r"milestones at steps \[2, 8\] must lie after the warm-up \(3 steps\)"):
        rates(10, 3, milestones=[2, 8])
    with pytest.raises(ValueError, match=r"within the training \(10 steps\)"):
        rates(10, 0, milestones=[20])


def cosine_rates(steps: int, warmup: int, epochs: float | None = None, **settings) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = exact_cosine(optimizer, num_warmup_steps=warmup, num_training_steps=steps, epochs=epochs, **settings)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_the_exact_cosine_is_that_of_the_codes_it_names() -> None:
    """DINO's `cosine_scheduler` in numpy, and torch's `CosineAnnealingLR` with a step an epoch."""
    warm = np.linspace(0, 0.5, 4)
    rest = 0.01 + 0.5 * (0.5 - 0.01) * (1 + np.cos(np.pi * np.arange(8) / 8))
    assert cosine_rates(12, 4, min_lr=0.01, inclusive_warmup=True) == pytest.approx([*warm, *rest])
    assert cosine_rates(3, 1, inclusive_warmup=True) == pytest.approx([0.0, 0.5, 0.25])  # a warm-up of one step
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    wanted = []
    for _ in range(5):
        wanted += [optimizer.param_groups[0]["lr"]] * 3
        optimizer.step()
        annealing.step()
    assert cosine_rates(15, 0, epochs=5, by_epoch=True) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="--num_train_epochs"):
        cosine_rates(15, 0, by_epoch=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_lr": 0.1, "min_lr_rate": 0.1}, "give one of them"),
        ({"min_lr": -1.0}, "min_lr=-1.0 must not be negative"),
        ({"by_epoch": "yes"}, "by_epoch='yes' must be true or false"),
        ({"warmup": 3}, "unknown setting of exact_cosine 'warmup'"),
    ],
)
def test_settings_of_the_exact_cosine_are_checked_at_once(settings, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        RecipeArguments(output_dir=str(tmp_path), lr_scheduler_type="exact_cosine", lr_scheduler_kwargs=settings)


def test_weight_decay_follows_a_cosine_where_there_is_any() -> None:
    found = [cosine_between(0.04, 0.4, progress) for progress in (0.0, 0.5, 1.0)]
    assert found == pytest.approx([0.04, 0.22, 0.4])
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "decays": decays} for decays in (True, False)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    state = type("State", (), {"global_step": 5, "max_steps": 20})
    WeightDecaySchedule(0.0, 0.4).on_step_begin(None, state, None, optimizer=optimizer)
    expected = 0.4 * (1 - math.cos(math.pi / 4)) / 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [pytest.approx(expected), 0.0]


def test_each_gradient_is_clipped_by_itself() -> None:
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(4)]
    for parameter, gradient in zip(parameters, ([3.0, 4.0], [0.3, 0.4], [0.0, 0.0]), strict=False):
        parameter.grad = torch.tensor(gradient)
    assert clip_per_parameter_(parameters, 1.0).item() == pytest.approx(math.sqrt(25 + 0.25))
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.8]), atol=1e-6, rtol=0)
    assert torch.equal(parameters[1].grad, torch.tensor([0.3, 0.4])) and parameters[2].grad.sum() == 0
    assert parameters[3].grad is None and clip_per_parameter_([parameters[3]], 1.0) == 0
    mixed = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float64, torch.bfloat16)]
    for parameter in mixed:
        parameter.grad = torch.tensor([3.0, 4.0], dtype=parameter.dtype)
    model = nn.ModuleDict({"encoder": nn.Linear(1, 1, bias=False), "head": nn.Linear(1, 1, bias=False)})
    model.register_parameter("mask_token", nn.Parameter(torch.zeros(1)))
    model.encoder.weight.grad, model.mask_token.grad = torch.tensor([[3.0]]), torch.tensor([4.0])
    model.head.weight.grad = torch.tensor([[0.5]])
    assert clip_per_module_(model, 1.0).item() == pytest.approx(math.sqrt(25.25))
    clipped = [model.encoder.weight.grad.item(), model.mask_token.grad.item(), model.head.weight.grad.item()]
    assert clipped == pytest.approx([0.6, 0.8, 0.5], rel=1e-5)
    assert clip_per_parameter_(mixed, 5.0 / 2).item() == pytest.approx(math.sqrt(50))
    for parameter in mixed:
        torch.testing.assert_close(parameter.grad.double(), torch.tensor([1.5, 2.0]).double(), atol=1e-5, rtol=0)


def test_warmup_that_never_ends_is_told(caplog) -> None:
    warn_of_warmup(3, 4)
    assert not caplog.records
    warn_of_warmup(500, 4)
    assert "500 of 4 training steps" in caplog.text


# ---- flags -----------------------------------------------------------------------------------------------------


def flags(folder, *words: str) -> RecipeArguments:
    return parse_recipe(RecipeArguments, argv=["--output_dir", str(folder), "--use_cpu", *words])[0]


def test_flags_reach_the_arguments_and_recipe_yaml_gives_them_back(tmp_path) -> None:
    found = flags(
        tmp_path, "--optim", "lars", "--optim_args", "momentum=0.8,variant=paper", "--lr_scheduler_type", "step",
        "--lr_scheduler_kwargs", '{"milestones": [0.5], "gamma": 0.2}', "--layer_decay", "vision=0.85,text=0.75",
    )  # fmt: skip
    assert found.optim.value == "lars" and found.lr_scheduler_type.value == "step"
    assert found.layer_decay == {"vision": 0.85, "text": 0.75}
    assert found.lr_scheduler_kwargs == {"milestones": [0.5], "gamma": 0.2}
    saved = recipe_dict(found)
    assert saved["optim"] == "lars" and saved["lr_scheduler_type"] == "step" and saved["ema_decay"] is None
    again = RecipeArguments(**{name: saved[name] for name in ("optim", "optim_args", "lr_scheduler_type")} | {
        "output_dir": str(tmp_path), "use_cpu": True, "layer_decay": saved["layer_decay"]})  # fmt: skip
    assert again.optim == found.optim and again.to_dict()["optim"] == "lars"
    assert flags(tmp_path, "--layer_decay", "0.75").layer_decay == 0.75
    assert flags(tmp_path, "--optim", "adamw_torch").optim is OptimizerNames.ADAMW_TORCH


@pytest.mark.parametrize(
    ("rule", "expected"), [("none", 1.0), ("linear", 64 * 2 / 256), ("sqrt", math.sqrt(64 * 2 / 256))]
)
def test_scaling_by_batch_size(tmp_path, rule: str, expected: float) -> None:
    words = ["--per_device_train_batch_size", "64", "--gradient_accumulation_steps", "2", "--lr_scaling", rule]
    words += ["--base_learning_rate", "1.2", "--base_bias_learning_rate", "0.5"]
    found = flags(tmp_path, *words)
    assert found.effective_batch_size == 128 and found.lr_scale == pytest.approx(expected)
    assert found.learning_rate == pytest.approx(1.2 * expected)
    assert found.bias_learning_rate == pytest.approx(0.5 * expected)
    if rule == "sqrt":  # SimCLR's 0.075 sqrt(B) is 1.2 at 256
        assert found.learning_rate == pytest.approx(0.075 * math.sqrt(128))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim", "larss"], "unknown optim 'larss'; the nearest known one is 'lars'"),
        (["--lr_scheduler_type", "steps"], "unknown lr_scheduler_type 'steps'; the nearest known one is 'step'"),
        (["--optim", "lars", "--optim_args", "momentun=0.9"], "the nearest known one is 'momentum'"),
        (["--optim", "lars", "--optim_args", "momentum=big"], "momentum='big' of lars must be a number"),
        (["--optim", "lars", "--optim_args", "momentum=1.5"], "momentum=1.5"),
        (["--optim", "lamb", "--optim_args", "variant=nvidia"], "unknown variant of LAMB"),
        (["--optim", "lars", "--muon_learning_rate", "0.1"], "needs --optim adamw_torch, not lars"),
        (["--layer_decay", "1.5"], "layer_decay is 1.5"),
        (["--layer_decay", "vision=0"], "layer_decay of 'vision' is 0"),
        (["--ema_decay", "1.0"], "ema_decay=1.0 must lie between 0 and 1"),
        (["--weight_decay_end", "-1"], "weight_decay_end=-1.0"),
        (["--bias_learning_rate", "-1"], "bias_learning_rate=-1.0"),
        (["--patch_embedding_lr_scale", "-1"], "patch_embedding_lr_scale=-1.0"),
        (["--lr_scaling", "square"], "expected 'none' or 'linear' or 'sqrt', got 'square'"),
        (["--lr_scaling", "linear", "--base_learning_rate", "1", "--auto_find_batch_size"], "auto_find_batch_size out"),
        (["--lr_scaling", "linear", "--learning_rate", "0.3"], "name it --base_learning_rate 0.3, or leave"),
        (["--learning_rate", "0.3", "--base_learning_rate", "0.1"], "give one of them"),
        (["--learning_rate", "null"], "give --learning_rate, or --base_learning_rate"),
        (["--lr_scaling_batch_size", "0"], "lr_scaling_batch_size=0"),
        (["--gradient_clipping", "per_parameter", "--max_grad_norm", "0"], "max_grad_norm, which is 0"),
        (["--lr_scheduler_type", "step", "--lr_scheduler_kwargs", "milestone=3"], "nearest known one is 'milestones'"),
        (["--lr_scheduler_type", "step", "--lr_scheduler_kwargs", '{"milestones": [0.8, 0.6]}'], "must be increasing"),
        (["--lr_scheduler_type", "step", "--lr_scheduler_kwargs", '{"milestones": [0.5, 30]}'], "not both"),
        (["--lr_scheduler_type", "step", "--lr_scheduler_kwargs", "gamma=2"], "gamma=2"),
        (["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", "min_lr=0.1"], "setting of cosine 'min_lr'"),
        (["--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", "min_lr=0.1"], "constant has no setting 'min_"),
    ],
)
def test_flags_that_are_refused(tmp_path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        flags(tmp_path, *words)
    assert message in str(caught.value)


def test_what_sharded_parameters_make_impossible(tmp_path) -> None:
    for words in (["--optim", "lamb"], ["--gradient_clipping", "per_parameter"], ["--ema_decay", "0.9"]):
        found = flags(tmp_path, *words)
        for sharding in ("FSDP version 1", "DeepSpeed"):
            with pytest.raises(ValueError, match=f"needs whole parameters, and {sharding}"):
                found.check_sharding(sharding)
    found.optim = RecipeArguments(output_dir=str(tmp_path), use_cpu=True, optim="lars").optim
    with pytest.raises(ValueError, match="ema_decay=0.9 needs whole parameters.*train without it"):
        found.check_sharding("FSDP version 2")
    found.ema_decay = None
    found.check_sharding("FSDP version 2")  # norms of DTensors are those of the whole
