"""The most used flags of a training. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mllm_vision.training.recipe.flags import OBJECTIVES


@dataclass
class CommonArguments:
    """Length, rates, checkpoints and destination of a training; a recipe derives its defaults from this class.

    `parse_recipe` turns it into `RecipeArguments`, which has every other name of `TrainingArguments` too.
    """

    recipe_name: ClassVar[str | None] = None  # which recipe's flags these are, for `training.recipe.flags`

    output_dir: str | None = field(default=None, metadata={"help": "The folder of the run; it is created."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the run that output_dir holds."})
    resume: bool = field(default=False, metadata={"help": "Resume from the newest whole checkpoint in output_dir."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "Resume from this checkpoint folder."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Number of passes over the data."})
    max_steps: int = field(default=-1, metadata={"help": "Stop after this many steps; overrides the epochs."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows per process in a training step."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimizer step."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Rows per process in an evaluation."})
    embed_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Embed the batch in chunks of this many rows: exact, with less memory.",
            "recipes": OBJECTIVES,
        },
    )
    learning_rate: float | None = field(
        default=5e-5, metadata={"help": "The peak learning rate, never scaled by the batch."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of matrices and kernels."})
    warmup_steps: float = field(default=0, metadata={"help": "Steps of linear warm-up; below 1, a share of all."})
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16 mixed precision."})
    eval_strategy: str = field(default="no", metadata={"help": "When to evaluate: no, steps or epoch."})
    eval_steps: float | None = field(default=None, metadata={"help": "Evaluate every so many steps, or this share."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps; below 1, a share of all."})
    save_steps: float = field(default=500, metadata={"help": "Save a checkpoint every so many steps, or this share."})
    save_total_limit: int | None = field(default=2, metadata={"help": "How many checkpoints are kept."})
    load_best_model_at_end: bool = field(default=False, metadata={"help": "End with the best checkpoint's weights."})
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "The metric that selects the best checkpoint."}
    )
    max_bad_fraction: float = field(
        default=0.01, metadata={"help": "Bad samples are skipped up to this share; more is an error."}
    )
    report_to: str | list[str] | None = field(
        default="none", metadata={"help": "Where metrics go besides the run folder: wandb, tensorboard."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of weights, order and augmentation."})
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU even where there is an accelerator."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the artifact when the run is done."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Its repository on the Hub."})
