"""What happens around a step: teachers follow, bad samples are counted, the run folder keeps up."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class AfterStep(TrainerCallback):
    """Calls `objective.after_step(progress)` once per optimizer step, never per micro-batch.

    Progress runs from 0 to 1 over the whole training.
    """

    def __init__(self, objective: Any) -> None:
        self.objective = objective

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.objective.after_step(state.global_step / max(state.max_steps, 1))


class BadSampleLimit(TrainerCallback):
    """Ends the training with a clear error once too many samples were bad; puts the count into the run."""

    def __init__(self, bad_samples: Any, run: Any = None) -> None:
        self.bad_samples = bad_samples
        self.run = run

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bad_samples.check(getattr(args, "max_bad_fraction", 1.0))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bad_samples.check(getattr(args, "max_bad_fraction", 1.0))
        count = int(self.bad_samples.count)
        if count:
            logger.warning("%d bad samples were skipped", count)
        if self.run is not None:
            self.run.record["bad_samples"] = {"count": count, "examples": list(self.bad_samples.examples)}


class RunFolder(TrainerCallback):
    """Keeps `metrics.jsonl` in step with the training: what an interrupted run logged after the checkpoint goes."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.rewind(state.global_step)
