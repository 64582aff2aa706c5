"""Memory and time of a training step: counted on fake tensors, and measured on a real step."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mllm_vision.training.callbacks.progress import LogLines


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process at the peak of a step; `activations` include gradients.

    Not counted: the program, loader processes, communication buffers, fragmentation.
    """

    weights: int
    optimizer: int
    activations: int
    batch: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.activations + self.batch

    def __str__(self) -> str:
        names = {"weights": "weights", "optimizer": "optimizer", "activations": "activations and gradients"}
        parts = [f"{name} {show_bytes(getattr(self, key))}" for key, name in {**names, "batch": "batch"}.items()]
        return f"{show_bytes(self.total)} ({', '.join(parts)})"


class PeakCounter(TorchDispatchMode):
    """Counts the bytes of tensors, real or fake, made inside it: `now` alive, `most` at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fake = any(isinstance(value, FakeTensor) for value in args)
        if fake and func is torch.ops.aten.nonzero.default:  # values are unknown: assume all
            made = args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        elif fake and func is torch.ops.aten._local_scalar_dense.default:  # assume the highest count
            return args[0].dtype == torch.bool or (1.0 if args[0].is_floating_point() else sys.maxsize)
        else:
            made = func(*args, **(kwargs or {}))
        known = {value.untyped_storage()._cdata for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        for value in tree_leaves(made):
            if isinstance(value, Tensor) and (key := value.untyped_storage()._cdata) not in known | self._alive.keys():
                self._watch(key, value.untyped_storage())
        return made

    def _watch(self, key: int, storage: Any) -> None:
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)


class FakeStep:
    """Steps of an objective on fake tensors: every operation runs, nothing is computed or allocated.

    Args:
        objective: an `Objective` (`embed` and `loss`) on its device; it is copied, unless it has fake tensors.
        batch: columns from the collator; other numbers of rows have the same shapes. Every text counts as long as the
            longest of them.
        optimizer: over the objective's parameters; not needed for `embed`.
        autocast: makes the context of a forward pass.
        averaged: an average of the weights is kept beside them (`ema_decay`).

    Raises:
        RuntimeError: from its methods, where the objective reads values of tensors.
    """

    def __init__(
        self,
        objective: nn.Module,
        batch: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer | None = None,
        autocast: Callable[[], Any] = contextlib.nullcontext,
        *,
        averaged: bool = False,
    ) -> None:
        self.averaged = averaged
        made_fake = getattr(next(objective.parameters()), "fake_mode", None)
        self.mode = made_fake or FakeTensorMode(allow_non_fake_inputs=True)
        self.objective: Any = objective
        self.optimizer = optimizer
        if made_fake is None:
            with FakeCopyMode(self.mode):
                self.objective, self.optimizer = copy.deepcopy((objective, optimizer))
        self.objective.train()
        self.like, self.autocast = batch, autocast

    @classmethod
    def of_run(cls, build: Callable[[Any], Any], arguments: Any, batch: Mapping[str, Tensor]) -> FakeStep:
        """With the model, optimizer and precision of the trainer that `build(arguments)` makes."""
        with tempfile.TemporaryDirectory() as folder:
            trainer = build(trial_arguments(arguments, folder, 2))
            optimizer = trainer.create_optimizer()
        half = torch.bfloat16 if arguments.bf16 else torch.float16
        mixed = arguments.bf16 or arguments.fp16
        autocast = functools.partial(torch.autocast, arguments.device.type, half, enabled=mixed)
        averaged = getattr(arguments, "ema_decay", None) is not None
        return cls(trainer.objective, batch, optimizer, autocast, averaged=averaged)

    def _batch(self, rows: int) -> dict[str, Tensor]:
        return {name: value.new_empty((rows, *value.shape[1:])) for name, value in self.like.items()}

    def embed(self, rows: int) -> int:
        """Bytes of activations at the peak of embedding `rows` with their backward pass."""
        with self.mode:
            batch = self._batch(rows)
            for value in self.objective.parameters():
                value.grad = torch.zeros_like(value) if value.requires_grad else None
            with PeakCounter() as count:
                self._backward(self._embed(batch))
        return int(count.most)

    def measure(self, rows: int, embedded: int | None = None) -> StepMemory:
        """The peak of the second of two steps of `rows`, in chunks of `embedded` where that is fewer."""
        assert self.optimizer is not None
        self.optimizer.state.clear()
        held = rows * sum(value[:1].nbytes for value in self.like.values())
        with self.mode, PeakCounter() as count:
            for _ in range(2):  # the first creates the state of the optimizer
                count.most = count.now
                self._step(self._batch(rows), rows, min(embedded or rows, rows))
                self.optimizer.step()
                self.optimizer.zero_grad()
        stored = [value.untyped_storage() for value in [*self.objective.parameters(), *self.objective.buffers()]]
        weights = sum({storage._cdata: storage.nbytes() for storage in stored}.values())
        state = sum(value.nbytes for value in tree_leaves(dict(self.optimizer.state)) if isinstance(value, Tensor))
        ahead = held if next(iter(self.like.values())).device.type == "cpu" else 0  # the loader's next batch
        return StepMemory(weights * (2 if self.averaged else 1), state, count.most - state - held, held + ahead)

    def _embed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with self.autocast():
            return self.objective.embed(**batch)

    @staticmethod
    def _backward(embeddings: dict[str, Tensor]) -> None:
        trained = [value for value in embeddings.values() if value.requires_grad]
        torch.autograd.backward(trained, [torch.empty_like(value) for value in trained])

    def _step(self, batch: dict[str, Tensor], rows: int, embedded: int) -> None:
        """As `gradient_cache.cached_backward`, with one replayed chunk for all."""
        chunk = {name: value[:embedded] for name, value in batch.items()}
        live = self._embed(chunk)
        cached = {
            name: value.new_empty((rows - embedded, *value.shape[1:])).requires_grad_(value.requires_grad)
            for name, value in live.items()
        }
        with self.autocast():
            loss = self.objective.loss({name: torch.cat([cached[name], live.pop(name)]) for name in cached}).loss
        loss.backward()
        del loss
        if embedded < rows:
            self.objective.replaying = True
            self._backward(self._embed(chunk))
            self.objective.replaying = False


# ---- a real step -----------------------------------------------------------------------------------------------


class MeasuredStep(NamedTuple):
    """A real step: rows, rows per second, and the peak of a GPU in bytes (None on a CPU)."""

    rows: int
    rate: float
    peak: int | None


def measure_step(build: Callable[[Any], Any], arguments: Any, rows: int, embedded: int | None = None) -> MeasuredStep:
    """Run two steps of `rows` rows with the trainer of `build(arguments)`; changes the weights.

    The rate is that of the second step, data included. Nothing is evaluated, saved, reported or uploaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(trial_arguments(arguments, folder, rows, embedded))
        trainer.remove_callback(LogLines)
        on_gpu = trainer.args.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        rates = [entry["samples_per_second"] for entry in trainer.state.log_history if "samples_per_second" in entry]
    return MeasuredStep(rows, rates[0] if rates else 0.0, torch.cuda.max_memory_allocated() if on_gpu else None)


def trial_arguments(arguments: Any, folder: str, rows: int, embedded: int | None = None) -> Any:
    """A copy of the arguments for two steps of `rows` rows that write nothing."""
    given = copy.copy(arguments)
    changed: dict[str, Any] = {
        "output_dir": folder, "max_steps": 2, "per_device_train_batch_size": rows, "gradient_accumulation_steps": 1,
        "embed_batch_size": embedded if embedded and embedded < rows else None, "logging_steps": 1,
        "logging_strategy": "steps", "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False,
        "push_to_hub": False, "report_to": [], "disable_tqdm": True, "dataloader_num_workers": 0,
        "resume": False, "resume_from_checkpoint": None, "save_minutes": None,
    }  # fmt: skip
    vars(given).update(changed)
    return given


def available_memory(device: torch.device) -> int:
    """Free bytes: of the GPU, or of the machine and its control group (Linux)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free


def show_bytes(count: float) -> str:
    """`1536` -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB" if count < 1000 else f"{count:.0f} TiB"
