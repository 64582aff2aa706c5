"""The trainer of stage zero: any `Objective`, its loss, its metrics, its `after_step`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.utils.memory import clear_device_cache
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from mllm_vision.data.streams.streams import StreamDataset
from mllm_vision.distributed import mean_over_ranks
from mllm_vision.objectives import ImageObjective
from mllm_vision.training.callbacks.finite import stop_if_not_finite
from mllm_vision.training.callbacks.health import Health
from mllm_vision.training.callbacks.progress import AfterStep
from mllm_vision.training.optim.method_rates import FrozenAtFirst, MethodRates, StillAtFirst
from mllm_vision.training.trainer.epoch_pass import FeaturesBeforeEpoch
from mllm_vision.training.trainer.gradient_cache import cached_backward, count_rows
from mllm_vision.training.trainer.recipe_trainer import RecipeTrainer

logger = logging.getLogger(__name__)


class ObjectiveTrainer(RecipeTrainer):
    """Trains an `Objective`: its loss, its metrics (averaged between logs and over ranks), its `after_step`.

    Logs the negatives per anchor and the loss at chance at the start, and warns when a training goes wrong (`Health`).
    A loss that is NaN or infinite ends the training before its step, with the batch saved.

    With `args.embed_batch_size` below the batch size, the batch is embedded in chunks of so many rows; views exist for
    one chunk at a time. Loss and gradients are those of the whole batch (`gradient_cache`). Where the loss couples the
    rows of a batch, `gradient_accumulation_steps` means the same: so many times the rows at once, in chunks of
    `per_device_train_batch_size`.

    Args:
        make_views: a callable batch -> batch that makes the views of a batch on its device (`data.views.ViewMaker`).
        make_plain_views: the same without augmentation, for methods that iterate over the data before each epoch.

    Raises:
        ValueError: chunks with a method that does not allow them, torch.compile, DeepSpeed, an optimizer that steps
            inside the backward pass, or several GPUs in one process; too few data for the method; a stream for a
            method that iterates over the data before each epoch.
    """

    takes_embed_batch_size = True
    # The loss is the mean over the micro-batch: the Trainer divides it.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *others: Any,
        make_views: Callable[[Any], Any] | None = None,
        make_plain_views: Callable[[Any], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._accumulated = 1 if args is None else args.gradient_accumulation_steps
        self.make_views, self.make_plain_views = make_views, make_plain_views
        args = _chunked(model, args)
        super().__init__(model, args, *others, **kwargs)
        # It reads the loss from the device, which `stop_if_not_finite` already does.
        self.args.logging_nan_inf_filter = False
        self.model_accepts_loss_kwargs = False
        self._contract_checked = False
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self.rates = MethodRates(self.objective)
        self.learning_rates = {**self.rates.learning_rates(self.args.learning_rate), **self.learning_rates}
        if self.rates.frozen:
            self.add_callback(FrozenAtFirst(self.objective, self.rates.frozen))
        if self.rates.still:
            self.add_callback(StillAtFirst(self.rates.still))
        self.add_callback(AfterStep(self.objective))
        self._prepare_method()
        self.add_callback(Health(self.objective, lambda: self.negatives_batch, self.run))

    def _prepare_method(self) -> None:
        """Pass the sizes of the data to the method, and add its callbacks."""
        rows = len(self.train_dataset) if has_length(self.train_dataset) else None
        if hasattr(self.objective, "before_training") and self.train_dataset is not None:
            self.objective.before_training(rows, self.negatives_batch)
        averaged = self.average is not None and isinstance(self.objective, ImageObjective)
        if averaged and self.objective.artifact_encoder is not self.objective.encoder:
            raise ValueError(
                f"ema_decay={self.args.ema_decay} averages the trained encoder, and this run saves "
                f"{self.objective.artifact_is}, which is an average; leave it out, or use --artifact student"
            )
        if getattr(self.objective, "needs_features", False):
            if rows is None or isinstance(self.train_dataset, StreamDataset):
                raise ValueError(
                    f"{type(self.objective).__name__} iterates over all rows before each epoch, which a stream "
                    "does not allow; train without --streaming"
                )
            self.add_callback(FeaturesBeforeEpoch(self))

    @property
    def objective(self) -> Any:  # type: ignore[override]  # the Trainer's own is a number of a hyperparameter search
        """The objective without the wrappers of DDP or torch.compile."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def negatives_batch(self) -> int:
        """Pairs in one loss: the batch of all processes, without accumulation."""
        return self._train_batch_size * self.args.world_size

    @property
    def embed_batch_size(self) -> int | None:
        """Rows per chunk where that is less than the batch of this process, else None."""
        size = getattr(self.args, "embed_batch_size", None)
        return size if size is not None and size < self._train_batch_size else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `RecipeTrainer.train`, after a line on negatives and chance."""
        if self.is_world_process_zero():
            self._describe()
        return super().train(*args, **kwargs)

    def _describe(self) -> None:
        steps, batch, objective = self.args.gradient_accumulation_steps, self.negatives_batch, self.objective
        chance = objective.chance_loss(batch) if callable(getattr(objective, "chance_loss", None)) else None
        if self.run is not None:  # for the card and the report
            method = {"chance_loss": chance, "citation": getattr(objective, "citation", "")}
            self.run.record["method"] = {**method, "loss_parts": list(getattr(objective, "loss_parts", ()))}
        count = getattr(objective, "negatives", lambda rows: rows - 1)(batch)
        negatives = "" if count is None else f"negatives per anchor: {count}; "
        at_chance = f"; loss at chance {chance:.4f}" if chance is not None else ""
        logger.info("%seffective batch: %d%s", negatives, batch * steps, at_chance)
        if self.embed_batch_size is not None:
            why = f" (gradient_accumulation_steps={self._accumulated})" if self._accumulated > steps else ""
            rows = (self._train_batch_size, self.embed_batch_size)
            logger.info("each process has %d rows per step and embeds them in chunks of %d%s", *rows, why)
        if steps > 1 and getattr(objective, "couples_batch", True):
            logger.warning(
                "gradient_accumulation_steps=%d adds no negatives: each loss sees %d pairs, not %d",
                steps, batch, batch * steps,
            )  # fmt: skip

    def get_train_dataloader(self) -> Any:
        """As `Trainer.get_train_dataloader`; a batch that is embedded in chunks stays on the CPU."""
        loader = super().get_train_dataloader()
        if self.embed_batch_size is not None and isinstance(loader, DataLoaderShard):
            loader.device = None
        return loader

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """As `Trainer.training_step`, in chunks where `embed_batch_size` says so."""
        size = self.embed_batch_size
        if size is None or count_rows(inputs) <= size:
            loss = super().training_step(model, self.prepare(inputs), num_items_in_batch)
            stop_if_not_finite(loss, inputs, self)
            return loss
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers
            self.optimizer.train()
        output = cached_backward(
            self.objective,
            inputs,
            size,
            model=model,
            backward=lambda loss: self.accelerator.backward(loss / self.current_gradient_accumulation_steps),
            move=self._move,
            prepare=self.prepare,
            autocast=self.accelerator.autocast,
            no_sync=partial(self.accelerator.no_sync, model),
            check=not self._contract_checked,
        )
        self._contract_checked = True
        stop_if_not_finite(output.loss, inputs, self)
        self._keep_metrics(output.metrics)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return output.loss.detach() / self.current_gradient_accumulation_steps

    def _move(self, chunk: Mapping[str, Any]) -> dict[str, Any]:
        """A chunk on the device; from pinned memory the copy is asynchronous."""
        device = self.args.device
        return {
            name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for name, value in chunk.items()
        }

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.prediction_step`, of prepared inputs."""
        return super().prediction_step(model, self.prepare(inputs), *args, **kwargs)

    def prepare(self, inputs: Any, *, plain: bool = False) -> Any:
        """A batch on the device, with its views (`plain`: without augmentation) and the columns of the method."""
        batch = self._prepare_inputs(inputs)
        make = self.make_plain_views if plain else self.make_views
        batch = batch if make is None else make(batch)
        select = getattr(self.objective, "select_columns", None)
        return batch if plain or select is None else select(batch)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As `RecipeTrainer.create_scheduler`, with the constant rates of the method."""
        fresh = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if fresh:
            self.rates.hold(scheduler)
        return scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one micro-batch; its metrics are kept for the next log."""
        output = model(**inputs)
        if not hasattr(output, "loss"):
            raise ValueError(
                f"{type(self.objective).__name__}.loss returned {type(output).__name__}; return "
                "ObjectiveOutput(loss=..., metrics={...})"
            )
        if model.training:
            self._keep_metrics(output.metrics)
        return (output.loss, output) if return_outputs else output.loss

    def _keep_metrics(self, metrics: dict[str, Any] | None) -> None:
        for name, value in (metrics or {}).items():
            value = torch.as_tensor(value, dtype=torch.float32, device=self.args.device).detach().mean()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `RecipeTrainer.log`, with the objective's metrics since the last log."""
        if "loss" in logs:
            means = {name: total / self._counts[name] for name, total in self._sums.items()}
            for name, value in mean_over_ranks(means).items():  # every rank has the same names
                logs.setdefault(name, float(value))
            self._sums, self._counts = {}, {}
        super().log(logs, start_time)


