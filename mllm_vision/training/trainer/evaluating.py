"""The part of the trainer that evaluates: before, during and after the training."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mllm_vision.evaluation.base import Evaluation, examine, name_of
from mllm_vision.training.checkpoint.resume import ExactResume
from mllm_vision.training.checkpoint.signals import EvaluationCut
from mllm_vision.training.recipe.ending import Failure, attempt, cause_of
from mllm_vision.training.trainer.sharding import gathered

logger = logging.getLogger(__name__)


class Evaluating(ExactResume):
    """`Trainer.evaluate` with evaluators, callables (model, step) -> dict, besides or instead of a data set.

    Results during the training are logged; final ones go into the run's record, with the step and hash of their
    weights.
    """

    evaluators: Sequence[Callable[..., Any]] = ()
    unsharded: Any = None  # the plain model, where a copy of it is sharded
    _clock: tuple[float, int] | None = None
    _before: dict[str, dict[str, Evaluation]]  # evaluator -> baseline -> result

    def measure_before(self, baseline: str, evaluators: Sequence[Callable[..., Any]] | None = None) -> None:
        """Measure the model before the training, as `baseline` of the final evaluation."""
        with self._aside(self.model):
            for evaluator in self.evaluators if evaluators is None else evaluators:
                found = examine(evaluator, self.model, self.state.global_step)
                self._before.setdefault(name_of(evaluator), {})[baseline] = found

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `Trainer.evaluate` where there is a data set, then the evaluators; the metrics of both.

        With `ema_decay` of the averaged weights. An evaluator that fails during the training is logged once and counts
        as missing. A signal ends the training between two evaluators.

        Raises:
            ValueError: the evaluator of `metric_for_best_model` failed or did not return it.
        """
        metrics: dict[str, float] = {}
        averaged = contextlib.nullcontext if self.average is None else self.average.applied
        if eval_dataset is not None or self.eval_dataset is not None:
            with averaged(), torch.random.fork_rng(devices=self._devices()):
                metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is None and self.evaluators:
            try:
                with averaged(), self.plain_model() as model, self._aside(model):
                    found, needed = self._run_evaluators(model, metric_key_prefix)
            except EvaluationCut:
                self.save_and_stop(evaluation_due=True)
            if needed is not None:
                self._stop_with_checkpoint(needed)
            self.log(dict(found))
            if not metrics:
                self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
            metrics = {**metrics, **found}
        wanted = f"eval_{(self.args.metric_for_best_model or '').removeprefix('eval_')}"
        if self.is_in_train and wanted != "eval_" and eval_dataset is None and wanted not in metrics:
            raise ValueError(f"metric_for_best_model={wanted!r} is not among the metrics {', '.join(metrics)}")
        return metrics

    def final_evaluation(
        self, model: Any = None, artifact: str | None = None, evaluators: Sequence[Callable[..., Any]] | None = None
    ) -> dict[str, float]:
        """Measure the saved model, after `Run.save_artifact`; an evaluator may fail.

        Args:
            model: the saved model; by default the trainer's.
            artifact: its name among the run's artifacts.
            evaluators: by default those of the training.

        Returns:
            The logged metrics of the evaluators that did not fail.
        """
        model, step, found = self.model if model is None else model, self._step_of_weights(), {}
        for evaluator in self.evaluators if evaluators is None else evaluators:
            name = name_of(evaluator)
            with self._aside(model):
                if self.run is None:
                    result = examine(evaluator, model, step)
                else:
                    work = (f"evaluation of {name}", examine, evaluator, model, step)
                    result = self.run.after_training(*work, everywhere=True, remedy=self._remedy())
            if result is None:
                continue
            found.update({f"eval_{name}_{key}": value for key, value in result.metrics.items()})
            for baseline, other in self._before.get(name, {}).items():
                result.add_baseline(baseline, other)
            if self.run is not None:
                result.store(self.run.record, name, step=step, **self.run.weights_of(artifact))
        if found and self.run is not None:
            self.run.after_training("log of the evaluation", self._log_final, found)
        elif found:
            self._log_final(found)
        return found

    @contextlib.contextmanager
    def plain_model(self) -> Iterator[Any]:
        """The model with all parameters on every rank, also during sharded training; a collective."""
        if self.unsharded is None or self.unsharded is self.model:
            yield self.model
        else:
            with gathered(self.unsharded, self.model, self.args.device):
                yield self.unsharded

    @contextlib.contextmanager
    def _aside(self, model: Any) -> Iterator[None]:
        """An evaluation context: device and precision of the training, whose random state and clock it leaves alone."""
        began = time.monotonic()
        draws = torch.random.fork_rng(devices=self._devices())
        with draws, torch.no_grad(), self._placed(model), self.accelerator.autocast():
            yield
        if self._clock is not None:  # throughput is that of training
            self._clock = (self._clock[0] + time.monotonic() - began, self._clock[1])

    def _devices(self) -> list[torch.device]:
        return [self.args.device] if self.args.device.type == "cuda" else []

    @contextlib.contextmanager
    def _placed(self, model: Any) -> Iterator[None]:
        """Inside, the model is on the device of the training."""
        parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
        where = next((parameter.device for parameter in parameters), self.args.device)
        away = where.type == "cpu" and self.args.device.type != "cpu"
        if away:
            model.to(self.args.device)
        try:
            yield
        finally:
            if away:
                model.to(where)

    def _run_evaluators(self, model: Any, prefix: str) -> tuple[dict[str, float], tuple[str, Exception] | None]:
        """Metrics of every evaluator, and the failed one that the training needs."""
        found: dict[str, float] = {}
        for evaluator in self.evaluators:
            self.cut_evaluation()
            name, step = name_of(evaluator), self.state.global_step
            if not self.is_in_train:  # called by the user
                result, error = examine(evaluator, model, step), None
            else:
                what = f"evaluation of {name} at step {step}"
                result, error = attempt(what, examine, evaluator, model, step, everywhere=True)
            if error is None:
                found.update({f"{prefix}_{name}_{key}": value for key, value in result.metrics.items()})
            elif (self.args.metric_for_best_model or "").removeprefix("eval_").startswith(f"{name}_"):
                return found, (name, error)
            elif self.run is not None:
                self.run.ending.note(Failure(f"evaluation of {name} while training", error))
            else:
                logger.warning("evaluation of %s failed at step %d: %s", name, step, cause_of(error))
        return found, None

    def _stop_with_checkpoint(self, failed: tuple[str, Exception]) -> None:
        """Save a checkpoint to continue from once the cause is fixed, and raise."""
        name, error = failed
        self._save_checkpoint(self.model, None)
        raise ValueError(
            f"evaluation of {name} failed at step {self.state.global_step} ({cause_of(error)}), and "
            f"metric_for_best_model={self.args.metric_for_best_model} needs it; checkpoint-{self.state.global_step} is "
            "saved: fix the data and continue with --resume, or leave --metric_for_best_model and "
            "--load_best_model_at_end out"
        ) from error

    def _remedy(self) -> str:
        """The remedy for an evaluation that failed after the training."""
        last = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        return "--resume repeats it and trains no step" if last.is_dir() else ""

    def _step_of_weights(self) -> int:
        """The step of the model's weights: the last, or that of the best checkpoint."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        return int(self.state.global_step if best is None else best)

    def _log_final(self, found: Mapping[str, float]) -> None:
        """Log the metrics, unless they were logged at this step."""
        history = self.state.log_history if self.run is None else self.run.record["history"]
        last = [entry for entry in history if entry.get("step") == self.state.global_step]
        if all(any(entry.get(key) == value for entry in last) for key, value in found.items()):
            return
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, dict(found))

    def _check_best_metric(self) -> None:
        """Check `metric_for_best_model` before the training; the stock Trainer does at the first evaluation."""
        wanted = (self.args.metric_for_best_model or "").removeprefix("eval_")
        if not wanted or not self.evaluators or self.eval_dataset is not None or self.args.eval_strategy == "no":
            return
        names = [name_of(evaluator) for evaluator in self.evaluators]
        if not any(wanted.startswith(f"{name}_") for name in names):
            chief = [getattr(evaluator, "primary_metric", "<metric>") for evaluator in self.evaluators]
            known = ", ".join(f"{name}_{metric}" for name, metric in zip(names, chief))
            raise ValueError(f"metric_for_best_model={wanted!r} is not measured by any evaluator; use e.g. {known}")
