"""Parameter groups: one learning rate per group of modules, weight decay only where it belongs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from mllm_vision.errors import unknown_name

# Besides all 1-D parameters (biases, norms): scales, and what stands for a position or a class.
_NO_DECAY = re.compile(
    r"(^|[._])(logit_scale|logit_bias|temperature|bias"
    r"|class_embedding|cls_token|dist_token|mask_token|register_tokens"
    r"|position_embeddings?|pos_embed|position_embedding_table)([._]|$)"
)
# Inside a repeated block: the matrices that Muon is for (embeddings, patch kernels, heads and projectors are not).
_HIDDEN = re.compile(r"(^|\.)(layers?|blocks?|h)\.\d+\.")
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")  # DDP, torch.compile, peft


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes that DDP, torch.compile and peft put before it."""
    while (wrapper := next((prefix for prefix in _WRAPPERS if name.startswith(prefix)), None)) is not None:
        name = name.removeprefix(wrapper)
    return name


def decays(name: str, parameter: Any) -> bool:
    """Whether weight decay applies: matrices and kernels, but no scale, bias, norm, class or position embedding."""
    return parameter.ndim > 1 and _NO_DECAY.search(name) is None


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    learning_rate: float,
    learning_rates: Mapping[str, float | None] | None = None,
    muon_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer over the trainable parameters of `model`.

    Args:
        model: frozen parameters (`requires_grad=False`) are left out.
        weight_decay: for matrices; 1-D parameters, scales, class and position embeddings get none.
        learning_rate: of everything that no prefix names.
        learning_rates: parameter-name prefix -> learning rate; the longest prefix wins, None means the default.
        muon_learning_rate: if given, 2-D weights inside repeated blocks (`layers.0.`...) go to groups marked `muon`
            at this rate, times what their prefix's rate is to `learning_rate`.

    Returns:
        Dicts with `params`, `lr`, `weight_decay`, `group_name` and `muon`; the default group comes first.

    Raises:
        ValueError: a prefix matches no parameter, a rate is negative, or nothing is trainable.
    """
    rates = {prefix: rate for prefix, rate in (learning_rates or {}).items() if rate is not None}
    names = [plain_name(name) for name, _ in model.named_parameters()]
    for prefix, rate in rates.items():
        if rate < 0:
            raise ValueError(f"learning rate {rate} of {prefix!r} must not be negative")
        if not any(_under(name, prefix) for name in names):
            tops = {name.partition(".")[0] for name in names} | {".".join(name.split(".")[:2]) for name in names}
            raise ValueError(f"learning rate for {unknown_name('parameter prefix', prefix, tops)}")
    groups: dict[tuple[str, bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = plain_name(name)
        prefix = max((prefix for prefix in rates if _under(plain, prefix)), key=len, default="")
        decayed = decays(plain, parameter)
        rate = rates.get(prefix, learning_rate)
        muon = muon_learning_rate is not None and decayed and parameter.ndim == 2 and bool(_HIDDEN.search(plain))
        if muon and muon_learning_rate is not None:
            rate = muon_learning_rate * (rate / learning_rate if learning_rate else 1.0)
        group = groups.setdefault(
            (prefix, decayed, muon),
            {
                "params": [],
                "lr": rate,
                "weight_decay": weight_decay if decayed else 0.0,
                "group_name": prefix or "default",
                "muon": muon,
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError("nothing to train: every parameter is frozen (requires_grad=False)")
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], key[2], not key[1]))]


def _under(name: str, prefix: str) -> bool:
    prefix = prefix.removesuffix(".")
    return name == prefix or name.startswith(prefix + ".")
