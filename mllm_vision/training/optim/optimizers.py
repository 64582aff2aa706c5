"""Parameter groups: learning rates by module, weight decay only where it belongs; and the choice of optimizer."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mllm_vision.errors import unknown_name
from mllm_vision.training.optim.layers import is_patch_embedding, layer_scales
from mllm_vision.training.optim.layerwise import LAMB, LARS

logger = logging.getLogger(__name__)

# Besides all 1-D parameters (biases, norms): scales, positions and class tokens.
_NO_DECAY = re.compile(
    r"(^|[._])(logit_scale|logit_bias|temperature|bias"
    r"|class_embedding|cls_token|dist_token|mask_token|register_tokens"
    r"|position_embeddings?|pos_embed|position_embedding_table)([._]|$)"
)
# Muon is for matrices inside a repeated block.
_HIDDEN = re.compile(r"(^|\.)(layers?|blocks?|h)\.\d+\.")
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")  # DDP, torch.compile, peft
# what `--optim_args` may set, by optimizer
_SETTINGS: dict[str, dict[str, type]] = {
    "lars": {"momentum": float, "trust_coefficient": float, "variant": str},
    "lamb": {"variant": str},
}
# keywords of `parameter_groups` that are flags, with their neutral values
_FLAGS = {
    "weight_decay_on": "method",
    "muon_learning_rate": None,
    "bias_learning_rate": None,
    "layer_decay": None,
    "patch_embedding_lr_scale": 1.0,
}


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes that DDP, torch.compile and peft put before it."""
    while (wrapper := next((prefix for prefix in _WRAPPERS if name.startswith(prefix)), None)) is not None:
        name = name.removeprefix(wrapper)
    return name


def is_under(name: str, prefix: str) -> bool:
    """Whether a parameter is `prefix` or inside it."""
    prefix = prefix.removesuffix(".")
    return name == prefix or name.startswith(prefix + ".")


