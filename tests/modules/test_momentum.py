"""The momentum teacher: the average by hand, buffers, modes, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mllm_vision.modules.momentum import MomentumTeacher, cosine_momentum


def student() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3, bias=False))
    module[3].weight = nn.Parameter(module[0].weight.detach().T.contiguous())
    return module


def test_it_follows_by_the_average_worked_out_by_hand():
    model = student()
    teacher = MomentumTeacher(model, 0.9)
    mine = {name: value.detach().double() for name, value in model.named_parameters()}
    for _ in range(5):
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value))
        teacher.update(model)
        mine = {name: 0.9 * mine[name] + 0.1 * value.detach().double() for name, value in model.named_parameters()}
    for name, value in teacher.module.named_parameters():
        torch.testing.assert_close(value.double(), mine[name], rtol=1e-5, atol=1e-6)
    teacher.update(model, momentum=0.0)
    assert all(torch.equal(a, b) for a, b in zip(teacher.module.parameters(), model.parameters(), strict=True))


def test_buffers_are_copied_and_evaluation_mode_stays():
    model = student().train()
    owner = nn.ModuleDict({"model": model, "teacher": MomentumTeacher(model, 0.99)}).train()
    teacher = owner["teacher"]
    assert model.training and not any(module.training for module in teacher.modules())
    model(torch.randn(8, 3) + 5)
    assert not torch.equal(model[1].running_mean, teacher.module[1].running_mean)
    teacher.update(model)
    assert torch.equal(model[1].running_mean, teacher.module[1].running_mean)
    assert teacher.module[1].num_batches_tracked == 1
    rows = torch.randn(6, 3)  # row by row: no dropout, no statistics of the batch
    torch.testing.assert_close(teacher.module(rows)[:2], teacher.module(rows[:2]))
    assert teacher.module[1].num_batches_tracked == 1


def test_with_batch_statistics_its_norms_train_with_the_owner_on_what_it_sees():
    model = student().train()
    owner = nn.ModuleDict({"teacher": MomentumTeacher(model, 0.9, batch_statistics=True)})
    teacher, norm = owner["teacher"], owner["teacher"].module[1]
    rows = torch.randn(8, 3) + 2
    seen = teacher.module[0](rows)
    teacher.module(rows)
    torch.testing.assert_close(norm.running_mean, 0.1 * seen.mean(0))  # torch's own momentum of norms
    assert not teacher.module[2].training and not teacher.training  # dropout rests always
    kept = norm.running_mean.clone()
    model(torch.randn(8, 3) - 5)
    teacher.update(model)
    assert torch.equal(norm.running_mean, kept) and norm.num_batches_tracked == 1
    owner.eval()
    teacher.module(rows)
    assert not norm.training and norm.num_batches_tracked == 1
    assert owner.train() is owner and norm.training
    assert not MomentumTeacher(student().eval(), 0.9, batch_statistics=True).module[1].training


def test_the_cosine_of_the_momentum():
    rising = [cosine_momentum(0.996, step / 50) for step in range(51)]
    assert rising[0] == pytest.approx(0.996) and rising[-1] == 1.0 and rising == sorted(rising)
    assert rising[25] == pytest.approx(0.998)
    assert cosine_momentum(0.5, -1.0) == 0.5 and cosine_momentum(0.5, 2.0, end=0.9) == 0.9


def test_it_takes_no_gradient_and_shares_nothing_with_the_student():
    model = student()
    teacher = MomentumTeacher(model, 0.9)
    assert not any(value.requires_grad for value in teacher.parameters())
    kept = copy.deepcopy(teacher.module.state_dict())
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    assert all(torch.equal(value, kept[name]) for name, value in teacher.module.state_dict().items())


def test_tied_weights_stay_tied():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].weight = model[0].weight
    teacher = MomentumTeacher(model, 0.5)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.zero_()
    teacher.update(model)
    assert teacher.module[0].weight is teacher.module[1].weight
    torch.testing.assert_close(teacher.module[0].weight, before / 2)  # once, not twice


def test_a_frozen_part_is_bit_for_bit_the_students():
    model = student()
    model[0].requires_grad_(False)
    teacher = MomentumTeacher(model, 0.995)
    for _ in range(20):
        teacher.update(model)
    assert torch.equal(teacher.module[0].weight, model[0].weight)


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"momentum=1.2 is not between 0 and 1"):
        MomentumTeacher(student(), 1.2)
    with pytest.raises(ValueError, match=r"torch.bfloat16 weights would round its updates of 0.005 away"):
        MomentumTeacher(student().bfloat16(), 0.995)
    with pytest.raises(ValueError, match="not the module that was copied"):
        MomentumTeacher(student(), 0.9).update(nn.Linear(3, 4))
