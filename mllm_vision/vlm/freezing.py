"""Which module groups train, in full or by adapters, at which rates, and the proof that frozen weights stay."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mllm_vision.modules.audit import ModuleAudit, audit_table
from mllm_vision.vlm.systems.base import GROUPS
from mllm_vision.vlm.task import LanguageTask

logger = logging.getLogger(__name__)
WAYS = ("full", "lora", "dora")


def read_groups(train: Iterable[str]) -> dict[str, str]:
    """What ``--train`` says: module group -> "full", "lora" or "dora".

    Args:
        train: entries ``group`` (in full) or ``group=way``, as in ``connector language_model=lora``.

    Raises:
        ValueError: no group at all, an unknown group or way, or a group named twice.
    """
    found: dict[str, str] = {}
    for entry in train:
        group, _, way = entry.partition("=")
        if group not in GROUPS or (way or "full") not in WAYS:
            raise ValueError(
                f"train={entry}: use GROUP or GROUP=WAY; groups: {', '.join(GROUPS)}; ways: {', '.join(WAYS)}"
            )
        if group in found:
            raise ValueError(f"train={entry}: {group} is named twice")
        found[group] = way or "full"
    if not found:
        raise ValueError(f"train names no module group, so nothing would train; groups: {', '.join(GROUPS)}")
    return found


def freeze(
    task: LanguageTask,
    train: Iterable[str] = ("connector",),
    *,
    rank: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
) -> LanguageTask:
    """Trains only the groups in ``train``; ``task.train()`` keeps the others in evaluation mode.

    Unused parts of the encoder (layers above the selected one, the pooling head) stay frozen too: without a gradient
    they would make data-parallel training fail.

    Args:
        task: before any adapters are added.
        train: see `read_groups`. LoRA (arXiv:2106.09685) and DoRA (arXiv:2402.09353) adapt every linear layer of a
            group.
        rank, alpha, dropout: of the adapters (LLaVA-1.5: 128, 256, 0.05 for 7B).

    Raises:
        ValueError: see `read_groups`; a rank below 1; adapters for a group without linear layers.
    """
    groups = read_groups(train)
    for name, parameter in task.model.named_parameters():
        parameter.requires_grad_(groups.get(task.system.parts.group_of(name)) == "full")
    if groups.get("encoder") == "full":
        _freeze_unused_encoder(task)
    adapted = {group: way for group, way in groups.items() if way != "full"}
    if adapted:
        _add_adapters(task, adapted, rank, alpha, dropout)
    return task


def _freeze_unused_encoder(task: LanguageTask) -> None:
    """Freezes the encoder's parameters without gradient, found with a blank image."""
    parts = task.system.parts.modules(task.model, "encoder")
    learning = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
    was_training = task.training
    with torch.enable_grad():
        gradients = torch.autograd.grad(task.eval().blank_image(), learning, allow_unused=True)
    task.train(was_training)
    for parameter, gradient in zip(learning, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def _add_adapters(task: LanguageTask, groups: Mapping[str, str], rank: int, alpha: int, dropout: float) -> None:
    """Puts adapters on the linear layers of the groups, in place; ``task.adapters`` saves and merges them."""
    from peft import LoraConfig, get_peft_model

    if rank < 1:
        raise ValueError(f"lora_rank={rank} must be at least 1")
    if len(set(groups.values())) > 1:
        named = ", ".join(f"{group}={way}" for group, way in groups.items())
        raise ValueError(f"train: {named}: use one way, lora or dora, for all adapted groups")
    trained = [parameter for parameter in task.model.parameters() if parameter.requires_grad]  # peft freezes all
    targets = [name for group in groups for name in _linear_layers(task, group)]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora="dora" in groups.values(),
        target_modules="|".join(sorted({_pattern(name) for name in targets})),
    )
    with warnings.catch_warnings():  # peft 0.21 uses a name that transformers 5.23 deprecates
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        adapters = get_peft_model(task.model, config)
    for parameter in trained:
        parameter.requires_grad_(True)
    object.__setattr__(task, "adapters", adapters)


