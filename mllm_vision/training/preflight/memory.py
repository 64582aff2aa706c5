"""How much memory a training step takes: estimated from the model, and measured on a step that is run."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import re
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PrinterCallback, TrainerCallback

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process needs at the peak of a step.

    `rows` are its rows of the batch and `embedded` those whose activations are there at once (fewer with gradient
    caching). `batch` is what the model takes, and the decoded images it is made from where no loader process makes
    it. Neither the program itself nor loader processes are in it.
    """

    rows: int
    embedded: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    batch: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.batch

    def __str__(self) -> str:
        names = ("weights", "gradients", "optimizer", "activations", "batch")
        parts = ", ".join(f"{name} {show_bytes(getattr(self, name))}" for name in names)
        return f"{show_bytes(self.total)} ({parts})"


@dataclass
class StepCost:
    """What one row costs, found by embedding a few; `at(rows, embedded)` is the estimate for a batch."""

    weights: int
    gradients: int
    optimizer: int
    row_activations: float
    fixed_activations: float
    row_batch: float

    def at(self, rows: int, embedded: int | None = None) -> MemoryEstimate:
        """The estimate for `rows` of a process, `embedded` of them at once (all of them by default)."""
        embedded = min(rows, embedded or rows)
        activations = self.fixed_activations + self.row_activations * embedded
        batch = self.row_batch * rows
        figures = (self.weights, self.gradients, self.optimizer, int(activations), int(batch))
        return MemoryEstimate(rows, embedded, *figures)

    def rows_within(self, limit: int, rows: int) -> int:
        """The largest power of two to embed at once so that a batch of `rows` stays within `limit` bytes; 0 if none."""
        fitting = [1 << power for power in range(rows.bit_length()) if self.at(rows, 1 << power).total <= limit]
        return max(fitting, default=0)


@dataclass
class MeasuredStep:
    """A step that was run: its time, its peak in bytes (None where it cannot be told), and what it logged."""

    rows: int
    seconds: float
    peak: int | None
    logs: dict[str, float] = field(default_factory=dict)


