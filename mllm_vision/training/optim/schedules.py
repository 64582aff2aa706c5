"""Schedules that transformers lacks: steps with warm-up, a cosine with exact ends, weight decay along a cosine."""

from __future__ import annotations

import bisect
import itertools
import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


def check_step_settings(milestones: Sequence[float] = (0.6, 0.8), gamma: float = 0.1) -> tuple[list[float], float]:
    """Check the settings of the step schedule, before anything is loaded.

    Args:
        milestones: increasing; below 1 a fraction of the training, else a step.
        gamma: multiplies the rate at each.

    Raises:
        ValueError: not increasing, both kinds at once, not positive, or a `gamma` outside (0, 1].
    """
    given: list[Any] = list(milestones) if isinstance(milestones, (list, tuple)) else [milestones]
    if not given or any(not isinstance(entry, (int, float)) or entry <= 0 for entry in given):
        raise ValueError(f"milestones={milestones!r} must be positive: fractions [0.6, 0.8] or steps [120, 160]")
    if any(left >= right for left, right in itertools.pairwise(given)):
        raise ValueError(f"milestones={given} must be increasing")
    if given[0] < 1 <= given[-1]:
        raise ValueError(f"milestones={given}: give fractions of the training or steps, not both")
    if not isinstance(gamma, (int, float)) or not 0 < gamma <= 1:
        raise ValueError(f"gamma={gamma!r} must lie in (0, 1], e.g. 0.1")
    return given, gamma


def step_factor(step: int, *, warmup_steps: int, milestones: Sequence[int], gamma: float) -> float:
    """The rate at a step over the peak: linear warm-up from 0, then `gamma` to the number of milestones passed.

    He et al., "Momentum Contrast" (2020): x0.1 at epochs 120 and 160 of 200, which are milestones 0.6 and 0.8.
    """
    if step < warmup_steps:
        return step / warmup_steps
    return gamma ** bisect.bisect_right(milestones, step)


def step_schedule(optimizer: Any, *, num_warmup_steps: int, num_training_steps: int, **settings: Any) -> LambdaLR:
    """The step schedule.

    Args:
        optimizer: its groups keep their ratios.
        num_warmup_steps: in optimizer steps.
        num_training_steps: likewise.
        **settings: see `check_step_settings`.

    Raises:
        ValueError: a milestone inside the warm-up or after the end, or a setting out of range.
    """
    milestones, gamma = check_step_settings(**settings)
    steps = [math.ceil(entry * num_training_steps) if entry < 1 else int(entry) for entry in milestones]
    if steps[0] <= num_warmup_steps or steps[-1] > num_training_steps:
        raise ValueError(
            f"milestones at steps {steps} must lie after the warm-up ({num_warmup_steps} steps) and within the "
            f"training ({num_training_steps} steps); change lr_scheduler_kwargs or --warmup_steps"
        )
    return LambdaLR(optimizer, partial(step_factor, warmup_steps=num_warmup_steps, milestones=steps, gamma=gamma))


def check_cosine_settings(
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    inclusive_warmup: bool = False,
    by_epoch: bool = False,
) -> None:
    """Check the settings of the exact cosine before anything is loaded.

    Args:
        min_lr: the rate it ends at, default 0.
        min_lr_rate: the same over the peak; one of the two.
        inclusive_warmup: the last step of the warm-up has the peak rate; else the first step after it.
        by_epoch: after the warm-up the rate is constant within an epoch.

    Raises:
        ValueError: both ends, one out of range, or a setting that is not a boolean.
    """
    if min_lr is not None and min_lr_rate is not None:
        raise ValueError(f"min_lr={min_lr} and min_lr_rate={min_lr_rate}: give one of them")
    for name, value in (("min_lr", min_lr), ("min_lr_rate", min_lr_rate)):
        if value is not None and not (isinstance(value, (int, float)) and value >= 0):
            raise ValueError(f"{name}={value!r} must not be negative")
    for name, value in (("inclusive_warmup", inclusive_warmup), ("by_epoch", by_epoch)):
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be true or false")


def cosine_factor(step: int, *, warmup: int, steps: int, end: float, inclusive: bool, per_epoch: float | None) -> float:
    """The rate at a step over the peak: linear warm-up from 0, then a cosine to `end`.

    The warm-up is t / W, and with `inclusive` t / (W - 1), as numpy's `linspace` makes it in DINO and DINOv2. With
    `per_epoch` steps an epoch the cosine of a step is that of the first one of its epoch, as of a `CosineAnnealingLR`
    that steps once an epoch: MoCo, SimSiam, and the benchmarks of lightly.
    """
    if step < warmup:
        return step / max(warmup - inclusive, 1)
    if per_epoch:
        step = max(math.floor(math.floor(step / per_epoch + 1e-9) * per_epoch + 1e-9), warmup)
    return cosine_between(1.0, end, (step - warmup) / max(steps - warmup, 1))


def exact_cosine(
    optimizer: Any, *, num_warmup_steps: int, num_training_steps: int, epochs: float | None = None, **settings: Any
) -> LambdaLR:
    """The cosine whose ends are those of a method's own code.

    Args:
        optimizer: its groups keep their ratios.
        num_warmup_steps: in optimizer steps.
        num_training_steps: likewise.
        epochs: of the training, for `by_epoch`; None where it is given in steps.
        **settings: see `check_cosine_settings`.

    Raises:
        ValueError: `by_epoch` in a training that is given in steps, or a setting out of range.
    """
    check_cosine_settings(**settings)
    if settings.get("by_epoch") and not epochs:
        raise ValueError("by_epoch needs --num_train_epochs; leave --max_steps out")
    peak, least = optimizer.defaults["lr"], settings.get("min_lr")
    end = settings.get("min_lr_rate") or 0.0 if least is None else least / peak if peak else 0.0
    factor = partial(
        cosine_factor,
        warmup=num_warmup_steps,
        steps=num_training_steps,
        end=end,
        inclusive=settings.get("inclusive_warmup", False),
        per_epoch=num_training_steps / epochs if settings.get("by_epoch") and epochs else None,
    )
    return LambdaLR(optimizer, factor)


def warn_of_warmup(warmup_steps: int, steps: int) -> None:
    """Warn when the training ends before the learning rate reaches its peak."""
    if warmup_steps >= steps:
        logger.warning(
            "warmup_steps: %d of %d training steps: the learning rate never reaches its peak; lower --warmup_steps "
            "(below 1 it is a fraction of the training)",
            warmup_steps, steps,
        )  # fmt: skip


def cosine_between(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at 1 along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


class WeightDecaySchedule(TrainerCallback):
    """Weight decay along a cosine, for the groups that decay at all (Caron et al., "Emerging Properties", 2021).

    A function of the step: resuming needs no state.

    Args:
        start: weight decay at the first step.
        end: at the last.
    """

    def __init__(self, start: float, end: float) -> None:
        self.start, self.end = start, end

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        value = cosine_between(self.start, self.end, state.global_step / max(state.max_steps, 1))
        for group in optimizer.param_groups:
            if group.get("decays", group["weight_decay"] > 0):
                group["weight_decay"] = value
