"""What trains, at which rate, and the proof afterwards that nothing else moved (LoRA included)."""

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
    """Let only the groups in ``train`` take gradients; the others go to evaluation mode with ``model.train()``.

    Of the encoder, what does not reach the language model (layers above the selected one, the pooling head) stays
    frozen too: it would never get a gradient, and data-parallel training would wait for it.

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
    """Freeze the tower's parameters that no gradient reaches, as one blank image shows."""
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
    # GPT-2 calls its linear layers Conv1D. The names are taken from the language model, and the expression is
    # bound to it, because a plain list of suffixes would also hit the vision tower.
    linear: set[str] = set()
    other: set[str] = set()  # a router may be a Linear that gives more than one output, to which nothing can be added
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
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 by a name that is deprecated there
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        wrapped = get_peft_model(model, config)
    if train_encoder:
        _freeze_unused_encoder(model)
    return wrapped


def learning_rates(model: nn.Module, rates: Mapping[str, float | None]) -> dict[str, float]:
    """Parameter-name prefix -> learning rate, from group -> rate (None: the run's own), for ``RecipeTrainer``.

    Only groups that train are named. Works on the model and on the peft model around it.
    """
    prefixes: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        rate = rates.get(module_group(name))
        if rate is not None and parameter.requires_grad:
            parts = name.removeprefix("base_model.model.").split(".")  # what peft puts before every name
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
    """One row a module group: ``group``, ``parameters``, ``trainable`` (how many of them), ``learning_rate``.

    Args:
        model: the model, or the peft model around it.
        learning_rate: the run's rate, used by groups without their own.
        rates: group -> learning rate.
    """
    rows = []
    for group in GROUPS:
        total = trainable = 0
        for name, parameter in model.named_parameters():
            # peft keeps the projector as it was beside the copy that trains: not a part of the model
            if module_group(name) == group and ".original_module." not in name:
                total += parameter.numel()
                trainable += parameter.numel() * parameter.requires_grad
        own = (rates or {}).get(group)
        rate = (learning_rate if own is None else own) if trainable else 0.0
        rows.append({"group": group, "parameters": total, "trainable": trainable, "learning_rate": rate})
    return rows


class FreezeProof(ModuleAudit):
    """Hashes of every group before training; afterwards they tell what moved.

    Frozen and trainable tensors of a group are hashed apart, so that with LoRA the language model's own weights
    are proven untouched while its adapters move. A language model of 7B weights, frozen, is 14 GB in bf16: some 5 to
    25 s each time.

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
        """`close`, the table for people, and `check`."""
        print(audit_table(self.close(model, steps)), flush=True)
        self.check()
