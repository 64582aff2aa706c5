"""Freezing, LoRA and learning rates by module group, and the check that frozen weights did not change."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllm_vision.modules.audit import ModuleAudit, audit_table
from mllm_vision.vlm.model import VisionLanguageModel

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

GROUPS = ("encoder", "projector", "language_model")
PROJECTOR = "multi_modal_projector"


def module_group(name: str) -> str:
    """The group of a parameter, by its name: "encoder", "projector" or "language_model" (its head included)."""
    if "vision_tower." in name:
        return "encoder"
    return "projector" if f"{PROJECTOR}." in name else "language_model"


def freeze(model: VisionLanguageModel, train: Iterable[str] = ("projector",)) -> VisionLanguageModel:
    """Trains only the groups in ``train``; ``model.train()`` keeps the others in evaluation mode.

    Unused parts of the encoder (layers above the selected one, the pooling head) stay frozen too: without a gradient
    they would make data-parallel training fail.

    Args:
        model: before any LoRA adapters are added.
        train: some of "encoder", "projector", "language_model".

    Raises:
        ValueError: an unknown group, or none at all.
    """
    wanted = set(train)
    if not wanted or wanted - set(GROUPS):
        raise ValueError(f"train={sorted(wanted)}: name one or more of {', '.join(GROUPS)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(module_group(name) in wanted)
    if "encoder" in wanted:
        _freeze_unused_encoder(model)
    return model


def _freeze_unused_encoder(model: VisionLanguageModel) -> None:
    """Freezes the tower's parameters without gradient, found with a blank image."""
    tower = model.model.vision_tower
    learning = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    was_training = model.training
    with torch.enable_grad():
        total = model.eval().blank_image()
        gradients = torch.autograd.grad(total, learning, allow_unused=True)
    model.train(was_training)
    for parameter, gradient in zip(learning, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def add_lora(
    model: VisionLanguageModel, *, rank: int = 16, alpha: int = 32, dropout: float = 0.0, train_encoder: bool = False
) -> PeftModel:
    """LoRA (arXiv:2106.09685) on every linear layer of the language model; the projector trains in full.

    Args:
        model: the model; its weights are frozen by peft.
        rank, alpha, dropout: of the adapters (LLaVA-1.5: 128, 256, 0.05 for 7B).
        train_encoder: train the vision tower's own weights too.

    Raises:
        ValueError: a rank below 1, or a language model without linear layers.
    """
    from peft import LoraConfig, get_peft_model

    if rank < 1:
        raise ValueError(f"lora_rank={rank} must be at least 1")
    # GPT-2 calls its linear layers Conv1D. A plain list of suffixes would also match the vision tower.
    linear: set[str] = set()
    other: set[str] = set()  # such as a router subclass of Linear with several outputs
    for name, module in model.model.language_model.named_modules():
        plain = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
        (linear if plain else other).add(name.rpartition(".")[2])
    leaves = linear - other
    if not leaves:
        raise ValueError(f"{type(model.model.language_model).__name__} has no linear layers for LoRA; use --train full")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=rf".*language_model\..*\.({'|'.join(sorted(map(re.escape, leaves)))})",
        modules_to_save=[PROJECTOR] + (["vision_tower"] if train_encoder else []),
    )
    with warnings.catch_warnings():  # peft 0.21 uses a name that transformers 5.23 deprecates
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        wrapped = get_peft_model(model, config)
    if train_encoder:
        _freeze_unused_encoder(model)
    return wrapped


def learning_rates(model: nn.Module, rates: Mapping[str, float | None]) -> dict[str, float]:
    """Parameter-name prefix -> learning rate of trained groups, from group -> rate (None: the run's).

    Accepts the model or the peft model around it.
    """
    prefixes: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        rate = rates.get(module_group(name))
        if rate is not None and parameter.requires_grad:
            parts = name.removeprefix("base_model.model.").split(".")  # peft's prefix
            prefixes[parts[0] if parts[0] == "lm_head" else ".".join(parts[:2])] = rate
    return prefixes


def _groups(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Parameters and saved buffers by group; tied weights count once."""
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            groups[module_group(name)][name] = tensor
    return groups


def audit(
    model: nn.Module, learning_rate: float, rates: Mapping[str, float | None] | None = None
) -> list[dict[str, Any]]:
    """One row per module group: ``group``, ``parameters``, ``trainable`` (number of parameters), ``learning_rate``.

    Args:
        model: the model, or the peft model around it.
        learning_rate: the run's rate, used by groups without their own.
        rates: group -> learning rate.
    """
    rows = []
    for group in GROUPS:
        total = trainable = 0
        for name, parameter in model.named_parameters():
            # peft keeps a copy of the original projector, which is not part of the model
            if module_group(name) == group and ".original_module." not in name:
                total += parameter.numel()
                trainable += parameter.numel() * parameter.requires_grad
        own = (rates or {}).get(group)
        rate = (learning_rate if own is None else own) if trainable else 0.0
        rows.append({"group": group, "parameters": total, "trainable": trainable, "learning_rate": rate})
    return rows


class FreezeProof(ModuleAudit):
    """Hashes every group before and after training to prove which weights changed.

    Frozen and trainable tensors of a group are hashed separately, so that with LoRA the language model's own weights
    are proven unchanged. Hashing a frozen 7B language model (14 GB in bf16) takes 5 to 25 s.

    Example: ``proof = FreezeProof(model, rows)``, train, ``rows = proof.close(model)``, save, ``proof.check()``.

    Args:
        model: the model, or the peft model around it.
        rows: of `audit`.
    """

    def __init__(self, model: nn.Module, rows: Iterable[Mapping[str, Any]]) -> None:
        super().__init__(_groups(model), rows=rows, prove=True)

    def close(self, model: Any, steps: Any = None) -> list[dict[str, Any]]:  # type: ignore[override]
        """As `ModuleAudit.close`, of the model as trained; call before LoRA is merged."""
        return super().close(_groups(model), steps)

    def verify(self, model: nn.Module, steps: Any = None) -> None:
        """`close`, prints the table, and `check`."""
        print(audit_table(self.close(model, steps)), flush=True)
        self.check()
