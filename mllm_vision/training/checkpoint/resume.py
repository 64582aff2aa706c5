"""Resuming exactly: streams that stand where they stood, checkpoints that are whole, another number of processes."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers.trainer
from transformers import Trainer
from transformers.trainer_utils import has_length, seed_worker

from mllm_vision.data.streams.loader import StreamLoader
from mllm_vision.data.streams.streams import StreamDataset
from mllm_vision.distributed import is_distributed
from mllm_vision.training.checkpoint.checkpoints import check_shapes, found_by_first, rotate, seal, unsealed
from mllm_vision.training.checkpoint.continuity import (
    SETTINGS,
    apply_settings,
    check_complete,
    check_data,
    check_settings,
    data_identity,
    settings_of,
)
from mllm_vision.training.checkpoint.signals import (
    AnyRank,
    DueEvaluation,
    EvaluationCut,
    Stopped,
    StopSignals,
    deaf_workers,
)
from mllm_vision.training.recipe.folders import whole_folder

logger = logging.getLogger(__name__)

DATA_STATE = "data_state.json"


class ExactResume(Trainer):
    """The part of the trainer that saves and resumes.

    The stock Trainer resumes map-style data exactly (its order depends on the seed and the epoch alone) and reads a
    stream from its beginning. Here a checkpoint says how far the data was read: for map-style data the epoch and the
    row, for a stream the state of its order (`StreamLoader.state_dict`). Both count rows, not batches of one process,
    so that the same order goes on with another number of processes.

    Raises:
        ValueError: on resuming, the optimizer steps would take another number of rows than before, the stream is
            another one, or the weights are another model's.
    """

    _resumed_from: str | None = None
    _train_loader: Any = None
    run: Any = None
    _data: dict[str, Any] | None = None  # what the rows are, see `data_identity`
    _settings: dict[str, Any] | None = None  # of the optimizer, as the flags ask for them
    _steps_in_epoch: int = 0
    _signals: StopSignals | None = None  # while it trains
    _any_rank: AnyRank | None = None
    _asked: int = -1
    _saved_at: int = -1
    _evaluation_due: bool = False
    _start: tuple[int, int, int] = (0, 0, 0)  # global step, epoch and optimizer step of the epoch this start began at

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._resumed_from = kwargs.get("resume_from_checkpoint")
        self._asked, self._saved_at, self._evaluation_due = -1, -1, False
        self._any_rank = AnyRank(self.args.device)
        try:
            return super()._inner_training_loop(*args, **kwargs)
        except EvaluationCut:  # before the first step: nothing was trained since the checkpoint
            raise Stopped from None

    # ---- data ------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """As `Trainer.get_train_dataloader`; a stream gets a `StreamLoader` that stands where it is resumed."""
        if not isinstance(self.train_dataset, StreamDataset):
            self._train_loader = super().get_train_dataloader()
            return self._train_loader
        args = self.args
        loader = StreamLoader(
            self.train_dataset,
            self._train_batch_size,
            collate_fn=self.data_collator,
            rank=args.process_index,
            world=args.world_size,
            drop_last=args.dataloader_drop_last,
            accumulate=args.gradient_accumulation_steps,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            worker_init_fn=deaf_workers(
                partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index)
            ),
        )
        saved = _read_state(self._resumed_from)
        if self._resumed_from and (saved is None or "stream" not in saved):
            raise ValueError(
                f"{self._resumed_from} was saved without --streaming: its order cannot be gone on with as a stream; "
                "resume with the flags the run was started with"
            )
        if saved is not None:
            loader.load_state_dict(saved["stream"])
        self._train_loader = loader
        return loader

    def _rows_per_step(self) -> int:
        return self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        """As `Trainer._init_training_state`; where in the epoch to go on is counted in rows."""
        found = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial)
        self.state.compute_steps(self.args, max_steps)  # the stock Trainer logs, evaluates and saves as it did before
        saved = _read_state(checkpoint)
        self._data, told = found_by_first(lambda: self._judge_data(saved or {}))
        if told is not None and self.run is not None:
            self.run.note_change(told, self.state.global_step)
        if saved is not None and not self.args.ignore_data_skip:
            found = self._place(saved, *found)
        if saved is not None and saved.get("evaluation_due"):
            self.add_callback(DueEvaluation(self._evaluate_what_is_due))
        if self.state.global_step >= max_steps > 0:
            found = self._finished(max_steps, num_train_epochs, checkpoint)
        accumulated = self.args.gradient_accumulation_steps
        self._steps_in_epoch = num_update_steps_per_epoch
        self._start = (self.state.global_step, found[0], found[1] // accumulated)
        return found

    def _judge_data(self, saved: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        now = data_identity(self.train_dataset)
        return now, check_data(saved.get("data"), now, getattr(self.args, "accept_changed_data", False))

    def _finished(self, max_steps: int, num_train_epochs: int, checkpoint: Any) -> tuple[int, int]:
        """No epoch is left of a run that has all its steps: what follows the training is done (again), and no step."""
        done = self.state.global_step
        if done > max_steps:
            raise ValueError(
                f"{checkpoint} is at step {done}, and this run has {max_steps} in all: it was trained for longer "
                f"than that; give --max_steps {done}, or resume from an earlier checkpoint (--resume_from_checkpoint)"
            )
        logger.warning("the run has all its %d steps: nothing is trained, what is missing after that is done", done)
        self._load_rng_state(checkpoint)
        return num_train_epochs, 0

    def _place(self, saved: dict[str, Any], epoch: int, batches: int) -> tuple[int, int]:
        """Epoch and batches of it that are done, from what a checkpoint says of the data."""
        loader, args = self._train_loader, self.args
        if not has_length(loader):
            return epoch, batches
        before, now = int(saved["rows_per_step"]), self._rows_per_step()
        if before != now:
            share = before / args.world_size
            remedy = (
                f"--per_device_train_batch_size {int(share)} --gradient_accumulation_steps 1 (or any two numbers with "
                "that product)"
                if share == int(share)
                else f"a number of processes that divides {before}"
            )
            raise ValueError(
                f"the checkpoint's optimizer steps took {before} rows, now they would take {now} "
                f"(per_device_train_batch_size={self._train_batch_size} x gradient_accumulation_steps="
                f"{args.gradient_accumulation_steps} x {args.world_size} processes), and epochs and schedule would no "
                f"longer fit; go on with {remedy}"
            )
        if isinstance(loader, StreamLoader):
            epoch, batches = loader.passes_done, loader.batches_done % len(loader)
        elif "rows" in saved:
            epoch, batches = int(saved["epoch"]), int(saved["rows"]) // (self._train_batch_size * args.world_size)
            if batches >= len(loader):  # the last batch of the epoch was smaller than a whole step
                epoch, batches = epoch + 1, 0
        self.state.epoch = epoch + batches / len(loader)
        return epoch, batches

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self.control.should_training_stop:  # as an evaluation decided that was still due
            return None
        with _streams_stand_still():
            return super()._run_epoch(*args, **kwargs)

    def _data_state(self) -> dict[str, Any]:
        """How far the data was read, after this optimizer step."""
        state: dict[str, Any] = {"rows_per_step": self._rows_per_step(), "processes": self.args.world_size}
        state["data"] = self._data
        if isinstance(self._train_loader, StreamLoader):
            return {**state, "stream": self._train_loader.state_dict()}
        if not has_length(self._train_loader):
            return state
        begun, epoch, done = self._start
        passed, step = divmod(done + self.state.global_step - begun, self._steps_in_epoch)
        return {**state, "epoch": epoch + passed, "rows": step * self._rows_per_step()}

    # ---- signals ---------------------------------------------------------------------------------------------

    def _stop_wanted(self, *, now: bool = False) -> bool:
        """Whether a rank was sent a signal; to be asked on every rank at the same place."""
        if self._signals is None or self._any_rank is None:
            return False
        return self._any_rank(self._signals.received is not None, now=now)

    def cut_evaluation(self) -> None:
        """To be called between two parts of an evaluation, on every rank: leaves it where a signal came.

        Raises:
            EvaluationCut: what the training loop catches.
        """
        if self._stop_wanted(now=True):
            raise EvaluationCut

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kw: Any
    ) -> None:
        """As `Trainer._maybe_log_save_evaluate` (of 5.23; called after each step, and once more after each epoch).

        After a signal the checkpoint is saved at once, and the process ends. An evaluation of this step is left for
        the next start: its checkpoint says so.
        """
        first, self._asked = self._asked != self.state.global_step, self.state.global_step
        last = self.state.global_step >= self.state.max_steps
        epoch_ends = first and (last or float(self.state.epoch or 0.0).is_integer())  # called once more for this step
        wanted = not epoch_ends and self._stop_wanted(now=last)
        if wanted and self.control.should_evaluate:
            self.control.should_evaluate, self._evaluation_due = False, True
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kw)
            wanted = wanted or (last and not first and self._stop_wanted(now=True))
        except EvaluationCut:
            wanted = self._evaluation_due = True
        if wanted:
            self._save_and_stop(model, trial)

    def _save_and_stop(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{step}"
        if self._evaluation_due or self._saved_at != step or self.args.save_only_model:
            self.args.save_only_model = False  # or it could not be gone on from
            self._save_checkpoint(model, trial)
        _wait()  # a launcher ends all ranks when one has gone, and the first still seals the checkpoint
        if self.is_world_process_zero():
            logger.warning("stopped by a signal after step %d; %s is saved: go on with --resume", step, folder)
        raise Stopped

    def _evaluate_what_is_due(self) -> None:
        """The evaluation that the run was stopped before, with all that follows from it but the checkpoint itself."""
        metrics = self._evaluate(None, None)
        self._determine_best_metric(metrics=metrics, trial=None)
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = self._resumed_from

    # ---- checkpoints -----------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As `Trainer._load_from_checkpoint`, with an error of its own for weights of another size."""
        if not self.is_fsdp_enabled:
            check_shapes(Path(resume_from_checkpoint), self.accelerator.unwrap_model(model or self.model))
        if self.is_in_train and not self.is_deepspeed_enabled:
            wrote = len(list(Path(resume_from_checkpoint).glob("rng_state_*.pth"))) or 1
            processes = (_read_state(resume_from_checkpoint) or {}).get("processes", wrote)
            accept = getattr(self.args, "accept_missing_state", False)
            check_complete(Path(resume_from_checkpoint), processes, accept)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._settings = None
        found = super()._prepare_for_training(*args, **kwargs)
        if self._settings is None and not self.is_deepspeed_enabled:
            self._settings = settings_of(self.optimizer, self.lr_scheduler, self.model)
        return found

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As `Trainer._load_optimizer_and_scheduler`; rates, weight decay and schedule are those of this start.

        The stock Trainer goes on with the checkpoint's, whatever the flags say.
        """
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        file = Path(checkpoint) / SETTINGS
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        self._settings = settings_of(self.optimizer, self.lr_scheduler, self.model)
        if before is not None:
            check_settings(before, self._settings, checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)
        apply_settings(self.optimizer, self.lr_scheduler, before, self._settings)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As `Trainer._save_checkpoint`, whole or not there, with the state of the data.

        The checkpoint counts only once every process has written its part; only then do older ones go.
        """
        run_folder = Path(self._get_output_dir(trial=trial))
        folder = run_folder / f"checkpoint-{self.state.global_step}"
        saves = self.args.should_save
        limit = self.args.save_total_limit
        with whole_folder(folder, in_place=True) if saves else contextlib.nullcontext():
            if saves:
                unsealed(folder)
            _wait()  # nobody writes into a folder of an earlier run that is just being put aside
            self.args.save_total_limit = None
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            if saves:
                due = {"evaluation_due": True} if self._evaluation_due else {}
                text = json.dumps(self._data_state() | due)
                (folder / DATA_STATE).write_text(text, encoding="utf-8")
                (folder / SETTINGS).write_text(json.dumps(self._settings), encoding="utf-8")
            _wait()
            if saves:
                seal(folder)
        self._saved_at = self.state.global_step
        if saves:
            rotate(run_folder, limit, self.state.best_model_checkpoint, self.state.global_step)


def _read_state(checkpoint: str | None) -> dict[str, Any] | None:
    file = Path(checkpoint or "") / DATA_STATE
    return json.loads(file.read_text(encoding="utf-8")) if checkpoint and file.is_file() else None


def _wait() -> None:
    if is_distributed():
        dist.barrier()


@contextlib.contextmanager
def _streams_stand_still() -> Iterator[None]:
    """A resumed stream already stands behind its first batches, which the Trainer would read once more to skip them."""
    module: Any = transformers.trainer
    original = module.skip_first_batches

    def skip(loader: Any, count: int = 0) -> Any:
        return loader if isinstance(loader, StreamLoader) else original(loader, count)

    module.skip_first_batches = skip
    try:
        yield
    finally:
        module.skip_first_batches = original
