"""`transformers.Trainer` with parameter groups, whole checkpoints, evaluators and the run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.trainer_utils import has_length

from mllm_vision.data.records.sampling import EpochCallback
from mllm_vision.training.callbacks.ema import WeightAverage
from mllm_vision.training.callbacks.progress import (
    BadSampleLimit,
    LogLines,
    MovingSteps,
    RunFolder,
    SaveByMinutes,
    guard_reporters,
)
from mllm_vision.training.checkpoint.checkpoints import damage, found_by_first
from mllm_vision.training.checkpoint.signals import ignoring_signals
from mllm_vision.training.optim.clipping import clip_per_module_, clip_per_parameter_
from mllm_vision.training.optim.muon import MuonAdamW
from mllm_vision.training.optim.optimizers import (
    group_flags,
    group_settings,
    log_rates,
    optimizer_class,
    parameter_groups,
)
from mllm_vision.training.optim.schedules import WeightDecaySchedule, exact_cosine, step_schedule, warn_of_warmup
from mllm_vision.training.recipe.ending import Failure
from mllm_vision.training.recipe.flags import check_trainer, length_sampler
from mllm_vision.training.recipe.launch import limit_collectives
from mllm_vision.training.trainer.evaluating import Evaluating
from mllm_vision.training.trainer.sharding import copy_to_shard, gather, prepare_sharding, release


class RecipeTrainer(Evaluating):
    """`Trainer` with what every stage needs; every argument and callback of `Trainer` works as usual.

    - Parameter groups by module, with weight decay only where it belongs (training/optim/optimizers.py).
    - A checkpoint is whole or absent. Resuming checks that every weight was found, where the stock Trainer only warns.
      `train()` resumes as `args.resume` and `args.resume_from_checkpoint` say.
    - Logs go to `run`, with samples per second; evaluators run every `eval_steps`; with a run the last evaluation is
      `final_evaluation`'s, of the saved model.

    Args:
        run: the `Run` whose folder is written, or None.
        learning_rates: parameter-name prefix -> learning rate.
        weight_decays: parameter-name prefix -> weight decay.
        bad_samples: the `BadSamples` counter of the data set, checked at every step.
        evaluators: callables (model, step) -> dict with an attribute `name`; metrics are logged as
            `eval_<name>_<metric>`; `baselines`, `samples` and `arrays` of the dict go to the run's record at the end.

    Raises:
        ValueError: the training set is empty, or smaller than one batch with `dataloader_drop_last`; no evaluator
            measures `metric_for_best_model`; `embed_batch_size` without an `Objective`.
    """

    takes_embed_batch_size = False
    args: Any  # RecipeArguments, or plain TrainingArguments

    def __init__(
        self,
        *args: Any,
        run: Any = None,
        learning_rates: Mapping[str, float | None] | None = None,
        weight_decays: Mapping[str, float | None] | None = None,
        bad_samples: Any = None,
        evaluators: Sequence[Callable[[Any, int], Mapping[str, Any]]] = (),
        **kwargs: Any,
    ) -> None:
        # The Trainer requires a data set to evaluate on; evaluators have their own.
        stand_in = bool(evaluators) and kwargs.get("eval_dataset") is None and len(args) < 5
        if stand_in:
            kwargs["eval_dataset"] = []
        self.run = run
        self.learning_rates, self.weight_decays = dict(learning_rates or {}), dict(weight_decays or {})
        self.evaluators = list(evaluators)
        self._before = {}
        self._clock: tuple[float, int] | None = None
        super().__init__(*args, **kwargs)
        if stand_in:
            self.eval_dataset = None
        if self.is_fsdp_enabled:
            self.unsharded, copied = self.model, copy_to_shard(self.model)
            self.model = self.model_wrapped = self.callback_handler.model = copied
        self._smooth_in_the_model()
        guard_reporters(self.callback_handler)
        check_trainer(self)
        self._check_size()
        self._check_best_metric()
        if getattr(self.args, "embed_batch_size", None) is not None and not self.takes_embed_batch_size:
            raise ValueError(
                f"embed_batch_size={self.args.embed_batch_size} is for the objectives of stage zero; use "
                "--gradient_accumulation_steps with a smaller --per_device_train_batch_size, which is exact"
            )
        self.steps = MovingSteps()
        self._add_callbacks(bad_samples)

    def _add_callbacks(self, bad_samples: Any) -> None:
        LogLines.take_over(self)
        if self.run is not None:
            self.add_callback(RunFolder(self.run))
        self.add_callback(self.steps)
        self.add_callback(EpochCallback())
        if bad_samples is not None:
            self.add_callback(BadSampleLimit(bad_samples, self.run))
        if getattr(self.args, "save_minutes", None) is not None:
            self.add_callback(SaveByMinutes(self.args.save_minutes))
        if hasattr(self.args, "check_sharding") and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            version = getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1)
            self.args.check_sharding("DeepSpeed" if self.is_deepspeed_enabled else f"FSDP version {version}")
        if getattr(self.args, "weight_decay_end", None) is not None:
            self.add_callback(WeightDecaySchedule(self.args.weight_decay, self.args.weight_decay_end))
        if getattr(self.args, "ema_decay", None) is not None:
            self.average = WeightAverage(self.model, self.args.ema_decay)
            self.add_callback(self.average)

    def _smooth_in_the_model(self) -> None:
        """A model with an attribute `label_smoothing` smooths its labels itself."""
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

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer named by `args.optim` over our parameter groups."""
        if self.optimizer is None:
            target, args = self.model if model is None else model, self.args
            named = self.optimizer_cls_and_kwargs or optimizer_class(args)
            cls, settings = named or self.get_optimizer_cls_and_kwargs(args, target)
            if {"params", "model", "optimizer_dict"} & set(settings):  # GaLore and others make their own groups
                if asked := group_flags(args, self.learning_rates, self.weight_decays):
                    raise ValueError(
                        f"--optim {args.optim.value} makes its own groups and ignores {asked[0]}; leave it out"
                    )
                return super().create_optimizer(model)
            rate = settings.get("lr", args.learning_rate)
            rates = group_settings(args, rate, self.learning_rates, self.weight_decays)
            groups = parameter_groups(target, **rates, also_decays=getattr(self.model, "also_decays", ()))
            if self.is_world_process_zero():
                log_rates(args, groups)
            if rates["muon_learning_rate"] is not None:
                cls = MuonAdamW
            optimizer: Any = cls(groups, **{**settings, "lr": rates["learning_rate"]})
            if self.is_fsdp_enabled:
                prepare_sharding(self.accelerator, target, optimizer)
            self.optimizer = optimizer
        if self.args.fp16:  # a fused kernel (torch 2.13) does not report skipped steps
            self.optimizer._step_supports_amp_scaling = False
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As `Trainer.create_scheduler`, with the schedules `step` and `exact_cosine`."""
        if self.unsharded is not None:  # the copy has been sharded by now
            release(self.unsharded)
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            if self.is_world_process_zero():
                warn_of_warmup(warmup, num_training_steps)
            kind = str(getattr(self.args.lr_scheduler_type, "value", ""))
            if kind in ("step", "exact_cosine"):
                chosen = self.optimizer if optimizer is None else optimizer
                given = {"num_warmup_steps": warmup, "num_training_steps": num_training_steps}
                given |= self.args.lr_scheduler_kwargs or {}
                epochs = self.args.num_train_epochs if self.args.max_steps <= 0 else None
                make = step_schedule if kind == "step" else partial(exact_cosine, epochs=epochs)
                self.lr_scheduler, self._created_lr_scheduler = make(chosen, **given), True
        return super().create_scheduler(num_training_steps, optimizer)

    def _clip_grad_norm(self, model: Any) -> Any:
        """As `Trainer._clip_grad_norm` (5.23), or as `gradient_clipping` says."""
        if getattr(self.args, "gradient_clipping", "global") == "global":
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        if self.args.gradient_clipping == "per_module":
            return clip_per_module_(model, self.args.max_grad_norm)
        return clip_per_parameter_(model.parameters(), self.args.max_grad_norm)

    # ---- data and training -----------------------------------------------------------------------------------

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        """As `Trainer._get_dataloader` (5.23), with the known lengths of the rows.

        The last, smaller batch is dropped in training only; the stock Trainer drops it in evaluation too.
        """
        given, args = sampler_fn, self.args

        def sampler(rows: Any) -> Any:
            return (is_training and length_sampler(rows, args)) or (given(rows) if given is not None else None)

        dropped, args.dataloader_drop_last = args.dataloader_drop_last, args.dataloader_drop_last and is_training
        try:
            loader = super()._get_dataloader(dataset, description, batch_size, sampler, is_training, dataloader_key)
        finally:
            args.dataloader_drop_last = dropped
        if getattr(loader, "num_workers", 0):
            loader.worker_init_fn = ignoring_signals(loader.worker_init_fn)
        return loader

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, resuming as the arguments say; afterwards save, and call `final_evaluation`."""
        limit_collectives(self.args.ddp_timeout)
        self._clock = None
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.unsharded is not None:
            gather(self.unsharded, self.model, self.args.device)
            self.model = self.model_wrapped = self.callback_handler.model = self.unsharded
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with samples per second and the rate of each parameter group, and into the run."""
        if "train_runtime" in logs:
            if self.stop_wanted(now=True):  # before the best checkpoint is loaded
                self.save_and_stop()
            if self.state.global_step == self._start[0]:
                return  # no step was trained: keep the earlier line
        if "loss" in logs:
            now, step = time.monotonic(), self.state.global_step
            if self._clock is not None and step > self._clock[1] and now > self._clock[0]:
                batch = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
                logs["samples_per_second"] = round((step - self._clock[1]) * batch / (now - self._clock[0]), 2)
            self._clock = (now, step)
            if self.learning_rates and logs.get("learning_rate") and self.optimizer is not None:
                logs |= self._group_rates(logs["learning_rate"])
        super().log(logs, start_time)
        if self.run is not None and self.is_world_process_zero():
            self.run.log(self.state.global_step, logs)

    def _group_rates(self, first: float) -> dict[str, float]:
        """The rate of each named group; `first` is the logged rate of the first group."""
        groups = self.optimizer.param_groups
        peaks: dict[str, float] = {}  # with layer_decay a name has many groups
        for group in groups:
            name = group.get("group_name", "default")
            peaks[name] = max(peaks.get(name, 0.0), group["initial_lr"])
        held = {group.get("group_name") for group in groups if group.get("held")}
        shares = {name: 1.0 if name in held else first / groups[0]["initial_lr"] for name in peaks}
        return {f"learning_rate_{name}": shares[name] * peaks[name] for name in sorted(peaks.keys() - {"default"})}

    # ---- weights in checkpoints ------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; a checkpoint contains weights under their names in memory, and their average.

        The stock Trainer saves some models (Llava, ViT, DINOv2) under older names, loads by the names in memory, finds
        nothing, warns, and continues from other weights.
        """
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        peft = hasattr(model, "get_base_model")
        whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled or peft)
        if not (whole and _internal_call and output_dir is not None):
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            if isinstance(model, PreTrainedModel):
                model.save_pretrained(output_dir, save_original_format=False)
            else:
                weights = Path(output_dir) / "model.safetensors"
                kept = self._in_checkpoints()
                state = {name: value for name, value in model.state_dict().items() if kept is None or name in kept}
                save_file(_without_copies(state), weights, metadata={"format": "pt"})
            tokens = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokens is not None:
                tokens.save_pretrained(output_dir)
            torch.save(self.args, Path(output_dir) / "training_args.bin")
        if self.average is not None and _internal_call and output_dir is not None and self.args.should_save:
            self.average.save(output_dir)

    def _in_checkpoints(self) -> set[str] | None:
        """Names of the weights that checkpoints hold; None: all. See `LanguageTask.in_checkpoints`."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model.in_checkpoints() if hasattr(model, "in_checkpoints") else None

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Replaces the warnings of `Trainer._issue_warnings_after_load` (5.23): only tied weights may be missing."""
        tied = set(self.model.state_dict()) - set(_without_copies(self.model.state_dict()))
        if isinstance(self.model, PreTrainedModel):
            tied |= {*(getattr(self.model, "all_tied_weights_keys", None) or ())}
            tied |= {*(self.model._keys_to_ignore_on_save or ())}
        kept = self._in_checkpoints()
        missing = [name for name in load_result.missing_keys if name not in tied and (kept is None or name in kept)]
        unexpected = list(load_result.unexpected_keys)
        if missing or unexpected:
            raise ValueError(
                f"the checkpoint does not fit this model: {len(missing)} weights are missing "
                f"({', '.join(missing[:3]) or 'none'}), {len(unexpected)} are unknown "
                f"({', '.join(unexpected[:3]) or 'none'}). Resume with the recipe the run was started with"
            )

    def _load_best_model(self) -> None:
        """As `Trainer._load_best_model` (5.23), with a check of the checkpoint, and its average."""
        best = Path(str(self.state.best_model_checkpoint))
        if (wrong := found_by_first(lambda: damage(best, contents=True))) is not None:
            error = ValueError(
                f"load_best_model_at_end: {best} is damaged: {wrong}; the weights of the last step are kept"
            )
            if self.run is None:
                raise error
            self.run.ending.note(Failure("loading the best checkpoint", error))  # the model is not lost
            self.state.best_global_step = None  # metrics belong to the saved weights
            return
        super()._load_best_model()
        if self.average is not None:
            self.average.resume(best)


def _without_copies(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with one name per storage: safetensors refuses tied weights."""
    kept: dict[str, torch.Tensor] = {}
    seen: set[tuple] = set()
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else (name,)
        if key not in seen:
            seen.add(key)
            kept[name] = tensor.contiguous()
    return kept
