"""Activation checkpointing of the towers inside a method."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel


def checkpoint_towers(module: nn.Module, kwargs: dict[str, Any] | None = None, **settings: Any) -> None:
    """Each trained tower computes its layers again in the backward pass; the Trainer asks an objective for it.

    Args:
        module: whose transformers models are checkpointed, a teacher's not included.
        kwargs: for `torch.utils.checkpoint.checkpoint`.
        settings: `every_n_layers` and `offload`, as in `PreTrainedModel.activation_checkpointing_enable`.

    Raises:
        ValueError: a tower whose layers cannot be computed again, or whose BatchNorm would count every batch twice.
    """
    models = [each for each in module.modules() if isinstance(each, PreTrainedModel)]
    inner = {child for model in models for child in model.modules() if child is not model}
    towers = [model for model in models if model not in inner and any(p.requires_grad for p in model.parameters())]
    for tower in towers:
        name = type(tower).__name__
        norms = any(isinstance(each, _BatchNorm) for each in tower.modules())
        if norms or not tower.supports_gradient_checkpointing:
            why = "its BatchNorm would count every batch twice" if norms else "transformers cannot do it there"
            raise ValueError(
                f"activation checkpointing of {name}: {why}; leave --activation_checkpointing out, and where "
                "memory is short take a smaller --per_device_train_batch_size, --bf16, or more processes"
            )
        tower.activation_checkpointing_enable(kwargs, **settings)
