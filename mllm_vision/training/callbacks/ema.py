"""The exponential moving average of the trained weights, in fp32, exact over a resume."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from mllm_vision.training.optim.optimizers import plain_name

logger = logging.getLogger(__name__)

FILE = "ema.safetensors"  # beside the weights in a checkpoint


class WeightAverage(TrainerCallback):
    """Averages the trainable weights after every optimizer step; at the end the model becomes the average.

    After step t: e = d e + (1 - d) w with d = min(decay, (1 + t) / (10 + t)). Running statistics of BatchNorm are
    averaged too; other buffers (queues, centres) are not. A checkpoint contains the trained weights, and the average in
    `ema.safetensors`. (`torch.optim.swa_utils.AveragedModel` copies the whole model, in its own precision.)

    Args:
        model: without the wrappers of DDP or torch.compile.
        decay: d, e.g. 0.999 for some thousand steps, 0.9999 for many.

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (1992); the warm-up as in
    TensorFlow's `ExponentialMovingAverage`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self._average: dict[str, Tensor] | None = None

    def _live(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        statistics = ("running_mean", "running_var")
        tensors |= {name: each for name, each in self.model.named_buffers() if name.rpartition(".")[2] in statistics}
        return {plain_name(name): tensor.detach() for name, tensor in tensors.items()}

    def resume(self, checkpoint: str | Path) -> None:
        """Load the average of a checkpoint.

        Raises:
            FileNotFoundError: the checkpoint contains no average.
            ValueError: it is the average of other weights.
        """
        path = Path(checkpoint) / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: the run was started without --ema_decay; resume it without, or start from scratch"
            )
        loaded, live = load_file(path), self._live()
        if loaded.keys() != live.keys():
            odd = sorted(loaded.keys() ^ live.keys())
            raise ValueError(
                f"{path} holds the average of other weights: {len(odd)} differ, e.g. {', '.join(odd[:3])}. "
                "Resume with the recipe the run was started with"
            )
        self._average = {name: loaded[name].to(tensor.device) for name, tensor in live.items()}

    def save(self, folder: str | Path) -> None:
        """Write the average into a checkpoint."""
        assert self._average is not None
        save_file({name: tensor.contiguous() for name, tensor in self._average.items()}, Path(folder) / FILE)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._average is None or state.global_step == 0:
            self._average = {name: tensor.float().clone() for name, tensor in self._live().items()}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        assert self._average is not None
        if getattr(optimizer, "step_was_skipped", False):
            return
        step = state.global_step
        decay = min(self.decay, (1 + step) / (10 + step))
        live = self._live()
        weights = [live[name].float() for name in self._average]
        torch._foreach_lerp_(list(self._average.values()), weights, 1 - decay)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, tensor in self._live().items():
            tensor.copy_(values[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model is the average; afterwards its weights are restored, bit for bit."""
        kept = {name: tensor.clone() for name, tensor in self._live().items()}
        self._put(self._average or kept)
        try:
            yield
        finally:
            self._put(kept)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._average is not None:
            self._put(self._average)
        logger.info("the model is now the average of its weights (ema_decay=%g)", self.decay)
