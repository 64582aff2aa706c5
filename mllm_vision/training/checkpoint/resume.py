"""Exact resume: whole checkpoints, the position in the data, signals."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import has_length, seed_worker

from mllm_vision.data.streams.loader import StreamLoader
from mllm_vision.data.streams.streams import StreamDataset
from mllm_vision.training.checkpoint.checkpoints import (
    STATE_FILE,
    barrier,
    check_complete,
    check_shapes,
    found_by_first,
    last_checkpoint,
    rotate,
    write_manifest,
)
from mllm_vision.training.checkpoint.continuity import (
    apply_settings,
    check_data,
    check_settings,
    data_identity,
    settings_of,
)
from mllm_vision.training.checkpoint.signals import (
    AnyRank,
    EvaluationCut,
    StopAfterStep,
    Stopped,
    StopSignals,
    ignoring_signals,
)
from mllm_vision.training.recipe.folders import whole_folder

logger = logging.getLogger(__name__)

DATA_STATE = "data_state.json"  # in a checkpoint: how far the data was read
SETTINGS = "settings.json"  # in a checkpoint: the settings of the optimizer


class ExactResume(Trainer):
    """The part of the trainer that saves and resumes.

    The stock Trainer resumes map-style data exactly and reads a stream from its beginning. Here a checkpoint also
    contains the position in the data: for map-style data the epoch and the row, for a stream the state of its order
    (`StreamLoader.state_dict`). Both count rows: the order continues with another number of processes.

    Raises:
        ValueError: on resuming, an optimizer step has another number of rows, the stream differs, or the checkpoint
            does not fit the model or the optimizer.
    """

    args: Any  # RecipeArguments, or plain TrainingArguments
    model: Any
    optimizer: Any
    run: Any = None
    average: Any = None  # a WeightAverage
    evaluation_due: bool = False  # the next start evaluates this step
    _resumed_from: str | None = None
    _train_loader: Any = None
    _data: dict[str, Any] | None = None  # see `data_identity`
    _settings: dict[str, Any] | None = None  # of the optimizer, as the flags ask for them
    _steps_in_epoch: int = 0
    _signals: StopSignals | None = None  # while it trains
    _any_rank: AnyRank | None = None
    _writing: Path | None = None  # the temporary folder of a checkpoint
    saved_at: int = -1  # the step of the newest checkpoint
    _start: tuple[int, int, int] = (0, 0, 0)  # global step, epoch and optimizer step of the epoch this start began at

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_Continue(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, resuming as the arguments say; SIGTERM and SIGUSR1 save a checkpoint and end it."""
        checkpoint: Any = resume_from_checkpoint or None
        if checkpoint in (None, True) and hasattr(self.args, "checkpoint_to_resume"):
            self.args.resume = self.args.resume or checkpoint is True
            checkpoint = self.args.checkpoint_to_resume()
        elif checkpoint is True:
            checkpoint = found_by_first(lambda: last_checkpoint(Path(str(self.args.output_dir))))
        if checkpoint:
            logger.info("resuming from %s", checkpoint)
            self._check_checkpoint(Path(checkpoint))
        self._resumed_from, self.saved_at, self.evaluation_due = checkpoint, -1, False
        self._any_rank = AnyRank(self.args.device)
        if self.average is not None:  # after an objective's after_step
            self.remove_callback(self.average)
            self.add_callback(self.average)
        stop = StopAfterStep(self)
        self.add_callback(stop)
        announce = "the step is finished and a checkpoint saved" if self.is_world_process_zero() else ""
        try:
            with StopSignals(announce) as self._signals:
                return super().train(checkpoint, *args, **kwargs)
        finally:
            self._signals = None
            self.remove_callback(stop)

    def _check_checkpoint(self, checkpoint: Path) -> None:
        """Check that the checkpoint fits the model and contains all that a resume needs."""
        if not self.is_fsdp_enabled:
            check_shapes(checkpoint, self.accelerator.unwrap_model(self.model))
        if not self.is_deepspeed_enabled:
            wrote = len(list(checkpoint.glob("rng_state_*.pth"))) or 1
            processes = (_read(checkpoint, DATA_STATE) or {}).get("processes", wrote)
            check_complete(checkpoint, processes, getattr(self.args, "accept_missing_state", False))

    # ---- data ------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """As `Trainer.get_train_dataloader`; a stream gets a `StreamLoader` at its resumed position."""
        if not isinstance(self.train_dataset, StreamDataset):
            self._train_loader = super().get_train_dataloader()
            return self._train_loader
        args = self.args
        init = partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index)
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
            worker_init_fn=ignoring_signals(init),
        )
        saved = _read(self._resumed_from, DATA_STATE)
        if self._resumed_from and (saved is None or "stream" not in saved):
            raise ValueError(
                f"{self._resumed_from} was saved without --streaming and cannot be continued as a stream; "
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
        """As `Trainer._init_training_state` (5.23); the position in the epoch is counted in rows."""
        with self._resolved_steps(max_steps):
            found = super()._init_training_state(
                max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
            )
        self.state.compute_steps(self.args, max_steps)  # the stock Trainer keeps the old intervals
        saved = _read(checkpoint, DATA_STATE)
        self._data, changed = found_by_first(lambda: self._check_data(saved or {}))
        if changed is not None and self.run is not None:
            self.run.note_change(changed, self.state.global_step)
        if saved is not None and not self.args.ignore_data_skip:
            found = self._place(saved, *found)
        self.evaluation_due = bool(saved and saved.get("evaluation_due"))
        if self.state.global_step >= max_steps > 0:
            found = self._finished(max_steps, num_train_epochs, checkpoint)
        self._steps_in_epoch = num_update_steps_per_epoch
        self._start = (self.state.global_step, found[0], found[1] // self.args.gradient_accumulation_steps)
        return found

    @contextlib.contextmanager
    def _resolved_steps(self, max_steps: int) -> Iterator[None]:
        """Ratios as steps: the stock Trainer would warn that 0.2 differs from the 12 of the checkpoint."""
        resolved = TrainerState()
        resolved.compute_steps(self.args, max_steps)
        given = {name: getattr(self.args, name) for name in ("logging_steps", "eval_steps", "save_steps")}
        given = {name: value for name, value in given.items() if value is not None}
        for name in given:
            setattr(self.args, name, getattr(resolved, name))
        try:
            yield
        finally:
            for name, value in given.items():
                setattr(self.args, name, value)

    def _check_data(self, saved: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        now = data_identity(self.train_dataset)
        return now, check_data(saved.get("data"), now, getattr(self.args, "accept_changed_data", False))

    def _finished(self, max_steps: int, num_train_epochs: int, checkpoint: Any) -> tuple[int, int]:
        """The position of a run with all its steps: nothing is trained, only the steps after the training run."""
        done = self.state.global_step
        if done > max_steps:
            raise ValueError(
                f"{checkpoint} is at step {done}, beyond the {max_steps} steps of this run; give "
                f"--max_steps {done}, or resume from an earlier checkpoint (--resume_from_checkpoint)"
            )
        logger.warning(
            "the run has all its %d steps: nothing is trained, the steps after the training are repeated", done
        )
        self._load_rng_state(checkpoint)
        return num_train_epochs, 0

    def _place(self, saved: dict[str, Any], epoch: int, batches: int) -> tuple[int, int]:
        """Finished epochs, and finished batches of the next one, from the data state of a checkpoint."""
        loader, args = self._train_loader, self.args
        if not has_length(loader):
            return epoch, batches
        before, now = int(saved["rows_per_step"]), self._rows_per_step()
        if before != now:
            share, rest = divmod(before, args.world_size)
            remedy = f"--per_device_train_batch_size {share} --gradient_accumulation_steps 1 (or the same product)"
            remedy = f"a number of processes that divides {before}" if rest else remedy
            raise ValueError(
                f"the checkpoint's optimizer steps took {before} rows, now they would take {now} "
                f"(per_device_train_batch_size={self._train_batch_size} x gradient_accumulation_steps="
                f"{args.gradient_accumulation_steps} x {args.world_size} processes), which changes epochs "
                f"and schedule; resume with {remedy}"
            )
        if isinstance(loader, StreamLoader):
            epoch, batches = loader.passes_done, loader.batches_done % len(loader)
        elif "rows" in saved:
            epoch, batches = int(saved["epoch"]), int(saved["rows"]) // (self._train_batch_size * args.world_size)
            if batches >= len(loader):  # the last batch of the epoch was smaller than a whole step
                epoch, batches = epoch + 1, 0
        self.state.epoch = epoch + batches / len(loader)
        return epoch, batches

    def _run_epoch(self, **kwargs: Any) -> Any:  # type: ignore[override]
        """As `Trainer._run_epoch` (5.23), which skips the first batches of a resumed epoch, unless a stream did."""
        if self.control.should_training_stop:  # decided by the repeated evaluation
            return None
        skipped = kwargs["steps_trained_in_current_epoch"] if kwargs["epoch"] == kwargs["epochs_trained"] else 0
        if skipped and isinstance(self._train_loader, StreamLoader):
            batches, generator = (
                _Resumed(self._train_loader, skipped),
                torch.Generator(),
            )  # leaves the global random state alone
            kwargs["train_dataloader"] = DataLoader(
                batches, batch_size=None, generator=generator, collate_fn=lambda batch: batch
            )
        return super()._run_epoch(**kwargs)

    def _data_state(self) -> dict[str, Any]:
        """The position in the data after this optimizer step."""
        state: dict[str, Any] = {"rows_per_step": self._rows_per_step(), "processes": self.args.world_size}
        state |= {"data": self._data} | ({"evaluation_due": True} if self.evaluation_due else {})
        if isinstance(self._train_loader, StreamLoader):
            return {**state, "stream": self._train_loader.state_dict()}
        if not has_length(self._train_loader):
            return state
        begun, epoch, done = self._start
        passed, step = divmod(done + self.state.global_step - begun, self._steps_in_epoch)
        return {**state, "epoch": epoch + passed, "rows": step * self._rows_per_step()}

    # ---- optimizer -------------------------------------------------------------------------------------------

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As `Trainer.create_scheduler`; compares optimizer and schedule with the checkpoint's."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if not self.is_deepspeed_enabled:
            self._settings = settings_of(self.optimizer, scheduler, self.model)
            if (before := _read(self._resumed_from, SETTINGS)) is not None:
                check_settings(before, self._settings, str(self._resumed_from))
        return scheduler

    def apply_flags(self) -> None:
        """Apply rates, weight decay and schedule of this start; the stock Trainer keeps the checkpoint's."""
        if self._resumed_from is None:
            return
        if self._settings is not None:
            before = _read(self._resumed_from, SETTINGS)
            apply_settings(self.optimizer, self.lr_scheduler, before, self._settings)
        if self.average is not None:
            self.average.resume(self._resumed_from)

    # ---- signals ---------------------------------------------------------------------------------------------

    def stop_wanted(self, *, now: bool = False) -> bool:
        """Whether any rank received a signal; every rank calls it at the same place."""
        if self._signals is None or self._any_rank is None:
            return False
        return self._any_rank(self._signals.received is not None, now=now)

    def cut_evaluation(self) -> None:
        """Called between two parts of an evaluation, on every rank; leaves it after a signal.

        Raises:
            EvaluationCut: caught by `evaluate`.
        """
        if self.stop_wanted(now=True):
            raise EvaluationCut

    def save_and_stop(self, *, evaluation_due: bool = False) -> None:
        """Save a checkpoint of this step, unless there is one, and end the process.

        Raises:
            Stopped: always.
        """
        step = self.state.global_step
        self.evaluation_due = self.evaluation_due or evaluation_due
        resumed_here = self._resumed_from is not None and step == self._start[0]  # nothing was trained since
        if step and not resumed_here and (evaluation_due or self.saved_at != step):
            self.args.save_only_model = False  # needed to resume
            self._save_checkpoint(self.model_wrapped, None)
        barrier()  # a launcher ends all ranks when one exits, and the first still writes the checkpoint
        if step and self.is_world_process_zero():
            folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{step}"
            logger.warning("stopped by a signal after step %d; %s is saved: continue with --resume", step, folder)
        raise Stopped

    def evaluate_what_is_due(self) -> None:
        """The evaluation that a signal prevented, without saving the checkpoint again."""
        metrics = self._evaluate(None, None)
        self._determine_best_metric(metrics=metrics, trial=None)
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = self._resumed_from
        self.evaluation_due = False

    # ---- checkpoints -----------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        """As `Trainer._get_output_dir` (5.23); while a checkpoint is written, its temporary folder."""
        return super()._get_output_dir(trial) if self._writing is None else str(self._writing)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As `Trainer._save_checkpoint` (5.23), into a temporary folder that is renamed once every process has written.

        Only then are older checkpoints removed.
        """
        run_folder, step = Path(self._get_output_dir(trial)), self.state.global_step
        folder, saves = run_folder / f"checkpoint-{step}", self.args.should_save
        with whole_folder(folder) if saves else contextlib.nullcontext():
            barrier()  # the temporary folder is there
            self._writing = run_folder / f".{folder.name}.partial"
            try:
                super()._save_checkpoint(model, trial)
            finally:
                written, self._writing = self._writing, None
            best = run_folder / f"checkpoint-{self.state.best_global_step}"
            if best == folder or best.is_dir():
                self.state.best_model_checkpoint = str(best)
            barrier()
            if saves:
                self._complete(written, folder.name)
        self.saved_at = step
        if saves:
            rotate(run_folder, self.args.save_total_limit, self.state.best_model_checkpoint, step)

    def _complete(self, written: Path, name: str) -> None:
        """Move the stock Trainer's files up one folder; add the state of the data and the manifest."""
        for path in (written / name).iterdir():
            path.rename(written / path.name)
        (written / name).rmdir()
        self.state.save_to_json(str(written / STATE_FILE))  # the best checkpoint under its final path
        (written / DATA_STATE).write_text(json.dumps(self._data_state()), encoding="utf-8")
        (written / SETTINGS).write_text(json.dumps(self._settings), encoding="utf-8")
        write_manifest(written)


class _Continue(TrainerCallback):
    """Applies the flags of this start to the loaded checkpoint, before the run folder is changed."""

    def __init__(self, trainer: ExactResume) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.apply_flags()


class _Resumed(IterableDataset):
    """The batches of a resumed pass after `count` placeholders, which the Trainer skips."""

    def __init__(self, loader: StreamLoader, count: int) -> None:
        self.loader, self.count = loader, count

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain(itertools.repeat(None, self.count), self.loader)


def _read(checkpoint: str | Path | None, name: str) -> dict[str, Any] | None:
    file = Path(checkpoint or "") / name
    return json.loads(file.read_text(encoding="utf-8")) if checkpoint and file.is_file() else None
