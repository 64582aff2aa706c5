"""What trains, at which rate, and the proof afterwards that nothing else moved (LoRA included)."""

from __future__ import annotations

import logging
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllm_vision.distributed import rank
from mllm_vision.hub.lineage import combined, tensor_digests
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


def _tensors(model: nn.Module, group: str, trainable: bool | None = None) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers of a group; with ``trainable`` only those that do or do not take gradients."""
    seen: set[int] = set()
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if module_group(name) != group or id(tensor) in seen:  # tied weights count once
            continue
        seen.add(id(tensor))
        if trainable is None or learns.get(name, False) == trainable:
            yield name, tensor.detach()


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


def audit_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The audit as a table for people; with the proof's keys it says what moved."""
    lines = [f"{'module':<16}{'parameters':>14}{'trainable':>14}{'learning rate':>15}"]
    for row in rows:
        still = "follows" if row.get("follows") else "frozen"  # a teacher is moved by its student, not by a rate
        rate = f"{row['learning_rate']:.3g}" if row["trainable"] else still
        line = f"{row['group']:<16}{row['parameters']:>14,}{row['trainable']:>14,}{rate:>15}"
        if "moved" in row:
            line += (
                f"   {row['sha256_before'][:12]} -> {row['sha256_after'][:12]} {'moved' if row['moved'] else 'equal'}"
            )
        lines.append(line)
    return "\n".join(lines)


SAMPLE = 65_536  # values of a tensor that trains: any step moves some of so many


class FreezeProof:
    """Hashes of every group before training; afterwards they tell what moved.

    Frozen and trainable tensors of a group are told apart, so that with LoRA the language model's own weights
    are proven untouched while its adapters move. Every byte of what is frozen is hashed, once before and once after;
    of what trains a sample is enough to see that it moved. The first process alone does it. A language model of 7B
    weights, frozen, is 14 GB in bf16: at 0.15 to 2 GB/s a core and four tensors at a time some 5 to 25 s each time.

    What trains has to move wherever it could: a run of a single step may have had a rate of 0 (a warm-up), or nothing
    but zeros in front of a group (LoRA's B, a last layer that starts at zero), through which no gradient comes yet.

    Example: ``proof = FreezeProof(model, rows)``, train, ``rows = proof.close(model)``, save, ``proof.check()``.
    """

    def __init__(self, model: nn.Module, rows: Iterable[Mapping[str, Any]]) -> None:
        self.rows = [dict(row) for row in rows]
        self._before = self._hashes(model) if rank() == 0 else {}
        self._zero = {
            module_group(name)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and parameter.ndim > 1 and not parameter.detach().any()
        }
        self.problems: list[str] = []

    @staticmethod
    def _hashes(model: nn.Module) -> dict[tuple[str, bool | None], str]:
        found: dict[tuple[str, bool | None], str] = {}
        began, size = time.monotonic(), 0
        for group in GROUPS:
            digests: dict[str, str] = {}
            for trains in (True, False):
                tensors = list(_tensors(model, group, trains))
                size += 0 if trains else sum(tensor.nbytes for _, tensor in tensors)
                part = tensor_digests(tensors, at_most=SAMPLE if trains else None)
                found[group, trains] = combined(part)
                digests |= part
            found[group, None] = combined(digests)
        logger.info("freeze audit: %.2f GB of frozen weights hashed in %.1f s", size / 1e9, time.monotonic() - began)
        return found

    def close(self, model: nn.Module, steps: Any = None) -> list[dict[str, Any]]:
        """The rows with ``sha256_before``, ``sha256_after`` and ``moved``; call before LoRA is merged.

        Args:
            model: as trained.
            steps: the trainer's ``MovingSteps``, which tells whether anything could move; without it everything could.

        On other processes than the first, which know no hashes, the rows as they are.
        """
        if rank() != 0:
            return self.rows
        after = self._hashes(model)
        self.problems = []
        for row in self.rows:
            group = row["group"]
            row["sha256_before"], row["sha256_after"] = self._before[group, None], after[group, None]
            row["moved"] = row["sha256_before"] != row["sha256_after"]
            if self._before[group, False] != after[group, False]:
                self.problems.append(
                    f"{group}: frozen weights moved ({self._before[group, False][:12]} -> {after[group, False][:12]})"
                )
            still = bool(row["trainable"]) and self._before[group, True] == after[group, True]
            if still and (why := self._could_not_move(row, steps)):
                row["still"] = why
                logger.warning("%s did not move: %s", group, why)
            elif still:
                self.problems.append(
                    f"{group}: {row['trainable']:,} trainable parameters did not move "
                    f"(learning rate {row['learning_rate']:.3g}; a warm-up that never left zero does this too)"
                )
        return self.rows

    def _could_not_move(self, row: Mapping[str, Any], steps: Any) -> str:
        """Why a group that trains had no way to move in so few steps; empty where it had one."""
        if steps is None or not row["learning_rate"] or steps.taken > 1:
            return ""
        if steps.moving == 0:
            return "the only step had a learning rate of 0, as a warm-up begins with"
        if self._zero - {row["group"]}:
            return "in its first step no gradient comes through weights that start at zero"
        return ""

    def verify(self, model: nn.Module, steps: Any = None) -> None:
        """`close`, the table for people, and `check`."""
        print(audit_table(self.close(model, steps)), flush=True)
        self.check()

    def check(self) -> None:
        """Raises ValueError if what was frozen moved or what should train did not. Call after saving."""
        if self.problems:
            raise ValueError("the freeze audit does not hold: " + "; ".join(self.problems))
