"""LARS and LAMB: steps worked out by hand, several steps against scalar arithmetic, and who is left alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from mllm_vision.training.optim.layerwise import LAMB, LARS
from mllm_vision.training.optim.optimizers import parameter_groups


def matrix(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("variant", "trust"), [("simclr", 0.013), ("paper", 0.017), ("barlow_twins", 0.013)])
def test_two_steps_of_lars_by_hand(variant: str, trust: float) -> None:
    # |w| = 5, |g| = 6; with decay 0.5 the update g + 0.5 w has norm sqrt(1.5^2 + 6^2 + 2^2) = 6.5.
    # simclr and barlow_twins: 0.013 * 5 / 6.5 = 0.01; paper: 0.017 * 5 / (6 + 0.5 * 5) = 0.01.
    weight = nn.Parameter(matrix([3, 0], [0, 4]))
    settings = {"momentum": 0.9, "weight_decay": 0.5, "trust_coefficient": trust, "variant": variant}
    optimizer = LARS([weight], lr=2.0, **settings)
    weight.grad = matrix([0, 6], [0, 0])
    optimizer.step()  # 2 * 0.01 * (1.5, 6, 0, 2)
    torch.testing.assert_close(weight.detach(), matrix([2.97, -0.12], [0, 3.96]))
    # A gradient that cancels the decay leaves the momentum alone: 0.9 of the last step where the rate is inside of
    # it, and half of that where the new rate, 1 after 2, multiplies from outside.
    optimizer.param_groups[0]["lr"] = 1.0
    weight.grad = -0.5 * weight.detach()
    optimizer.step()
    inside = variant != "barlow_twins"
    step = matrix([0.027, 0.108], [0, 0.036]) * (1 if inside else 0.5)
    torch.testing.assert_close(weight.detach(), matrix([2.97, -0.12], [0, 3.96]) - step)


@pytest.mark.parametrize(("variant", "share"), [("paper", 1.0), ("bert", 0.5)])
def test_a_step_of_lamb_by_hand(variant: str, share: float) -> None:
    # The first corrected moments are g and g^2, so Adam's direction is the sign of g; without the correction it is
    # 0.1 g / sqrt(0.04 g^2), half of that. With decay 1, w = (1, 5, 3, 7): |w| = sqrt(84).
    weight = nn.Parameter(matrix([1, 5], [3, 7]))
    optimizer = LAMB([weight], lr=0.1, betas=(0.9, 0.96), eps=0.0, weight_decay=1.0, variant=variant)
    weight.grad = matrix([0.3, -2.0], [7.0, 0.01])
    optimizer.step()
    # paper: u = (2, 4, 4, 8), |u| = 10; bert: u = (1.5, 4.5, 3.5, 7.5), |u| = sqrt(91)
    update = matrix([2, 4], [4, 8]) if share == 1 else matrix([1.5, 4.5], [3.5, 7.5])
    length = 10.0 if share == 1 else math.sqrt(91)
    expected = matrix([1, 5], [3, 7]) - 0.1 * math.sqrt(84) / length * update
    torch.testing.assert_close(weight.detach(), expected)


def lamb_by_scalars(weights: list[float], gradients: list[list[float]], rates: list[float]) -> list[float]:
    """Algorithm 2 of You et al. (2020) on a list of numbers that form one layer."""
    first, second, decay = [0.0] * len(weights), [0.0] * len(weights), 0.02
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        update = []
        for i, g in enumerate(gradient):
            first[i] = 0.9 * first[i] + (1 - 0.9) * g
            second[i] = 0.98 * second[i] + (1 - 0.98) * g**2
            m, v = first[i] / (1 - 0.9**t), second[i] / (1 - 0.98**t)
            update.append(m / (v**0.5 + 1e-6) + decay * weights[i])
        ratio = sum(w**2 for w in weights) ** 0.5 / sum(u**2 for u in update) ** 0.5
        weights = [w - rate * ratio * u for w, u in zip(weights, update, strict=True)]
    return weights


def test_lamb_over_several_steps_and_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    gradients = [[torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(4)] for _ in layers]
    rates = [0.1, 0.05, 0.2, 0.01]
    parameters = [nn.Parameter(layer.clone()) for layer in layers]
    optimizer = LAMB(parameters, betas=(0.9, 0.98), weight_decay=0.02)
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        for parameter, given in zip(parameters, gradients, strict=True):
            parameter.grad = given[step]
        optimizer.step()
    for parameter, layer, given in zip(parameters, layers, gradients, strict=True):
        expected = lamb_by_scalars(layer.flatten().tolist(), [g.flatten().tolist() for g in given], rates)
        torch.testing.assert_close(parameter.detach().flatten().tolist(), expected, rtol=1e-12, atol=1e-12)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.position_embedding = nn.Parameter(torch.randn(1, 4, 3))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))


@pytest.mark.parametrize("which", [LARS, LAMB])
def test_what_does_not_decay_is_not_adapted(which: type) -> None:
    """LARS steps there as SGD with momentum, LAMB as Adam; the matrix beside them moves otherwise."""
    torch.manual_seed(0)
    model = Net()
    twin = copy.deepcopy(model)
    optimizer = which(parameter_groups(model, weight_decay=0.1, learning_rate=0.01), lr=0.01)
    parameters = list(twin.parameters())
    same = torch.optim.SGD if which is LARS else torch.optim.Adam
    plain = same(parameters, lr=0.01, **({"momentum": 0.9} if which is LARS else {"eps": 1e-6}))
    for step in range(3):
        for mine, other in zip(model.parameters(), parameters, strict=True):
            mine.grad = torch.randn(mine.shape, generator=torch.Generator().manual_seed(step))
            other.grad = mine.grad.clone()
        optimizer.step()
        plain.step()
    for name in ("linear.bias", "position_embedding", "logit_scale"):
        torch.testing.assert_close(model.get_parameter(name), twin.get_parameter(name), msg=name)
    assert not torch.allclose(model.linear.weight, twin.linear.weight)


@pytest.mark.parametrize("which", [LARS, LAMB])
def test_zero_weights_or_gradients_give_no_nan_and_state_survives_saving(which: type) -> None:
    zero, still, last = (nn.Parameter(tensor) for tensor in (torch.zeros(2, 2), torch.ones(2, 2), torch.ones(3)))
    optimizer = which([zero, still, last], lr=0.1)
    zero.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    optimizer.step()  # the last one has no gradient yet
    torch.testing.assert_close(zero.detach(), torch.full((2, 2), -0.1))  # adapted by 1
    assert torch.equal(still, torch.ones(2, 2)) and torch.equal(last, torch.ones(3))

    twins = [nn.Parameter(parameter.detach().clone()) for parameter in (zero, still, last)]
    other = which(twins, lr=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, twin in zip((zero, still, last), twins, strict=True):
        parameter.grad = torch.full_like(parameter, 0.3)
        twin.grad = parameter.grad.clone()
    optimizer.step()
    other.step()
    for parameter, twin in zip((zero, still, last), twins, strict=True):
        assert torch.equal(parameter, twin) and not torch.equal(parameter, torch.ones_like(parameter))


def test_norms_are_taken_in_fp32_and_closures_run() -> None:
    weight = nn.Parameter(torch.full((300, 300), 1000.0, dtype=torch.float16))  # its norm, 3e5, is no float16
    weight.grad = torch.ones_like(weight)
    assert LARS([weight], lr=1.0).step(lambda: 7.0) == 7.0
    torch.testing.assert_close(weight.detach().float(), torch.full((300, 300), 999.0))  # 1000 - 0.001 * 1000


@pytest.mark.parametrize(
    ("which", "settings", "message"),
    [
        (LARS, {"variant": "simclear"}, "unknown variant of LARS 'simclear'; the nearest known one is 'simclr'"),
        (LARS, {"momentum": 1.0}, "momentum=1.0"),
        (LARS, {"trust_coefficient": 0.0}, "trust_coefficient=0.0"),
        (LAMB, {"variant": "papper"}, "the nearest known one is 'paper'"),
        (LAMB, {"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)"),
        (LAMB, {"lr": -1.0}, "lr=-1.0"),
    ],
)
def test_what_is_refused(which: type, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        which([torch.zeros(1)], **settings)
