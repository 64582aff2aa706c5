"""A NaN or infinite loss ends the training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mllm_vision.training.checkpoint.checkpoints import is_whole, list_checkpoints


def stop_if_not_finite(loss: torch.Tensor, batch: Mapping[str, Any], trainer: Any) -> None:
    """Raise where the loss is NaN or infinite, before the optimizer step.

    Saves the batch in the run folder (`bad_batch-step<n>-rank<r>.safetensors`), and names the last finite checkpoint.

    Args:
        loss: of this micro-batch.
        batch: from the collator.
        trainer: its state gives the step.

    Raises:
        ValueError: the loss is not finite.
    """
    value = float(loss.detach())
    if math.isfinite(value):
        return
    args, step = trainer.args, trainer.state.global_step + 1
    folder = Path(args.output_dir)
    file = folder / f"bad_batch-step{step}-rank{args.process_index}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in batch.items() if torch.is_tensor(v)}, file)
        saved = f"the batch is in {file}"
    except OSError as error:
        saved = f"the batch could not be saved ({error})"
    good = last_finite_checkpoint(folder)
    remedy = f"--resume_from_checkpoint {good}" if good else "there is no checkpoint to resume from: start from scratch"
    rate = trainer.optimizer.param_groups[0]["lr"] if trainer.optimizer is not None else args.learning_rate
    raise ValueError(
        f"the loss is {value} at step {step} (learning rate {rate:.3g}); the step was not taken. "
        f"The last good checkpoint: {good or 'none'}; {saved}. Continue with a lower --learning_rate, a longer "
        f"--warmup_steps or --max_grad_norm 1 ({remedy}); in half precision try --bf16 instead of --fp16"
    )


def last_finite_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint whose weights are all finite."""
    for checkpoint in reversed(list_checkpoints(folder)) if folder.is_dir() else ():
        if is_whole(checkpoint) and all(_finite(file) for file in checkpoint.glob("*.safetensors")):
            return checkpoint
    return None


def _finite(file: Path) -> bool:
    with safe_open(file, framework="pt") as weights:
        names = list(weights.keys())
        return all(bool(torch.isfinite(weights.get_tensor(name).float()).all()) for name in names)
