"""The flags of optimizer and schedule: names of `TrainingArguments`, and a few more."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import ExplicitEnum

from mllm_vision.errors import unknown_name
from mllm_vision.training.recipe.flags import takes_betas


class OwnOptimizer(ExplicitEnum):
    """Values of `--optim` besides those of transformers."""

    LARS = "lars"
    LAMB = "lamb"


class OwnScheduler(ExplicitEnum):
    """Values of `--lr_scheduler_type` besides those of transformers."""

    STEP = "step"
    EXACT_COSINE = "exact_cosine"


@dataclass
class OptimizerArguments(TrainingArguments):
    """`TrainingArguments` with the optimizers and schedules of docs/optimizers.md.

    Raises:
        ValueError: an unknown name (with the nearest known one), a value out of range, or mutually exclusive flags.
    """

    optim: str = field(
        default=TrainingArguments.default_optim,
        metadata={"help": "lars, lamb, or a name of transformers: adamw_torch, sgd, adafactor, lion_32bit..."},
    )
    optim_args: str | None = field(
        default=None, metadata={"help": "Settings of the optimizer, e.g. momentum=0.9,variant=simclr for lars."}
    )
    lr_scheduler_type: str = field(
        default="cosine",
        metadata={"help": "step, exact_cosine, or a name of transformers: cosine, linear, cosine_with_min_lr..."},
    )
    base_learning_rate: float | None = field(
        default=None, metadata={"help": "In place of learning_rate: the rate at lr_scaling_batch_size rows a step."}
    )
    lr_scaling: Literal["none", "linear", "sqrt"] = field(
        default="none",
        metadata={"help": "base_learning_rate times B/256 (linear) or its square root; B over all processes."},
    )
    lr_scaling_batch_size: int = field(default=256, metadata={"help": "The batch size at which lr_scaling is 1."})
    layer_decay: float | dict[str, float] | None = field(
        default=None,
        metadata={"help": "Rate of a layer / that of the layer above it: 0.75, or vision=0.85,text=0.75."},
    )
    patch_embedding_lr_scale: float = field(
        default=1.0, metadata={"help": "Factor on the patch embedding's rate (DINOv2: 0.2); 0 leaves it untrained."}
    )
    bias_learning_rate: float | None = field(
        default=None, metadata={"help": "Rate of what takes no weight decay: biases, norms, scales, positions."}
    )
    base_bias_learning_rate: float | None = field(
        default=None, metadata={"help": "The same, scaled as base_learning_rate is (Barlow Twins: 0.0048)."}
    )
    muon_learning_rate: float | None = field(
        default=None, metadata={"help": "Muon at this rate for the matrices of hidden layers, AdamW for the rest."}
    )
    weight_decay_on: Literal["method", "matrices", "all"] = field(
        default="method",
        metadata={
            "help": "What weight decay applies to: matrices; method: also what the method's own code decays; "
            "all: biases, norms and scales too (the official codes of MoCo, SimSiam, SupCon and PCL)."
        },
    )
    weight_decay_end: float | None = field(
        default=None, metadata={"help": "Weight decay at the end, reached by a cosine (DINO: 0.4 from 0.04)."}
    )
    gradient_clipping: Literal["global", "per_parameter", "per_module"] = field(
        default="global",
        metadata={
            "help": "What max_grad_norm limits: all gradients together, each (DINO), those of each part (DINOv2)."
        },
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Average the weights (0.9999); evaluations and artifacts are the average."}
    )

    def __post_init__(self) -> None:
        optim: Any = _named("optim", self.optim, OptimizerNames, OwnOptimizer)
        scheduler: Any = _named("lr_scheduler_type", self.lr_scheduler_type, SchedulerType, OwnScheduler)
        self._check_optimizer(optim)
        self._check_rates()
        # TrainingArguments accepts only its own names
        self.optim = OptimizerNames.ADAMW_TORCH if isinstance(optim, OwnOptimizer) else optim
        self.lr_scheduler_type = SchedulerType.COSINE if isinstance(scheduler, OwnScheduler) else scheduler
        super().__post_init__()
        self.optim, self.lr_scheduler_type = optim, scheduler
        for name in self.derived_fields:
            setattr(self, name, getattr(self, f"base_{name}") * self.lr_scale)
        settings: Any = self.lr_scheduler_kwargs
        _check_scheduler_settings(scheduler, settings)
        sharding: Any = self.fsdp_config
        if self.deepspeed or (self.fsdp and int(sharding.get("version", 2)) == 1):
            self.check_sharding("DeepSpeed" if self.deepspeed else "FSDP version 1")

    def _check_optimizer(self, optim: Any) -> None:
        for name in ("weight_decay", "weight_decay_end", *_RATES, *(f"base_{name}" for name in _RATES)):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must not be negative (nor infinite)")
        if self.muon_learning_rate is not None and not 0 < self.muon_learning_rate < math.inf:
            raise ValueError(f"muon_learning_rate={self.muon_learning_rate} must be positive; leave it out for no Muon")
        decays = self.layer_decay if isinstance(self.layer_decay, dict) else {"": self.layer_decay}
        for tower, value in decays.items():
            if value is not None and not (isinstance(value, (int, float)) and 0 < value <= 1):
                where = f"layer_decay of {tower!r}" if tower else "layer_decay"
                raise ValueError(f"{where} is {value!r}; it must lie in (0, 1], e.g. 0.75")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie between 0 and 1, e.g. 0.999; leave it out for none")
        if self.patch_embedding_lr_scale < 0:
            raise ValueError(f"patch_embedding_lr_scale={self.patch_embedding_lr_scale} must not be negative")
        for name in _CHOICES:
            if getattr(self, name) not in _CHOICES[name]:
                raise ValueError(unknown_name(name, str(getattr(self, name)), _CHOICES[name]))
        if self.lr_scaling_batch_size < 1:
            raise ValueError(f"lr_scaling_batch_size={self.lr_scaling_batch_size} must be at least 1")
        self._check_exclusive(optim)

    def _check_exclusive(self, optim: Any) -> None:
        """Mutually exclusive flags."""
        if self.lr_scaling != "none" and self.auto_find_batch_size:
            raise ValueError(
                f"lr_scaling={self.lr_scaling} needs the batch size before training, and auto_find_batch_size changes "
                "it; set --per_device_train_batch_size and leave --auto_find_batch_size out"
            )
        for name in ("bias_learning_rate", "base_bias_learning_rate"):
            if self.weight_decay_on == "all" and (rate := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name}={rate} is for parameters without weight decay, and with weight_decay_on=all there are "
                    f"none; use --{name} null, or --weight_decay_on method"
                )
        if self.gradient_clipping != "global" and self.max_grad_norm <= 0:
            raise ValueError(
                f"gradient_clipping={self.gradient_clipping} clips at max_grad_norm, which is {self.max_grad_norm}; "
                "set it (DINO: --max_grad_norm 3.0), or use --gradient_clipping global"
            )
        if self.muon_learning_rate is not None and not optim.value.startswith("adamw_torch"):
            raise ValueError(f"muon_learning_rate needs --optim adamw_torch, not {optim.value}")
        if isinstance(optim, OwnOptimizer):
            from mllm_vision.training.optim.optimizers import optimizer_settings

            optimizer_settings(optim.value, self.optim_args)  # raises for an unknown setting

    @property
    def effective_batch_size(self) -> int:
        """Rows in one optimizer step: per device, times accumulation, times processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    @classmethod
    def settle_defaults(cls, given: Mapping[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
        """`defaults` (a method's) without those that the flags `given` replace.

        A given learning rate is not scaled: it removes the method's base rate, and the last one the scaling.
        """
        kept = dict(defaults)
        for name in _RATES:
            if given.get(name) is not None:
                kept.pop(f"base_{name}", None)
            if given.get(f"base_{name}") is not None:
                kept.pop(name, None)
        if not takes_betas(_value({**kept, **given}.get("optim", cls.default_optim))):
            kept = {name: value for name, value in kept.items() if not name.startswith("adam_")}
        if given.get("lr_scheduler_type", kept.get("lr_scheduler_type")) != kept.get("lr_scheduler_type"):
            kept.pop("lr_scheduler_kwargs", None)  # settings of another schedule
        if all({**kept, **given}.get(f"base_{name}") is None for name in _RATES):
            kept.pop("lr_scaling", None)
        return kept

    @property
    def derived_fields(self) -> list[str]:
        """The rates computed from a base rate; `recipe.yaml` contains the base rate, and null for them."""
        return [name for name in _RATES if getattr(self, f"base_{name}") is not None]

    def _check_rates(self) -> None:
        """Require one of learning_rate and base_learning_rate, and a base rate for scaling."""
        usual = {entry.name: entry.default for entry in dataclasses.fields(self)}
        for name in _RATES:
            rate, base = getattr(self, name), getattr(self, f"base_{name}")
            if base is not None and rate not in (None, usual[name]):
                raise ValueError(
                    f"{name}={rate} is used as given and base_{name}={base} is scaled by the batch: give one of them"
                )
            if base is None and rate is None and name == "learning_rate":
                raise ValueError("learning_rate=None: give --learning_rate, or --base_learning_rate with --lr_scaling")
        if self.lr_scaling != "none" and not self.derived_fields:
            raise ValueError(
                f"lr_scaling={self.lr_scaling} scales --base_learning_rate, and learning_rate={self.learning_rate} is "
                f"used as given: name it --base_learning_rate {self.learning_rate}, or leave --lr_scaling out"
            )
        if self.derived_fields and self.learning_rate is None:  # TrainingArguments requires a number
            self.learning_rate = self.base_learning_rate

    @property
    def lr_scale(self) -> float:
        """Factor on the base rates: 1, B/256 or its square root (`lr_scaling`)."""
        ratio = self.effective_batch_size / self.lr_scaling_batch_size
        return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[self.lr_scaling]

    def check_sharding(self, sharding: str) -> None:
        """Refuse what needs whole parameters.

        Args:
            sharding: "FSDP version 1", "FSDP version 2" or "DeepSpeed". The `DTensor`s of version 2 have norms of the
                whole: only the average of the weights is refused there.

        Raises:
            ValueError: with the flag and the remedy.
        """
        second = sharding == "FSDP version 2"
        remedy = "train without it (DDP)" if second else "use FSDP version 2 or DDP"
        refused = {
            f"optim={_value(self.optim)}": isinstance(self.optim, OwnOptimizer) and not second,
            f"gradient_clipping={self.gradient_clipping}": self.gradient_clipping != "global" and not second,
            f"ema_decay={self.ema_decay}": self.ema_decay is not None,
        }
        for flag, asked in refused.items():
            if asked:
                raise ValueError(f"{flag} needs whole parameters, and {sharding} shards them: {remedy}")


_RATES = ("learning_rate", "bias_learning_rate")  # each may come from a base rate instead
_CHOICES = {
    "lr_scaling": ("none", "linear", "sqrt"),
    "gradient_clipping": ("global", "per_parameter", "per_module"),
    "weight_decay_on": ("method", "matrices", "all"),
}


def _value(name: Any) -> str:
    return str(getattr(name, "value", name))


def _named(flag: str, given: Any, *enums: Any) -> Any:
    """The member of one of the enums with this value."""
    for enum in enums:
        if _value(given) in [member.value for member in enum]:
            return enum(_value(given))
    raise ValueError(unknown_name(flag, _value(given), [member.value for enum in enums for member in enum]))


def _check_scheduler_settings(scheduler: Any, settings: dict[str, Any] | None) -> None:
    """Check a schedule's settings by name; transformers raises a TypeError when the training starts."""
    from mllm_vision.training.optim.schedules import check_cosine_settings, check_step_settings

    if isinstance(scheduler, OwnScheduler):
        check: Any = check_step_settings if scheduler is OwnScheduler.STEP else check_cosine_settings
        check(**check_keys(scheduler.value, settings or {}, inspect.signature(check).parameters))
    elif settings:
        from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

        schedule: Any = TYPE_TO_SCHEDULER_FUNCTION[scheduler]
        known = inspect.signature(schedule).parameters
        own = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
        check_keys(scheduler.value, settings, [name for name in known if name not in own])


def check_keys(owner: str, settings: dict[str, Any], known: Any) -> dict[str, Any]:
    """`settings` if every key is known.

    Raises:
        ValueError: an unknown key.
    """
    for name in settings:
        if name not in known:
            raise ValueError(
                unknown_name(f"setting of {owner}", name, known) if known else f"{owner} has no setting {name!r}"
            )
    return settings
