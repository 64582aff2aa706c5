"""SIGTERM and SIGUSR1 (preemption, end of a job): finish the step, save, exit with 143, on all ranks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.util import Finalize
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from mllm_vision.distributed import is_distributed

EXIT_CODE = 143  # 128 + SIGTERM
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_SAME = 1.0  # seconds within which torchrun repeats a signal


class Stopped(SystemExit):
    """A signal ended the training, with a checkpoint; no artifact is written."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class EvaluationCut(Exception):
    """A signal interrupted an evaluation; it is repeated on resuming."""


class StopSignals:
    """Inside `with`, the first SIGTERM or SIGUSR1 is recorded; a second one ends the process at once.

    Handlers of the program are kept, and nothing is done outside the main thread.

    Args:
        announce: what is finished after the signal, for a line on stderr; "" for no line.

    Attributes:
        received: the number of the first signal, or None.

    Raises:
        Stopped: at the end of the block, after a signal.
    """

    def __init__(self, announce: str = "") -> None:
        self.received: int | None = None
        self._since, self._announce, self._process = 0.0, announce, os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before in (signal.SIG_DFL, signal.SIG_IGN):
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if kind is None and self.received is not None:
            raise Stopped

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a forked data worker
            return
        if self.received is None:
            self.received, self._since = number, time.monotonic()
            if not os.environ.get("TORCHELASTIC_RUN_ID"):  # torchrun repeats the signal
                for each in self._before:  # the next one also ends a process in a collective
                    signal.signal(each, signal.SIG_DFL)
            if self._announce:
                name = signal.Signals(number).name
                line = f"{name}: {self._announce}, then this process ends; a second signal ends it at once\n"
                os.write(2, line.encode())
        elif time.monotonic() - self._since > _SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class AnyRank:
    """Whether any rank says yes: one number per call, and the same answer on every rank.

    With gloo it is the answer of this call, on an accelerator that of the call before: the host does not wait for the
    device.

    Args:
        device: of the process group's backend.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pending: tuple[torch.Tensor, Any] | None = None

    def __call__(self, yes: bool, *, now: bool = False) -> bool:
        """The answer; with `now` that of this call on any device."""
        if not is_distributed():
            return yes
        flag = torch.full((1,), int(yes), dtype=torch.int32, device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if now or self.device.type == "cpu":
            return bool(flag.item())
        host = torch.empty(1, dtype=torch.int32, pin_memory=True)
        host.copy_(flag, non_blocking=True)
        event = torch.Event(self.device)
        event.record()
        before, self._pending = self._pending, (host, event)
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0].item())


class StopAfterStep(TrainerCallback):
    """After a signal: log the step, save a checkpoint, exit. The last of all callbacks.

    An evaluation of this step is left to the next start, which begins with it.

    Args:
        trainer: an `ExactResume`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.stopping = trainer, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.evaluation_due:
            self.trainer.evaluate_what_is_due()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch_ends = state.global_step >= state.max_steps or float(state.epoch or 0.0).is_integer()
        if not epoch_ends:  # else the end of the epoch comes first
            self._stop_if_wanted(args, control, now=False)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_if_wanted(args, control, now=state.global_step >= state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopping:
            self.trainer.save_and_stop()

    def _stop_if_wanted(self, args: Any, control: Any, *, now: bool) -> None:
        if self.trainer.stop_wanted(now=now):
            saved = self.trainer.saved_at == self.trainer.state.global_step
            if saved and not (control.should_log or control.should_evaluate):
                self.trainer.save_and_stop()
            self.stopping, control.should_save = True, True
            args.save_only_model = False  # needed to resume
            if control.should_evaluate:
                control.should_evaluate, self.trainer.evaluation_due = False, True


def ignoring_signals(init: Callable[[int], Any] | None) -> Callable[[int], Any]:
    """`init` as a `worker_init_fn` of data workers that ignore signals: the current step needs them to finish."""
    global _ends_workers
    if _ends_workers != os.getpid():  # multiprocessing would send SIGTERM and wait forever
        _ends_workers = os.getpid()
        Finalize(None, _end_workers, exitpriority=100)
    return partial(_ignore_signals, init)


_ends_workers = 0


def _ignore_signals(init: Callable[[int], Any] | None, number: int) -> None:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    if init is not None:
        init(number)


def _end_workers() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for a killed worker
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    for worker in workers:
        worker.terminate()
    limit = time.monotonic() + 1.0
    for worker in workers:
        worker.join(max(0.0, limit - time.monotonic()))
        if worker.is_alive():
            worker.kill()