def _chunked(objective: Any, args: TrainingArguments | None) -> TrainingArguments | None:
    """The arguments with accumulation turned into chunks, where the loss couples the rows of a batch."""
    if objective is None or args is None:
        return args
    couples = getattr(objective, "couples_batch", False)
    steps, rows = args.gradient_accumulation_steps, args.per_device_train_batch_size
    chunk = getattr(args, "embed_batch_size", None)
    if couples and args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process split each batch, and the loss with it; start one process a GPU "
            f"(torchrun --nproc-per-node {args.n_gpu} ...), or show one (CUDA_VISIBLE_DEVICES=0)"
        )
    if couples and args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size makes the batch smaller, and the negatives fewer; leave it out and give "
            f"--embed_batch_size, which saves memory at {rows} rows a batch"
        )
    if hasattr(objective, "check_accumulation"):
        objective.check_accumulation(steps, rows, chunk)
    if couples and steps > 1:
        args = copy.copy(args)  # the record keeps the flags as given
        args.per_device_train_batch_size, args.gradient_accumulation_steps = rows * steps, 1
        chunk = args.embed_batch_size = min(chunk or rows, rows)  # type: ignore[attr-defined]
    if chunk is None or chunk >= args.per_device_train_batch_size:
        return args
    if hasattr(objective, "check_chunks"):
        objective.check_chunks(chunk)
    if not hasattr(objective, "embed"):
        raise ValueError(f"embed_batch_size={chunk}: {type(objective).__name__} has no embed to run in chunks")
    optimizer = str(getattr(args.optim, "value", args.optim))
    for clash, remedy in (
        (args.torch_compile and "torch_compile", "compile the towers by themselves (torch.compile(model.backbone))"),
        (args.deepspeed and "deepspeed", "use DDP, or FSDP where the weights do not fit"),
        (optimizer in ("lomo", "adalomo") and f"optim={optimizer}", "use an optimizer that steps after the backward"),
    ):
        if clash:
            raise ValueError(
                f"{clash} and embed_batch_size={chunk} are mutually exclusive: a batch is embedded in several passes; "
                f"{remedy}, or leave embed_batch_size and gradient_accumulation_steps out"
            )
    return args
