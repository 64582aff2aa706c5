"""Timing side by side: what every benchmark of this folder measures with.

Contenders run in turn, round after round, so that a machine that slows down slows all of them; ratios are taken
round by round and their median is told with the lowest and highest. Times without a rival beside them say little.

    results = side_by_side({"plain": run_plain, "ours": run_ours}, rounds=5)
    ratio(results["ours"], results["plain"])          # Ratio(median, low, high)
    peak_memory(run_ours)                             # bytes above what the process held before
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Timing:
    """Seconds of every round of one contender."""

    name: str
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        return min(self.seconds)

    @property
    def high(self) -> float:
        return max(self.seconds)

    def __str__(self) -> str:
        return f"{show_seconds(self.median)} ({show_seconds(self.low)} to {show_seconds(self.high)})"


@dataclass
class Ratio:
    """Median, lowest and highest over the rounds of one contender's time by another's."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


def side_by_side(
    contenders: dict[str, Callable[[], Any]],
    *,
    rounds: int = 5,
    warmup: int = 1,
    synchronize: Callable[[], Any] | None = None,
) -> dict[str, Timing]:
    """Runs the contenders in turn and times each run.

    Args:
        contenders: name to function without arguments; what it returns is thrown away outside the timing.
        rounds: timed runs of each contender.
        warmup: runs of each before, not timed.
        synchronize: waits for work in flight, before and after each run; by default for every GPU in use.

    Returns:
        Name to `Timing`, every one with `rounds` entries.
    """
    wait = synchronize or _synchronize
    names = list(contenders)
    for name in names * warmup:
        contenders[name]()
    results = {name: Timing(name) for name in names}
    collecting = gc.isenabled()
    gc.disable()  # a collection would be charged to whoever runs when it comes
    try:
        for round_ in range(rounds):
            gc.collect()
            first = round_ % len(names)
            for name in names[first:] + names[:first]:  # nobody is always the one after the same neighbour
                wait()
                start = time.perf_counter()
                kept = contenders[name]()
                wait()
                results[name].seconds.append(time.perf_counter() - start)
                del kept
    finally:
        if collecting:
            gc.enable()
    return results


def ratio(ours: Timing, theirs: Timing) -> Ratio:
    """Time of `ours` by that of `theirs`, round by round; below one, ours is faster."""
    each = [a / b for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))


def speedup(ours: Timing, theirs: Timing) -> Ratio:
    """How many times as fast as `theirs` `ours` is, round by round; above one, ours is faster."""
    return ratio(theirs, ours)


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes that a run needs above what the process held before it.

    With a GPU in use: torch's own count of it. Else the highest resident set of the process while it runs (Linux;
    elsewhere sampled every millisecond), with freed memory given back to the system first.
    """
    torch = _torch_on_gpu()
    if torch is not None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = function()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident set starts anew from here
    except OSError:
        return _sampled_peak(function)
    before = resident()
    kept = function()
    peak = _status("VmHWM")
    del kept
    return max(0, peak - before)


def resident() -> int:
    """Bytes of this process's resident set."""
    return _status("VmRSS")


def header() -> str:
    """One line: what ran where, without the machine's or a person's name."""
    parts = [f"Python {platform.python_version()}", platform.machine(), f"{os.cpu_count()} cores"]
    with suppress(ImportError):
        import torch

        parts.insert(1, f"torch {torch.__version__}")
        parts.append(f"{torch.get_num_threads()} threads")
        if torch.cuda.is_available():
            parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def show_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def show_bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def table(titles: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table, padded so that it also reads well as it is."""
    lines = [[str(cell) for cell in row] for row in [titles, *rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _status(key: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        import psutil

        return int(psutil.Process().memory_info().rss)
    for line in status.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _sampled_peak(function: Callable[[], Any]) -> int:
    before = highest = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        kept = function()
        highest = max(highest, resident())
        del kept
    finally:
        done.set()
        watcher.join()
    return highest - before


def _torch_on_gpu() -> Any:
    import sys

    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None


def _synchronize() -> None:
    torch = _torch_on_gpu()
    if torch is not None:
        torch.cuda.synchronize()
