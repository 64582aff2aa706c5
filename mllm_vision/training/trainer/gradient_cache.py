"""Gradient caching: the exact gradient of a big batch, with the memory of one chunk of it.

A contrastive loss couples the rows of a batch only through their small embeddings. The batch is embedded in chunks
without a graph, and the loss computed on all embeddings; then each chunk is embedded again, with a graph, and the
gradient of the loss with respect to its embeddings is propagated. The last chunk is embedded once.

Reference:
    Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", section 3
    (https://arxiv.org/abs/2101.06983).
"""

from __future__ import annotations

import contextlib
import logging
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger(__name__)


def cached_backward(
    objective: Any,
    batch: Mapping[str, Any],
    chunk_size: int,
    *,
    model: nn.Module | None = None,
    move: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    backward: Callable[[Tensor], Any] = torch.Tensor.backward,
    prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    autocast: Callable[[], Any] = contextlib.nullcontext,
    no_sync: Callable[[], Any] = contextlib.nullcontext,
    check: bool = False,
) -> Any:
    """One forward and backward pass of an objective over a batch, embedded in chunks.

    Adds to every parameter's `grad` what `objective(**batch).loss.backward()` adds, up to rounding. Random draws
    (dropout, dropped patches, augmentation in `embed`) are the same in both passes over a chunk; the random state
    afterwards is that of embedding every chunk once.

    Args:
        objective: an `Objective` in training mode: `embed` works row by row and has no side effects.
        batch: columns; tensors and lists with one entry per row are split, other values go to every chunk.
        chunk_size: rows embedded at once.
        model: the objective inside DDP or FSDP, whose hooks then see every pass; default the objective itself.
        backward: called with the loss (`accelerator.backward` scales it in fp16).
        move: to the device; applied to each chunk once and kept for its second pass.
        prepare: applied to each chunk before each of its passes: makes what is large, such as views.
        autocast: makes the context of each forward pass, separately: autocast caches casts of weights without a graph.
        no_sync: makes the context without gradient synchronisation; the last chunk runs outside of it.
        check: check the contract of `embed`, at the cost of a comparison per chunk.

    Returns:
        The `ObjectiveOutput` of the whole batch, after `backward`.

    Raises:
        ValueError: columns with different numbers of rows, embeddings that do not have one row per row, an `embed`
            that changes a buffer or is not deterministic (both with `check`).
    """
    passes = _Passes(objective, objective if model is None else model, prepare, autocast)
    chunks: list[Mapping[str, Any]] = list(split_rows(batch, chunk_size))
    with no_sync() if len(chunks) > 1 else contextlib.nullcontext():
        buffers = _versions(objective) if check else {}
        states, parts = _embed_first(passes, chunks, move)
        if check and parts:
            _check_buffers(objective, buffers, chunk_size)
        chunks[-1] = move(chunks[-1])
        output = passes.run(partial(_embed_last, objective, parts, count_rows(chunks[-1])), chunks[-1])
        backward(output.loss)
    if parts:
        _embed_again(passes, chunks, states, parts, no_sync, check)
    return output


