"""TrainingArguments with the defaults of this toolkit and a few names more."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mllm_vision.training.optim.arguments import OptimizerArguments
from mllm_vision.training.recipe.common import CommonArguments
from mllm_vision.training.recipe.flags import check_flags, check_resolved
from mllm_vision.training.recipe.launch import check_joined, check_launch


@dataclass
class RecipeArguments(CommonArguments, OptimizerArguments):  # type: ignore[misc]  # a rate may be None
    """`transformers.TrainingArguments`, names verbatim, with other defaults and the few fields below.

    `resume_from_checkpoint` accepts a path or "true" (the newest whole checkpoint in `output_dir`).

    Raises:
        ValueError: a flag without effect (recipe/flags.py), `overwrite` with `resume`, a batch size or a fraction out
            of range, no `output_dir`.
    """

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Kept off: the collators need columns that are not arguments of the model."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Drop the last, smaller batch; filling it up would make false negatives."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Off: every trainable parameter has a gradient in every step, and the search takes time."},
    )
    save_minutes: float | None = field(
        default=None, metadata={"help": "Save a checkpoint after so many minutes too, beside those of save_steps."}
    )
    accept_changed_data: bool = field(
        default=False, metadata={"help": "With --resume: continue although the training data are not the same rows."}
    )
    accept_missing_state: bool = field(
        default=False,
        metadata={"help": "With --resume: continue from a checkpoint without optimizer, schedule or random states."},
    )

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("--output_dir is missing; name the folder for this run, e.g. --output_dir runs/first")
        given = self.resume_from_checkpoint
        if isinstance(given, bool) or (isinstance(given, str) and given.lower() in ("true", "false")):
            self.resume = self.resume or str(given).lower() == "true"
            self.resume_from_checkpoint = None
        if self.overwrite and (self.resume or self.resume_from_checkpoint):
            raise ValueError("--overwrite and --resume are mutually exclusive: give one of them")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction} is not between 0 and 1")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.save_minutes is not None and not self.save_minutes > 0:
            raise ValueError(f"save_minutes={self.save_minutes} must be positive; leave it out to save by steps alone")
        if self.embed_batch_size is not None and self.embed_batch_size < 1:
            raise ValueError(f"embed_batch_size={self.embed_batch_size} must be at least 1; leave it out for no chunks")
        check_flags(self)
        self.enable_jit_checkpoint = False  # checkpoint/signals.py does the same, and exactly
        check_launch(self)
        super().__post_init__()
        if self.device.type in ("cpu", "mps"):
            self.dataloader_pin_memory = False  # torch would warn that it has no effect there
        check_resolved(self)
        check_joined(self)

    @property
    def resuming(self) -> bool:
        """Whether this start continues from a checkpoint, named or the newest."""
        return bool(self.resume or self.resume_from_checkpoint)

    def checkpoint_to_resume(self) -> str | None:
        """The checkpoint to resume from, or None to start at step 0.

        Raises:
            FileNotFoundError: a named checkpoint does not exist, or `--resume` was given and there is no run.
            ValueError: the named checkpoint is not whole.
        """
        from mllm_vision.training.checkpoint.checkpoints import check_checkpoint, found_by_first, last_checkpoint

        if named := self.resume_from_checkpoint:
            return found_by_first(lambda: str(check_checkpoint(Path(named))))
        return found_by_first(lambda: last_checkpoint(Path(str(self.output_dir)))) if self.resume else None
