"""TrainingArguments with the defaults of this toolkit and four names more."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainingArguments


@dataclass
class RecipeArguments(TrainingArguments):
    """`transformers.TrainingArguments`, names verbatim; only defaults differ, and `overwrite`, `resume`,
    `max_bad_fraction`, `muon_learning_rate` are added.

    `resume_from_checkpoint` takes a path or "true" (the newest whole checkpoint in `output_dir`).

    Raises:
        ValueError: `overwrite` with `resume`, a batch size or a fraction out of range, no `output_dir`.
    """

    report_to: str | list[str] | None = field(
        default="none", metadata={"help": "Where metrics go besides the run folder: wandb, tensorboard..."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Kept off: our collators need columns that the model does not take."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Drop the last, smaller batch; filling it up would make false negatives."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "How many checkpoints are kept."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps (below 1: a fraction)."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Name of the learning-rate schedule."})
    max_bad_fraction: float = field(
        default=0.01, metadata={"help": "Bad samples are counted and skipped up to this fraction, then it is an error."}
    )
    muon_learning_rate: float | None = field(
        default=None, metadata={"help": "Muon at this rate for the matrices of hidden layers, AdamW for the rest."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the run that output_dir already holds."})
    resume: bool = field(default=False, metadata={"help": "Go on from the newest whole checkpoint in output_dir."})

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("--output_dir is missing; name the folder for this run, e.g. --output_dir runs/first")
        given = self.resume_from_checkpoint
        if isinstance(given, bool) or (isinstance(given, str) and given.lower() in ("true", "false")):
            self.resume = self.resume or str(given).lower() == "true"
            self.resume_from_checkpoint = None
        if self.overwrite and (self.resume or self.resume_from_checkpoint):
            raise ValueError("--overwrite starts anew and --resume goes on: give one of them")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction} is not between 0 and 1")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate={self.learning_rate} must not be negative")
        if self.muon_learning_rate is not None and self.muon_learning_rate <= 0:
            raise ValueError(f"muon_learning_rate={self.muon_learning_rate} must be positive; leave it out for no Muon")
        super().__post_init__()
        if self.muon_learning_rate is not None and not str(self.optim.value).startswith("adamw_torch"):
            raise ValueError(f"muon_learning_rate goes with --optim adamw_torch, not {self.optim.value}")

    @property
    def resuming(self) -> bool:
        """Whether this start goes on from a checkpoint, named or the newest."""
        return bool(self.resume or self.resume_from_checkpoint)

    def checkpoint_to_resume(self) -> str | None:
        """The checkpoint to go on from, or None to start at step 0.

        Raises:
            FileNotFoundError: a named checkpoint does not exist, or `--resume` was given and there is no run.
            ValueError: the named checkpoint is not whole.
        """
        from .checkpoints import check_checkpoint, last_checkpoint

        if self.resume_from_checkpoint:
            return str(check_checkpoint(Path(self.resume_from_checkpoint)))
        return last_checkpoint(Path(self.output_dir)) if self.resume else None
