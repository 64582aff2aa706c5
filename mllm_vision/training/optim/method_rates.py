"""Rates that an objective sets itself: other rates for some parameters, constant ones, frozen ones."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from mllm_vision.errors import unknown_name
from mllm_vision.training.optim.optimizers import is_under, plain_name


class MethodRates:
    """An objective's `rates()` by kind.

    Args:
        objective: see `ImageObjective.rates`.

    Attributes:
        factors: parameter-name prefix -> factor on the learning rate.
        constant: prefixes whose rate stays at its peak.
        frozen: prefix -> epochs without a gradient.
        still: prefix -> epochs at a rate of zero, with gradients for the optimizer's moments.

    Raises:
        ValueError: a prefix that matches no parameter, a negative factor, or an unknown value.
    """

    def __init__(self, objective: nn.Module) -> None:
        self.factors: dict[str, float] = {}
        self.constant: list[str] = []
        self.frozen: dict[str, float] = {}
        self.still: dict[str, float] = {}
        names = [plain_name(name) for name, _ in objective.named_parameters()]
        rates: Any = getattr(objective, "rates", dict)
        for prefix, value in rates().items():
            if not any(is_under(name, prefix) for name in names):
                tops = {name.partition(".")[0] for name in names}
                raise ValueError(f"rates of {type(objective).__name__}: {unknown_name('prefix', prefix, tops)}")
            kind, _, epochs = str(value).partition(":")
            if isinstance(value, (int, float)) and value >= 0:
                self.factors[prefix] = float(value)
            elif value == "constant":
                self.constant.append(prefix)
            elif kind in ("frozen", "still") and epochs:
                getattr(self, kind)[prefix] = float(epochs)
            else:
                raise ValueError(
                    f"rates of {type(objective).__name__}: {prefix!r} has {value!r}; use a factor of 0 or more, "
                    "'constant', 'frozen:<epochs>' or 'still:<epochs>'"
                )

    def learning_rates(self, learning_rate: float) -> dict[str, float]:
        """Parameter-name prefix -> learning rate, of those that need a separate group."""
        return {
            **{prefix: factor * learning_rate for prefix, factor in self.factors.items()},
            **dict.fromkeys([*self.constant, *self.still], learning_rate),
        }

    def hold(self, scheduler: Any) -> None:
        """Keep the rate of the `constant` prefixes: no warm-up, no decay (SimSiam's predictor).

        Raises:
            ValueError: a schedule that does not set the rate of each group by a function of the step.
        """
        if not self.constant:
            return
        if not isinstance(scheduler, LambdaLR):
            raise ValueError(
                f"{type(scheduler).__name__} sets one rate for all parameters, and {self.constant[0]!r} has its own; "
                "use --lr_scheduler_type cosine, linear, constant or step"
            )
        for number, group in enumerate(scheduler.optimizer.param_groups):
            if group.get("group_name") in self.constant:
                scheduler.lr_lambdas[number] = lambda step: 1.0
                group["lr"], group["held"] = group["initial_lr"], True
                scheduler._last_lr[number] = group["lr"]


class StillAtFirst(TrainerCallback):
    """Holds the rate of some parameters at zero for the first epochs, while the optimizer's moments are updated.

    Args:
        still: name of a parameter group (the prefix of its own rate) -> epochs.

    Reference:
        Oquab et al., 2023, "DINOv2" (https://arxiv.org/abs/2304.07193): the last layer's schedule in the official code.
    """

    def __init__(self, still: dict[str, float]) -> None:
        self.still = still
        self._kept: list[tuple[dict[str, Any], float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        for group in optimizer.param_groups:
            if (state.epoch or 0.0) < self.still.get(group.get("group_name"), 0.0) - 1e-9:
                self._kept.append((group, group["lr"]))
                group["lr"] = 0.0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for group, rate in self._kept:
            group["lr"] = rate
        self._kept = []


class FrozenAtFirst(TrainerCallback):
    """Removes the gradients of some parameters, after clipping, for the first epochs.

    An optimizer skips a parameter without a gradient, momentum and weight decay included.

    Args:
        objective: whose parameters they are.
        frozen: parameter-name prefix -> epochs.

    Reference:
        Caron et al., 2021, "Emerging Properties in Self-Supervised Vision Transformers", appendix C
        (https://arxiv.org/abs/2104.14294): DINO's last layer, for the first epoch.
    """

    def __init__(self, objective: nn.Module, frozen: dict[str, float]) -> None:
        self.objective, self.frozen = objective, frozen

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        held = [prefix for prefix, epochs in self.frozen.items() if (state.epoch or 0.0) < epochs - 1e-9]
        for name, parameter in self.objective.named_parameters() if held else ():
            if any(is_under(plain_name(name), prefix) for prefix in held):
                parameter.grad = None
