"""Callbacks around a step: logs, reporters, teachers, bad samples, the run folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partialmethod
from typing import Any

import torch
import torch.distributed as dist
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from mllm_vision.distributed import is_distributed

logger = logging.getLogger(__name__)


class LogLines(ProgressCallback):
    """Logs lines of numbers, with or without the Trainer's progress bar."""

    def __init__(self, bar: bool = True) -> None:
        super().__init__()
        self.bar = bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar:
            super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        numbers = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in logs.items()
            if name not in ("total_flos", "step")
        ]
        line = f"step {state.global_step}/{state.max_steps}: {', '.join(numbers)}"
        self.training_bar.write(line) if self.training_bar is not None else print(line, flush=True)

    @staticmethod
    def take_over(trainer: Any) -> None:
        """Replace the callback with which transformers prints dicts."""
        for kind in (ProgressCallback, PrinterCallback):
            if any(type(callback) is kind for callback in trainer.callback_handler.callbacks):
                trainer.remove_callback(kind)
                trainer.add_callback(LogLines(bar=kind is ProgressCallback))


class AfterStep(TrainerCallback):
    """Calls `objective.after_step(progress)` once per optimizer step, never per micro-batch.

    Progress runs from 0 to 1 over the training. A step skipped by fp16's loss scaling does not count: a queue must not
    keep its infinite embeddings. The attributes `progress`, `epoch` and `epochs_a_step` of an objective are set before
    each step and epoch, as functions of the step: a resumed run continues with the same schedules.
    """

    def __init__(self, objective: Any) -> None:
        self.objective = objective

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if hasattr(self.objective, "epochs_a_step"):
            self.objective.progress = state.global_step / max(state.max_steps, 1)
            self.objective.epoch = float(state.epoch or 0.0)
            self.objective.epochs_a_step = self.objective.epoch / max(state.global_step, 1)

    on_epoch_begin = on_step_begin

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if getattr(optimizer, "step_was_skipped", False):
            return
        if hasattr(self.objective, "epoch"):
            self.objective.epoch = state.epoch
        self.objective.after_step(state.global_step / max(state.max_steps, 1))


class GuardedReporter(TrainerCallback):
    """A reporter of transformers (tensorboard, wandb...) that is dropped with a warning when it fails."""

    def __init__(self, reporter: TrainerCallback) -> None:
        self.reporter, self.failed = reporter, False

    def _call(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.failed:
            return None
        try:
            return getattr(self.reporter, event)(args, state, control, **kwargs)
        except Exception as error:
            self.failed = True
            name = type(self.reporter).__name__.removesuffix("Callback")
            logger.warning("reporting to %s failed in %s (%s); the training continues without it", name, event, error)
            return None


for _event in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
    setattr(GuardedReporter, _event, partialmethod(GuardedReporter._call, _event))


def guard_reporters(handler: Any) -> None:
    """Wrap each reporter of a `CallbackHandler` in a `GuardedReporter`."""
    home = "transformers.integrations"
    handler.callbacks = [
        GuardedReporter(each) if type(each).__module__.startswith(home) else each for each in handler.callbacks
    ]


class BadSampleLimit(TrainerCallback):
    """Raises once too many samples were bad; records their count in the run."""

    def __init__(self, bad_samples: Any, run: Any = None) -> None:
        self.bad_samples = bad_samples
        self.run = run

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bad_samples.check(getattr(args, "max_bad_fraction", 1.0))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # not checked here: rows read ahead were not trained on
        count = int(self.bad_samples.count)
        if count:
            why = ", ".join(f"{number} x {reason}" for reason, number in self.bad_samples.reasons.most_common())
            why += "; such as " + "; ".join(dict.fromkeys(self.bad_samples.examples))
            logger.warning("%d bad samples were skipped (counted in every epoch): %s", count, why)
        if self.run is not None:
            self.run.record["bad_samples"] = {
                "count": count,
                "examples": list(self.bad_samples.examples),
                "reasons": dict(self.bad_samples.reasons),
            }


class MovingSteps(TrainerCallback):
    """Counts the optimizer steps, and for the freeze audit those with a rate above zero (a warm-up starts at 0)."""

    def __init__(self) -> None:
        self.taken = self.moving = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.taken, self.moving = state.global_step, max(0, state.global_step - 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if not getattr(optimizer, "step_was_skipped", False):
            self.taken += 1
            self.moving += any(group["lr"] > 0 for group in optimizer.param_groups)


class RunFolder(TrainerCallback):
    """Removes from `metrics.jsonl` what an interrupted run logged after the checkpoint.

    Nothing is evaluated after the last step unless `metric_for_best_model` is set: `final_evaluation` does, after
    saving.
    """

    def __init__(self, run: Any) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.begin(state.global_step)
        finished = state.global_step >= state.max_steps > 0
        self.run.rewind(state.global_step, evaluations=finished)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and args.metric_for_best_model is None:
            control.should_evaluate = False

    on_epoch_end = on_step_end


class SaveByMinutes(TrainerCallback):
    """Saves a checkpoint once `minutes` have passed since the last one, of any kind.

    All ranks follow the clock of the first: one message per step, over gloo, which does not wait for a GPU.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock, self.last = 60.0 * minutes, clock, clock()
        self._group: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = self.clock()
        if is_distributed() and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = torch.tensor([self.clock() - self.last >= self.seconds], dtype=torch.int32)
        if is_distributed():
            dist.broadcast(due, src=0, group=self._group)
        if due.item():
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = self.clock()