def decays(name: str, parameter: Any) -> bool:
    """Whether weight decay applies: matrices and kernels, but no scale, bias, norm, class or position embedding."""
    return parameter.ndim > 1 and _NO_DECAY.search(name) is None


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    learning_rate: float,
    weight_decay_on: str = "method",
    also_decays: Sequence[str] = (),
    learning_rates: Mapping[str, float | None] | None = None,
    weight_decays: Mapping[str, float | None] | None = None,
    muon_learning_rate: float | None = None,
    bias_learning_rate: float | None = None,
    layer_decay: float | Mapping[str, float] | None = None,
    patch_embedding_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer over the trainable parameters of `model`.

    Args:
        model: frozen parameters (`requires_grad=False`) are left out.
        weight_decay: for matrices; 1-D parameters, scales, class and position embeddings get none.
        learning_rate: of everything that no prefix names.
        weight_decay_on: `"method"` adds what `also_decays` names, `"matrices"` does not, `"all"` means every parameter.
        also_decays: parts of parameter names, such as `"cls_token"` or `"last_layer.norm"`.
        learning_rates: parameter-name prefix -> learning rate; the longest prefix wins, None means the default.
        weight_decays: parameter-name prefix -> weight decay, likewise; for what takes weight decay at all.
        muon_learning_rate: of 2-D weights inside repeated blocks (`layers.0.`...), in groups marked `muon`; times the
            ratio of their prefix's rate to `learning_rate`.
        bias_learning_rate: of what takes no weight decay (Barlow Twins: 0.0048 beside 0.2), times the same ratio.
        layer_decay: rates fall towards the input of each tower; see `training.optim.layers.layer_scales`.
        patch_embedding_lr_scale: multiplies the patch embedding's rate.

    Returns:
        Dicts with `params`, `lr`, `weight_decay`, `group_name`, `muon` and `decays` (whether weight decay applies); the
        default group comes first, and of its kind the largest rate.

    Raises:
        ValueError: a prefix matches no parameter, a rate or weight decay is negative, nothing is trainable, or there
            are no layers to decay.
    """
    rates = {prefix: rate for prefix, rate in (learning_rates or {}).items() if rate is not None}
    decay_of = {prefix: decay for prefix, decay in (weight_decays or {}).items() if decay is not None}
    _check_prefixes(model, rates, "learning rate")
    _check_prefixes(model, decay_of, "weight decay")
    scales = {} if layer_decay is None else layer_scales(_trained(model), layer_decay)
    groups: dict[tuple[str, bool, bool, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = plain_name(name)
        prefix = _longest(plain, [*rates, *decay_of])
        matrix = decays(plain, parameter)
        named = weight_decay_on == "method" and any(f".{part}." in f".{plain}." for part in also_decays)
        decayed = matrix or named or weight_decay_on == "all"
        hidden = matrix and parameter.ndim == 2 and _HIDDEN.search(plain) is not None
        muon = hidden and muon_learning_rate is not None
        rate = rates.get(_longest(plain, rates), learning_rate)
        own = muon_learning_rate if muon else None if decayed else bias_learning_rate
        if own is not None:
            rate = own * (rate / learning_rate if learning_rate else 1.0)
        rate *= scales.get(plain, 1.0) * (patch_embedding_lr_scale if is_patch_embedding(plain) else 1.0)
        group = groups.setdefault(
            (prefix, muon, not decayed, -rate),
            {"params": [], "lr": rate, "weight_decay": decay_of.get(_longest(plain, decay_of), weight_decay) * decayed}
            | {"group_name": prefix or "default", "muon": muon, "decays": decayed},
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError("nothing to train: every parameter is frozen (requires_grad=False)")
    return [groups[key] for key in sorted(groups)]


def _longest(name: str, prefixes: Iterable[str]) -> str:
    """The longest prefix that a parameter is under; "" without one."""
    return max((prefix for prefix in prefixes if is_under(name, prefix)), key=len, default="")


def _check_prefixes(model: nn.Module, values: Mapping[str, float], what: str) -> None:
    names = [plain_name(name) for name, _ in model.named_parameters()]
    for prefix, value in values.items():
        if value < 0:
            raise ValueError(f"{what} {value} of {prefix!r} must not be negative")
        if not any(is_under(name, prefix) for name in names):
            tops = {name.partition(".")[0] for name in names} | {".".join(name.split(".")[:2]) for name in names}
            raise ValueError(f"{what} for {unknown_name('parameter prefix', prefix, tops)}")


def _trained(model: nn.Module) -> list[str]:
    """Names of the parameters in parts that train: a teacher is not a tower."""
    parameters = [(plain_name(name), parameter) for name, parameter in model.named_parameters()]
    parts = {name.partition(".")[0] for name, parameter in parameters if parameter.requires_grad}
    return [name for name, _ in parameters if name.partition(".")[0] in parts]


def group_flags(
    arguments: Any, learning_rates: Mapping[str, float | None], weight_decays: Mapping[str, float | None]
) -> list[str]:
    """The given flags that need our parameter groups."""
    neutral = {"lr_scaling": "none", "weight_decay_end": None, **_FLAGS}
    given = [name for name in neutral if getattr(arguments, name, None) not in (None, neutral[name])]
    given += ["learning rate per module group"] * bool(learning_rates)
    return given + ["weight decay per module group"] * bool(weight_decays)


def group_settings(
    arguments: Any,
    learning_rate: float,
    learning_rates: Mapping[str, float | None],
    weight_decays: Mapping[str, float | None],
) -> dict[str, Any]:
    """The keywords of `parameter_groups` from the arguments.

    Args:
        arguments: `RecipeArguments` or `TrainingArguments`.
        learning_rate: of everything that no prefix names.
        learning_rates: parameter-name prefix -> learning rate.
        weight_decays: parameter-name prefix -> weight decay.
    """
    given = {name: getattr(arguments, name, neutral) for name, neutral in _FLAGS.items()}
    return {
        **given,
        "weight_decay": arguments.weight_decay,
        "learning_rate": learning_rate,
        "learning_rates": dict(learning_rates),
        "weight_decays": dict(weight_decays),
    }


def log_rates(arguments: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Log the learning rates that flags changed."""
    if getattr(arguments, "lr_scaling", "none") != "none":
        rows, scale = arguments.effective_batch_size, arguments.lr_scale
        rule = f"{arguments.lr_scaling}, {rows} rows a step against {arguments.lr_scaling_batch_size}"
        for name in arguments.derived_fields:
            base, rate = getattr(arguments, f"base_{name}"), getattr(arguments, name)
            logger.info("lr_scaling (%s): base_%s %g x %.4g = %s %g", rule, name, base, scale, name, rate)
    if getattr(arguments, "layer_decay", None) is not None:
        rates = [group["lr"] for group in groups]
        logger.info("layer_decay %s: learning rates from %.3g to %.3g", arguments.layer_decay, min(rates), max(rates))


def optimizer_settings(name: str, text: str | None) -> dict[str, Any]:
    """`momentum=0.9,variant=paper` as keyword arguments of LARS or LAMB.

    Raises:
        ValueError: an unknown setting, a value of the wrong type, or one that the optimizer refuses.
    """
    found: dict[str, Any] = {}
    for entry in filter(None, (part.strip() for part in (text or "").split(","))):
        key, _, value = (part.strip() for part in entry.partition("="))
        if key not in _SETTINGS[name]:
            raise ValueError(f"optim_args: {unknown_name(f'setting of {name}', key, _SETTINGS[name])}")
        try:
            found[key] = _SETTINGS[name][key](value)
        except ValueError:
            raise ValueError(f"optim_args: {key}={value!r} of {name} must be a number") from None
    {"lars": LARS, "lamb": LAMB}[name]([torch.zeros(1)], **found)  # checks the range of the settings
    return found


def optimizer_class(arguments: Any) -> tuple[type, dict[str, Any]] | None:
    """LARS or LAMB with their settings, or None for an optimizer of transformers."""
    name = str(getattr(arguments.optim, "value", arguments.optim))
    if name == "lars":
        return LARS, optimizer_settings(name, arguments.optim_args)
    if name == "lamb":
        adam = {"betas": (arguments.adam_beta1, arguments.adam_beta2), "eps": arguments.adam_epsilon}
        return LAMB, {**adam, **optimizer_settings(name, arguments.optim_args)}
    return None