def estimate_step(
    objective: nn.Module,
    batch: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    image_bytes: float = 0.0,
    autocast: Callable[[], Any] = contextlib.nullcontext,
    averaged: bool = False,
) -> StepCost:
    """What a step costs, without running it: parameters are counted, and a few rows embedded forth and back.

    Activations are the most bytes of tensors that are alive in the two passes, counted for two numbers of rows: one
    gives the cost of a row, the other what does not grow with the batch.

    Args:
        objective: an `Objective` on its device.
        batch: columns of at least two rows, of the shapes that training will see.
        optimizer: its state is found by stepping one like it over small parameters; two fp32 values a weight without.
        image_bytes: of one decoded image, where the training process decodes them itself.
        autocast: makes the context of the forward pass.
        averaged: an average of the weights is kept beside them (`ema_decay`).

    Raises:
        ValueError: fewer than two rows.
    """
    rows = min(len(next(iter(batch.values()))), 16)
    if rows < 2:
        raise ValueError(f"estimate_step needs two rows or more, got {rows}")
    trained = [value for value in objective.parameters() if value.requires_grad]
    kept = {value.untyped_storage().data_ptr(): value for value in [*objective.parameters(), *objective.buffers()]}
    small, large = (_most_alive(objective, trained, batch, number, autocast) for number in (rows // 2, rows))
    each = (large - small) / (rows - rows // 2)
    made = sum(value[:1].numel() * value.element_size() for value in batch.values())
    weights = sum(value.untyped_storage().nbytes() for value in kept.values())
    return StepCost(
        weights=weights * (2 if averaged else 1),
        gradients=sum(value.numel() * value.element_size() for value in trained),
        optimizer=_optimizer_bytes(optimizer, trained),
        row_activations=each,
        fixed_activations=max(0.0, large - each * rows),
        row_batch=2 * made + image_bytes,  # the loader makes the next batch before this one is used
    )


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, while they live; `most` is the highest count."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {value.untyped_storage()._cdata for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._storages and storage._cdata not in before and storage.nbytes():
                    self._watch(storage)
        return made

    def _watch(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: Any) -> None:
            self.now -= size
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def _most_alive(
    objective: Any, trained: list[nn.Parameter], batch: Mapping[str, Tensor], rows: int, autocast: Callable[[], Any]
) -> int:
    """The most bytes of activations while the first `rows` are embedded forth and back; leaves no gradients."""
    given = {name: value[:rows].clone() for name, value in batch.items()}
    before, was_training = [value.grad for value in trained], objective.training
    for value in trained:
        value.grad = torch.zeros_like(value)  # to be added to in place: gradients are counted by themselves
    objective.train()
    devices = [value.device for value in given.values() if value.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices), _Alive() as alive:
        with autocast():
            embeddings = objective.embed(**given)
        sum(value.float().sum() for value in embeddings.values() if value.requires_grad).backward()
    objective.train(was_training)
    for value, grad in zip(trained, before):
        value.grad = grad
    return alive.most


def _optimizer_bytes(optimizer: torch.optim.Optimizer | None, trained: list[Tensor]) -> int:
    """Bytes of the state of `optimizer`, found by stepping one like it over an 8 x 8 weight and a vector a group."""
    if optimizer is None:
        return sum(8 * value.numel() for value in trained)
    total = 0.0
    with torch.random.fork_rng(devices=[]):
        for group in optimizer.param_groups:
            settings = {name: value for name, value in group.items() if name not in ("params", "initial_lr")}
            for several in (True, False):
                numel = sum(value.numel() for value in group["params"] if (value.ndim > 1) == several)
                if not numel:
                    continue
                probe = nn.Parameter(torch.randn(8, 8) if several else torch.randn(8))
                probe.grad = torch.randn_like(probe)
                try:
                    like = type(optimizer)([{**settings, "params": [probe]}], lr=1e-3)
                    like.step()
                    state = [value for value in like.state[probe].values() if isinstance(value, Tensor)]
                    share = sum(value.nbytes for value in state if value.numel() > 1) / probe.numel()
                except (TypeError, ValueError, RuntimeError, KeyError):  # an optimizer with a shape of its own
                    share = 8.0
                total += share * numel
    return int(total)


def measure_step(build: Callable[[Any], Any], arguments: Any, rows: int, embedded: int | None = None) -> MeasuredStep:
    """Runs two steps of `rows` rows with the trainer that `build(arguments)` makes; changes the weights.

    The peak is that of the training above what the process held before, plus the weights: torch's own count on a
    GPU, the resident set on Linux, None elsewhere. The time is that of the second step, data included.

    Args:
        build: makes the trainer; its model is on the CPU when nothing else was said.
        arguments: the run's; evaluation, checkpoints, reports and uploads are switched off in a copy.
        rows: rows of the process in a step.
        embedded: rows embedded at once, when fewer.
    """
    with tempfile.TemporaryDirectory() as folder:
        for size in (min(rows, 2), rows):  # first a small one: what is loaded and set up once is not the step's
            trainer = build(trial_arguments(arguments, folder, size, embedded))
            trainer.remove_callback(PrinterCallback)
            if size < rows:
                trainer.train()
        clock = _Clock()
        trainer.add_callback(clock)
        weights = {value.untyped_storage().data_ptr(): value for value in trainer.model.parameters()}
        held = sum(value.untyped_storage().nbytes() for value in weights.values())
        with peak_memory(trainer.args.device) as peak:
            trainer.train()
        logs = next((entry for entry in trainer.state.log_history if "loss" in entry), {})
    return MeasuredStep(rows, clock.seconds, None if peak.bytes is None else peak.bytes + held, dict(logs))


def trial_arguments(arguments: Any, folder: str, rows: int, embedded: int | None = None) -> Any:
    """A copy of the arguments of a run for two steps of `rows` rows that leave nothing behind."""
    given = copy.copy(arguments)
    changed: dict[str, Any] = {
        "output_dir": folder, "max_steps": 2, "per_device_train_batch_size": rows, "gradient_accumulation_steps": 1,
        "embed_batch_size": embedded if embedded and embedded < rows else None, "logging_steps": 1,
        "logging_strategy": "steps", "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False,
        "push_to_hub": False, "report_to": [], "disable_tqdm": True, "dataloader_num_workers": 0,
        "resume": False, "resume_from_checkpoint": None, "save_minutes": None,
    }  # fmt: skip
    for name, value in changed.items():
        setattr(given, name, value)
    return given


class _Clock(TrainerCallback):
    """The time from the end of the first step to that of the second."""

    def __init__(self) -> None:
        self.seconds, self._first = 0.0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        now = time.perf_counter()
        self.seconds, self._first = now - self._first, now


@dataclass
class Peak:
    """`bytes` above what was held before; None where the system does not tell."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device | None = None) -> Iterator[Peak]:
    """The peak of memory inside the `with` block, above what was held before it."""
    peak = Peak()
    gc.collect()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # pages that were freed but kept would hide what is allocated in them
    start = _resident("VmRSS")
    known = start is not None
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")
    known = known and (_resident("VmHWM") or 0) <= 1.1 * (start or 0)  # else the mark was not reset
    yield peak
    top = _resident("VmHWM")
    if known and start is not None and top is not None:
        peak.bytes = max(0, top - start)


def _resident(name: str) -> int | None:
    try:
        match = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.M)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def available_memory(device: torch.device | None = None) -> int | None:
    """Bytes that a process can still take: of the GPU, or of the machine and its control group (Linux)."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    with contextlib.suppress(OSError, ValueError):
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
        if match:
            found.append(int(match[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(found, default=None)


def autocast(device: torch.device, *, bf16: bool = False, fp16: bool = False) -> Callable[[], Any]:
    """The context of a forward pass in mixed precision, as the Trainer makes it."""
    if not (bf16 or fp16):
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16 if bf16 else torch.float16)


def decoded_bytes(rows: Sequence[Mapping[str, Any]]) -> float:
    """The mean size of the decoded images of some rows, three bytes a pixel."""
    return sum(3 * row["image"].width * row["image"].height for row in rows) / max(len(rows), 1)


def show_bytes(count: float) -> str:
    """`1536` -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