def _embed_first(
    passes: _Passes, chunks: list[Mapping[str, Any]], move: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> tuple[list[RandomState], list[dict[str, Tensor]]]:
    """Embed all chunks but the last without a graph; the random state before each, and the embeddings."""
    states: list[RandomState] = []
    parts: list[dict[str, Tensor]] = []
    for number, chunk in enumerate(chunks[:-1]):
        chunk = chunks[number] = move(chunk)
        states.append(RandomState())
        # no_grad inside DDP's forward keeps the order of its collectives
        parts.append(_checked(passes.run(torch.no_grad()(passes.objective.embed), chunk), count_rows(chunk)))
    return states, parts


def _embed_last(objective: Any, parts: list[dict[str, Tensor]], rows: int, /, **columns: Any) -> Any:
    """Embed the last chunk with its graph; the loss of all chunks."""
    live = _checked(objective.embed(**columns), rows)
    for part in parts:
        for name in part:  # only what has a graph in the last chunk has a gradient in the others
            part[name] = part[name].detach().requires_grad_(live[name].requires_grad)
    return objective.loss({name: torch.cat([*(part[name] for part in parts), live[name]]) for name in live})


def _embed_again(
    passes: _Passes,
    chunks: list[Mapping[str, Any]],
    states: list[RandomState],
    parts: list[dict[str, Tensor]],
    no_sync: Callable[[], Any],
    check: bool,
) -> None:
    """Embed all chunks but the last again, and propagate the gradients of the loss."""
    after = RandomState()
    passes.objective.replaying = True
    try:
        with _kept_statistics(passes.objective):
            for number, (state, part) in enumerate(zip(states, parts, strict=True)):
                last = part is parts[-1]
                state.restore()
                with contextlib.nullcontext() if last else no_sync():
                    passes.replay(chunks[number], part, touch=last, check=check)
                part.clear()
                chunks[number] = {}
    finally:
        passes.objective.replaying = False
        after.restore()


class RandomState:
    """A snapshot of the global random generators of Python, numpy (where loaded) and torch."""

    def __init__(self) -> None:
        numpy = sys.modules.get("numpy")
        self._python = random.getstate()
        self._numpy = None if numpy is None else numpy.random.get_state()
        self._torch = torch.get_rng_state()
        device = _device_module()
        self._device = None if device is None else device.get_rng_state()

    def restore(self) -> None:
        """Continue from the snapshot."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._device is not None:
            _device_module().set_rng_state(self._device)


def count_rows(batch: Mapping[str, Any]) -> int:
    """Rows of a batch: the common length of its columns, or 0.

    Raises:
        ValueError: columns of different lengths.
    """
    lengths = {name: len(value) for name, value in batch.items() if _has_rows(value)}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(
            f"the columns of a batch differ in their number of rows ({counts}), so it cannot be embedded in chunks; "
            "give each column one entry a row (two views as [B, 2, ...]), or leave embed_batch_size out"
        )
    return next(iter(lengths.values()), 0)


def split_rows(batch: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
    """The batch in chunks of `size` rows, the last one perhaps smaller; tensors are views."""
    rows = count_rows(batch)
    return [
        {name: value[start : start + size] if _has_rows(value) else value for name, value in batch.items()}
        for start in range(0, max(rows, 1), size)
    ]


class _Passes:
    """Runs functions as the objective's forward, inside the wrappers and hooks of DDP and FSDP."""

    def __init__(self, objective: Any, model: nn.Module, prepare: Any, autocast: Callable[[], Any]) -> None:
        self.objective, self.model, self.autocast = objective, model, autocast
        self.prepare = prepare if prepare is not None else dict

    def run(self, function: Callable[..., Any], chunk: Mapping[str, Any]) -> Any:
        before = self.objective.__dict__.get("forward")  # set by accelerate for mixed precision
        self.objective.forward = function
        try:
            with self.autocast():
                return self.model(**self.prepare(chunk))
        finally:
            if before is None:
                del self.objective.forward
            else:
                self.objective.forward = before

    def replay(self, chunk: Mapping[str, Any], part: Mapping[str, Tensor], *, touch: bool, check: bool) -> None:
        """Embed a chunk with its graph and propagate the kept gradients."""
        kept = {name: value for name, value in part.items() if value.grad is not None}

        def embed(**columns: Any) -> dict[str, Tensor]:
            again = self.objective.embed(**columns)
            return {name: again[name] for name in kept} | self._touched(touch)

        again = self.run(embed, chunk)
        if check:
            _check_replay(kept, again)
        if again:
            gradients = [kept[name].grad if name in kept else None for name in again]
            torch.autograd.backward(list(again.values()), gradients)

    def _touched(self, touch: bool) -> dict[str, Tensor]:
        """A zero that depends on every parameter with a gradient, for the pass that DDP synchronises.

        DDP averages a gradient when the backward pass reaches its parameter; the embeddings of a chunk do not depend on
        parameters of the loss (logit scale, head).
        """
        if not touch or not isinstance(self.model, DistributedDataParallel):
            return {}
        reached = [value for value in self.objective.parameters() if value.requires_grad and value.grad is not None]
        return {"": torch.stack([value.sum().float() for value in reached]).sum() * 0} if reached else {}


def _device_module() -> Any:
    if not torch.accelerator.is_available():
        return None
    return torch.get_device_module(torch.accelerator.current_accelerator())


def _has_rows(value: Any) -> bool:
    return value.ndim > 0 if isinstance(value, Tensor) else isinstance(value, (list, tuple))


def _checked(embeddings: Any, rows: int) -> dict[str, Tensor]:
    for name, value in embeddings.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != rows:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"embed gave {name!r} as {found} for {rows} rows; return one row per row of the batch "
                "(what couples rows belongs in loss)"
            )
    return dict(embeddings)


@contextlib.contextmanager
def _kept_statistics(objective: nn.Module) -> Iterator[None]:
    """Running statistics of BatchNorm inside `embed` count each row once."""
    norms = [module for module in objective.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for module in norms:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in norms:
            module.track_running_stats = True


def _versions(objective: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (id(buffer), buffer._version) for name, buffer in objective.named_buffers()}


def _check_buffers(objective: nn.Module, before: dict[str, tuple[int, int]], chunk_size: int) -> None:
    changed = [name for name, version in _versions(objective).items() if before.get(name) != version]
    norms = {name for name, module in objective.named_modules() if isinstance(module, _BatchNorm)}
    others = [name for name in changed if name.rpartition(".")[0] not in norms]
    if others:
        raise ValueError(
            f"embed of {type(objective).__name__} changed the buffer {others[0]!r}; gradient caching calls it "
            "twice for a row; update buffers in after_step"
        )
    if changed:
        names = sorted({name.rpartition(".")[0] for name in changed})
        logger.warning(
            "%d BatchNorm layers run inside embed (%s): each normalises with the statistics of its chunk of %d rows, "
            "as it would with those of one rank, and not of the whole batch",
            len(names), names[0], chunk_size,
        )  # fmt: skip


@torch.no_grad()
def _check_replay(kept: Mapping[str, Tensor], again: Mapping[str, Tensor]) -> None:
    for name, value in kept.items():
        apart = (again[name].float() - value.float()).norm() / value.float().norm().clamp_min(1e-12)
        allowed = 1e-3 if value.dtype in (torch.float32, torch.float64) else 2e-2
        if bool(apart > allowed):
            raise ValueError(
                f"embed returned different values of {name!r} in the second pass (relative difference "
                f"{float(apart):.2g}), so gradient caching would be wrong: draw from the global random state (not "
                "from a separate generator) and do not change any state"
            )
