"""The step schedule with warm-up, and the cosine of weight decay. Every other schedule is transformers' own."""

from __future__ import annotations

import bisect
import itertools
import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

MILESTONES, GAMMA = (0.6, 0.8), 0.1


def check_step_settings(milestones: Sequence[float] = MILESTONES, gamma: float = GAMMA) -> None:
    """Whether the settings of the step schedule make sense, before anything is loaded.

    Args:
        milestones: rising; below 1 a fraction of the training, else a step.
        gamma: what the rate is multiplied by at each.

    Raises:
        ValueError: not rising, both kinds at once, not positive, or a `gamma` outside (0, 1].
    """
    given = list(milestones) if isinstance(milestones, (list, tuple)) else [milestones]
    if not given or any(not isinstance(entry, (int, float)) or entry <= 0 for entry in given):
        raise ValueError(f"milestones={milestones!r} must be positive: fractions [0.6, 0.8] or steps [120, 160]")
    if any(left >= right for left, right in itertools.pairwise(given)):
        raise ValueError(f"milestones={given} must rise")
    if given[0] < 1 <= given[-1]:
        raise ValueError(f"milestones={given}: give fractions of the training or steps, not both")
    if not isinstance(gamma, (int, float)) or not 0 < gamma <= 1:
        raise ValueError(f"gamma={gamma!r} must lie in (0, 1], e.g. 0.1")


def milestone_steps(milestones: Sequence[float], steps: int) -> list[int]:
    """Milestones as steps of a training of `steps`."""
    return [math.ceil(entry * steps) if entry < 1 else int(entry) for entry in milestones]


def step_factor(step: int, *, warmup_steps: int, milestones: Sequence[int], gamma: float) -> float:
    """The rate at a step over the peak: linear warm-up from 0, then `gamma` to the number of milestones passed.

    He et al., "Momentum Contrast" (2020): x0.1 at epochs 120 and 160 of 200, which are milestones 0.6 and 0.8.
    """
    if step < warmup_steps:
        return step / warmup_steps
    return gamma ** bisect.bisect_right(milestones, step)


def step_schedule(
    optimizer: Any,
    *,
    num_warmup_steps: int,
    num_training_steps: int,
    milestones: Sequence[float] = MILESTONES,
    gamma: float = GAMMA,
) -> Any:
    """The step schedule as torch's `LambdaLR`, whose state a checkpoint holds.

    Args:
        optimizer: its groups keep their ratios.
        num_warmup_steps, num_training_steps: in optimizer steps.
        milestones: rising; below 1 a fraction of the training, else a step.
        gamma: what the rate is multiplied by at each.

    Raises:
        ValueError: a milestone inside the warm-up or after the end.
    """
    from torch.optim.lr_scheduler import LambdaLR

    check_step_settings(milestones, gamma)
    steps = milestone_steps(milestones, num_training_steps)
    if steps[0] <= num_warmup_steps or steps[-1] > num_training_steps:
        raise ValueError(
            f"milestones at steps {steps} must lie after the warm-up ({num_warmup_steps} steps) and within the "
            f"training ({num_training_steps} steps); change lr_scheduler_kwargs or --warmup_steps"
        )
    factor = partial(step_factor, warmup_steps=num_warmup_steps, milestones=steps, gamma=gamma)
    return LambdaLR(optimizer, factor)


def check_cosine_settings(
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    inclusive_warmup: bool = False,
    by_epoch: bool = False,
) -> None:
    """Whether the settings of the exact cosine make sense, before anything is loaded.

    Args:
        min_lr, min_lr_rate: what it ends at, itself or over the peak; one of them, default 0.
        inclusive_warmup: the last step of the warm-up has the peak rate; else the first step after it.
        by_epoch: after the warm-up the rate stands still within an epoch.

    Raises:
        ValueError: both ends, one out of range, or a setting that is no boolean.
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
    `per_epoch` steps an epoch the cosine of a step is that of the first one of its epoch, as `CosineAnnealingLR` that
    steps once an epoch: MoCo, SimSiam, and the benchmarks of lightly.
    """
    if step < warmup:
        return step / max(warmup - inclusive, 1)
    if per_epoch:
        step = max(math.floor(math.floor(step / per_epoch + 1e-9) * per_epoch + 1e-9), warmup)
    return cosine_between(1.0, end, (step - warmup) / max(steps - warmup, 1))


def exact_cosine(
    optimizer: Any,
    *,
    num_warmup_steps: int,
    num_training_steps: int,
    epochs: float | None = None,
    **settings: Any,
) -> Any:
    """The cosine whose ends are those of a method's own code, as torch's `LambdaLR`.

    Args:
        optimizer: its groups keep their ratios.
        num_warmup_steps, num_training_steps: in optimizer steps.
        epochs: of the training, for `by_epoch`; None where it is given in steps.
        **settings: see `check_cosine_settings`.

    Raises:
        ValueError: `by_epoch` in a training that is given in steps, or a setting out of range.
    """
    from torch.optim.lr_scheduler import LambdaLR

    check_cosine_settings(**settings)
    if settings.get("by_epoch") and not epochs:
        raise ValueError("by_epoch needs --num_train_epochs: with --max_steps no epoch has a rate of its own")
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
    """Says so when the training ends before the learning rate reached its peak."""
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

    A function of the step alone: resuming needs no state.

    Args:
        start, end: weight decay at the first step and at the last.
    """

    def __init__(self, start: float, end: float) -> None:
        self.start, self.end = start, end

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        value = cosine_between(self.start, self.end, state.global_step / max(state.max_steps, 1))
        for group in optimizer.param_groups:
            if group.get("decays", group["weight_decay"] > 0):
                group["weight_decay"] = value
