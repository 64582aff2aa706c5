"""A thin layer over `transformers.Trainer`: our parameter groups, whole checkpoints, evaluators, the run folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerState
from transformers.trainer_utils import has_length

from mllm_vision.data.records.sampling import EpochCallback
from mllm_vision.training.callbacks.ema import WeightAverage
from mllm_vision.training.callbacks.progress import (
    BadSampleLimit,
    MovingSteps,
    RunFolder,
    SaveByMinutes,
    guard_reporters,
)
from mllm_vision.training.checkpoint.checkpoints import damage, found_by_first
from mllm_vision.training.checkpoint.signals import StopSignals, deaf_workers
from mllm_vision.training.optim.clipping import clip_per_module_, clip_per_parameter_
from mllm_vision.training.optim.muon import MuonAdamW
from mllm_vision.training.optim.optimizers import (
    group_flags,
    group_settings,
    optimizer_class,
    parameter_groups,
    tell_rates,
)
from mllm_vision.training.optim.schedules import WeightDecaySchedule, exact_cosine, step_schedule, warn_of_warmup
from mllm_vision.training.recipe.ending import Failure
from mllm_vision.training.recipe.flags import check_trainer, length_sampler
from mllm_vision.training.recipe.launch import limit_collectives
from mllm_vision.training.trainer.evaluating import Evaluating
from mllm_vision.training.trainer.sharding import make_whole, prepare_sharding

logger = logging.getLogger(__name__)


class RecipeTrainer(Evaluating):
    """`Trainer` with what every stage here needs; every argument and callback of `Trainer` works as usual.

    - Parameter groups by module and without decay where it does not belong (training/optim/optimizers.py).
    - A checkpoint is whole or not there; the one before it stays until the new one is. Resuming checks that every
      weight was found, where the stock Trainer only warns.
    - `train()` resumes by itself as `args.resume` and `args.resume_from_checkpoint` say.
    - Logs go to `run.log`, with samples per second; evaluators run every `eval_steps`; with a run the last
      evaluation is `final_evaluation`'s, of what was saved.

    Args:
        run: the `Run` whose folder is written; none is needed.
        learning_rates: parameter-name prefix -> learning rate.
        bad_samples: the `BadSamples` counter of the data set, checked at every step.
        evaluators: callables (model, step) -> dict with an attribute `name`; keys are logged as
            `eval_<name>_<metric>`; `baselines`, `samples` and `arrays` in the dict go to the run's record at the end.

    Raises:
        ValueError: the training set is empty, or smaller than one batch when the last one is dropped; no evaluator
            measures `metric_for_best_model`; `embed_batch_size` with a model that is no `Objective`.
    """

    takes_embed_batch_size = False

    def __init__(
        self,
        *args: Any,
        run: Any = None,
        learning_rates: Mapping[str, float | None] | None = None,
        bad_samples: Any = None,
        evaluators: Sequence[Callable[[Any, int], Mapping[str, Any]]] = (),
        **kwargs: Any,
    ) -> None:
        # The Trainer insists on a data set to evaluate on; evaluators bring their own.
        stand_in = bool(evaluators) and kwargs.get("eval_dataset") is None and len(args) < 5
        if stand_in:
            kwargs["eval_dataset"] = []
        self.run = run
        self.learning_rates = dict(learning_rates or {})
        self.evaluators = list(evaluators)
        self._before = {}
        self._clock: tuple[float, int] | None = None
        super().__init__(*args, **kwargs)
        if stand_in:
            self.eval_dataset = None
        self._smooth_in_the_model()
        guard_reporters(self.callback_handler)
        check_trainer(self)
        if run is not None:
            self.add_callback(RunFolder(run))
        self.steps = MovingSteps()
        self.add_callback(self.steps)
        self.add_callback(EpochCallback())
        if bad_samples is not None:
            self.add_callback(BadSampleLimit(bad_samples, run))
        if getattr(self.args, "save_minutes", None) is not None:
            self.add_callback(SaveByMinutes(self.args.save_minutes))
        self.average = self._prepare_optimizer_flags()
        self._check_size()
        self._check_best_metric()
        if getattr(self.args, "embed_batch_size", None) is not None and not self.takes_embed_batch_size:
            raise ValueError(
                f"embed_batch_size={self.args.embed_batch_size} is for the objectives of stage zero; here use "
                "--gradient_accumulation_steps with a smaller --per_device_train_batch_size, which is exact"
            )

    def _smooth_in_the_model(self) -> None:
        """A model that smooths its labels by itself (``label_smoothing``) does it instead of the Trainer."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # peft's
        if self.label_smoother is not None and hasattr(model, "label_smoothing"):
            model.label_smoothing, self.label_smoother = self.args.label_smoothing_factor, None

    def _check_size(self) -> None:
        if self.train_dataset is None or not has_length(self.train_dataset):
            return
        rows, batch = len(self.train_dataset), self._train_batch_size * self.args.world_size
        if rows == 0:
            raise ValueError("the training set is empty")
        if rows < batch and self.args.dataloader_drop_last:
            raise ValueError(
                f"the training set has {rows} rows, fewer than one batch of {batch} "
                f"(per_device_train_batch_size={self._train_batch_size} x {self.args.world_size} processes); "
                f"use --per_device_train_batch_size {max(1, rows // self.args.world_size)} or less, "
                "or --dataloader_drop_last false"
            )

    # ---- optimizer -----------------------------------------------------------------------------------------

    def _prepare_optimizer_flags(self) -> WeightAverage | None:
        """The callbacks that `weight_decay_end` and `ema_decay` ask for; what sharding makes impossible is refused."""
        if hasattr(self.args, "check_sharding") and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            plugin = self.accelerator.state.fsdp_plugin
            version = getattr(plugin, "fsdp_version", 1)
            self.args.check_sharding("DeepSpeed" if self.is_deepspeed_enabled else f"FSDP version {version}")
        end, decay = getattr(self.args, "weight_decay_end", None), getattr(self.args, "ema_decay", None)
        if end is not None:
            self.add_callback(WeightDecaySchedule(self.args.weight_decay, end))
        if decay is None:
            return None
        average = WeightAverage(self.model, decay)
        self.add_callback(average)
        return average

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer named by `args.optim` over our parameter groups."""
        if self.optimizer is None:
            target, args = self.model if model is None else model, self.args
            named = self.optimizer_cls_and_kwargs or optimizer_class(args)
            cls, settings = named or self.get_optimizer_cls_and_kwargs(args, target)
            if {"params", "model", "optimizer_dict"} & set(settings):  # GaLore and the like choose parameters alone
                if asked := group_flags(args, self.learning_rates):
                    raise ValueError(f"--optim {args.optim.value} makes its own groups: it takes no {asked[0]}")
                return super().create_optimizer(model)
            rates = group_settings(args, settings.get("lr", args.learning_rate), self.learning_rates)
            groups = parameter_groups(target, **rates, also_decays=getattr(self.model, "also_decays", ()))
            if self.is_world_process_zero():
                tell_rates(args, groups)
            if rates["muon_learning_rate"] is not None:
                cls = MuonAdamW
            self.optimizer = cls(groups, **{**settings, "lr": rates["learning_rate"]})
            if args.fp16:  # a fused optimizer that skips in its own kernel (torch 2.13) tells nobody that it did
                self.optimizer._step_supports_amp_scaling = False
            if self.is_fsdp_enabled:
                prepare_sharding(self.accelerator, target, self.optimizer)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As `Trainer.create_scheduler`, with the schedules of our own."""
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            if self.is_world_process_zero():
                warn_of_warmup(warmup, num_training_steps)
            kind = str(getattr(self.args.lr_scheduler_type, "value", ""))
            if kind in ("step", "exact_cosine"):
                chosen = self.optimizer if optimizer is None else optimizer
                steps = {"num_warmup_steps": warmup, "num_training_steps": num_training_steps}
                given = self.args.lr_scheduler_kwargs or {}
                if kind == "step":
                    self.lr_scheduler = step_schedule(chosen, **steps, **given)
                else:
                    epochs = self.args.num_train_epochs if self.args.max_steps <= 0 else None
                    self.lr_scheduler = exact_cosine(chosen, **steps, epochs=epochs, **given)
                self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _clip_grad_norm(self, model: Any) -> Any:
        if getattr(self.args, "gradient_clipping", "global") == "global":
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        if self.args.gradient_clipping == "per_module":
            return clip_per_module_(model, self.args.max_grad_norm)
        return clip_per_parameter_(model.parameters(), self.args.max_grad_norm)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; a checkpoint holds the average of the weights too."""
        super().save_model(output_dir, _internal_call)
        if self.average is not None and _internal_call and output_dir is not None and self.args.should_save:
            self.average.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.average is not None and checkpoint is not None:
            self.average.resume(checkpoint)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if (wrong := found_by_first(lambda: damage(best, contents=True))) is not None:
            error = ValueError(
                f"load_best_model_at_end: {best} is torn: {wrong}; the weights of the last step are kept"
            )
            if self.run is None:
                raise error
            self.run.ending.note(Failure("loading the best checkpoint", error))  # what was trained is not lost for it
            self.state.best_global_step = None  # figures are told of the weights that are saved
            return
        super()._load_best_model()
        if self.average is not None:
            self.average.resume(self.state.best_model_checkpoint)

    # ---- data ----------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As `Trainer._get_train_sampler` (5.23), which would read every row for the lengths that are known here."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return length_sampler(dataset, self.args) or super()._get_train_sampler(train_dataset)

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """`dataloader_drop_last` is for training: the stock Trainer leaves the rest of an evaluation set out too."""
        given = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = given and description.lower() == "training"
        try:
            loader = super()._get_dataloader(dataset, description, *args, **kwargs)
        finally:
            self.args.dataloader_drop_last = given
        if getattr(loader, "num_workers", 0):
            loader.worker_init_fn = deaf_workers(loader.worker_init_fn)
        return loader

    # ---- training and evaluation ---------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, resuming as the arguments say. Then save, and call `final_evaluation`."""
        limit_collectives(self.args.ddp_timeout)
        if resume_from_checkpoint in (None, True) and hasattr(self.args, "checkpoint_to_resume"):
            self.args.resume = self.args.resume or resume_from_checkpoint is True
            resume_from_checkpoint = self.args.checkpoint_to_resume()
        if resume_from_checkpoint:
            logger.info("going on from %s", resume_from_checkpoint)
        self._clock = None
        if self.average is not None:  # after all other callbacks: an objective's after_step may still change weights
            self.remove_callback(self.average)
            self.add_callback(self.average)
        told = "the step is finished and a checkpoint saved" if self.is_world_process_zero() else ""
        with StopSignals(told) as self._signals:
            try:
                result = super().train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self._signals = None
        if self.is_fsdp_enabled:
            make_whole(self.model)
        return result

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As `ExactResume._init_training_state`; a ratio of the steps is compared with the checkpoint's by its number.

        The stock Trainer keeps the 12 that `eval_steps` 0.2 came to, and warns on resuming that 0.2 is not 12.
        """
        resolved = TrainerState()
        resolved.compute_steps(self.args, max_steps)
        names = [name for name in ("logging_steps", "eval_steps", "save_steps") if getattr(self.args, name) is not None]
        given = {name: getattr(self.args, name) for name in names}
        for name in names:
            setattr(self.args, name, getattr(resolved, name))
        try:
            return super()._init_training_state(max_steps, *args, **kwargs)
        finally:
            for name, value in given.items():
                setattr(self.args, name, value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with samples per second and the rate of each parameter group, and into the run."""
        if "train_runtime" in logs and self.state.global_step == self._start[0]:
            return  # no step was trained: the run had all of them, and its own line stands
        if "loss" in logs:
            now, step = time.monotonic(), self.state.global_step
            if self._clock is not None and step > self._clock[1] and now > self._clock[0]:
                batch = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
                logs["samples_per_second"] = round((step - self._clock[1]) * batch / (now - self._clock[0]), 2)
            self._clock = (now, step)
            if self.learning_rates and logs.get("learning_rate") and self.optimizer is not None:
                groups = self.optimizer.param_groups  # the Trainer logs the first one's rate before the schedule moves
                peaks: dict[str, float] = {}  # with layer_decay a name has many groups
                for group in groups:
                    name = group.get("group_name", "default")
                    peaks[name] = max(peaks.get(name, 0.0), group["initial_lr"])
                held = {group.get("group_name") for group in groups if group.get("held")}
                for name in sorted(peaks.keys() - {"default"}):
                    share = 1.0 if name in held else logs["learning_rate"] / groups[0]["initial_lr"]
                    logs[f"learning_rate_{name}"] = share * peaks[name]
        super().log(logs, start_time)
        if self.run is not None and self.is_world_process_zero():
            self.run.log(self.state.global_step, logs)

    # ---- checkpoints (what is saved when, and resumed: resume.py) -----------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save weights under the names they have in memory.

        The stock Trainer saves some models (Llava, ViT, DINOv2) under the names of older releases and then, on
        resuming, loads by the names in memory: nothing fits, it warns, and training goes on from other weights.
        """
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, PreTrainedModel):
            original = model.save_pretrained

            def save_pretrained(*args: Any, **kwargs: Any) -> Any:
                return original(*args, **{**kwargs, "save_original_format": False})

            model.save_pretrained = save_pretrained  # type: ignore[method-assign]
            try:
                super()._save(output_dir, state_dict)
            finally:
                del model.save_pretrained
        else:
            super()._save(output_dir, _without_copies(model.state_dict()) if state_dict is None else state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that does not fit; only tied copies may be missing."""
        tied = set(self.model.state_dict()) - set(_without_copies(self.model.state_dict()))
        missing = [name for name in load_result.missing_keys if name not in tied]
        if isinstance(self.model, PreTrainedModel):
            known = getattr(self.model, "all_tied_weights_keys", None) or {}
            ignored = self.model._keys_to_ignore_on_save or ()
            missing = [name for name in missing if name not in known and name not in ignored]
        unexpected = list(load_result.unexpected_keys)
        if missing or unexpected:
            raise ValueError(
                f"the checkpoint does not fit this model: {len(missing)} weights are missing "
                f"({', '.join(missing[:3]) or 'none'}), {len(unexpected)} are unknown "
                f"({', '.join(unexpected[:3]) or 'none'}). Resume with the recipe the run was started with"
            )


def _without_copies(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with one name per storage: safetensors refuses tied copies."""
    kept: dict[str, torch.Tensor] = {}
    seen: set[tuple] = set()
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else (name,)
        if key not in seen:
            seen.add(key)
            kept[name] = tensor.contiguous()
    return kept