def _linear_layers(task: LanguageTask, group: str) -> list[str]:
    """Names of the linear layers of a group, without the output layer.

    Raises:
        ValueError: it has none.
    """
    output = task.model.get_output_embeddings()
    found = [
        name
        for name, module in task.model.named_modules()
        # GPT-2 calls its linear layers Conv1D; a subclass of Linear may be a router with several outputs
        if (type(module) is nn.Linear or type(module).__name__ == "Conv1D")
        and module is not output
        and task.system.parts.group_of(name) == group
    ]
    if not found:
        raise ValueError(f"the {group} has no linear layers for adapters; use --train {group}")
    return found


def _pattern(name: str) -> str:
    """A module's name as a pattern, for all layers at once."""
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))


def by_prefix(task: LanguageTask, values: Mapping[str, float | None]) -> dict[str, float]:
    """Parameter-name prefix -> learning rate or weight decay of trained groups, from group -> it (None: the run's)."""
    prefixes: dict[str, float] = {}
    for name, parameter in task.named_parameters():
        group, path = task.system.parts.path_of(name.removeprefix("model."))
        value = values.get(group)
        if value is not None and parameter.requires_grad:
            prefixes[f"model.{path}"] = value
    return prefixes


def _groups(task: LanguageTask) -> dict[str, dict[str, Tensor]]:
    """Parameters and saved buffers by group; tied weights count once."""
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
    seen: set[int] = set()
    for name, tensor in task.model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            groups[task.system.parts.group_of(name)][name] = tensor
    return groups


def audit(
    task: LanguageTask,
    learning_rate: float,
    rates: Mapping[str, float | None] | None = None,
    weight_decay: float = 0.0,
    weight_decays: Mapping[str, float | None] | None = None,
) -> list[dict[str, Any]]:
    """One row per module group: ``group``, ``parameters``, ``trainable``, ``learning_rate``, ``weight_decay``.

    Args:
        task: after `freeze`.
        learning_rate: the run's rate, used by groups without their own.
        rates: group -> learning rate.
        weight_decay, weight_decays: likewise.
    """
    rows = []
    for group in GROUPS:
        parameters = [p for name, p in task.model.named_parameters() if task.system.parts.group_of(name) == group]
        trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        own = (rates or {}).get(group)
        rate = (learning_rate if own is None else own) if trainable else 0.0
        own = (weight_decays or {}).get(group)
        decay = (weight_decay if own is None else own) if trainable else 0.0
        total = sum(parameter.numel() for parameter in parameters)
        rows.append({"group": group, "parameters": total, "trainable": trainable})
        rows[-1] |= {"learning_rate": rate, "weight_decay": decay}
    return rows


class FreezeProof(ModuleAudit):
    """Hashes every group before and after training to prove which weights changed.

    Frozen and trainable tensors of a group are hashed separately, so that with LoRA the language model's own weights
    are proven unchanged. Hashing a frozen 7B language model (14 GB in bf16) takes 5 to 25 s.

    Example: ``proof = FreezeProof(task, rows)``, train, ``rows = proof.close(task)``, save, ``proof.check()``.

    Args:
        task: after `freeze`.
        rows: of `audit`.
    """

    def __init__(self, task: LanguageTask, rows: Iterable[Mapping[str, Any]]) -> None:
        super().__init__(_groups(task), rows=rows, prove=True)

    def close(self, task: Any, steps: Any = None) -> list[dict[str, Any]]:  # type: ignore[override]
        """As `ModuleAudit.close`, of the task as trained; call before adapters are merged."""
        return super().close(_groups(task), steps)

    def verify(self, task: LanguageTask, steps: Any = None) -> None:
        """`close`, prints the table, and `check`."""
        print(audit_table(self.close(task, steps)), flush=True)
        self.check()
