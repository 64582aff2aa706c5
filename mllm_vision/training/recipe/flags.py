"""Every flag of `TrainingArguments`: in force, or refused with the remedy. docs/flags.md contains the table.

A flag that is accepted and ignored is a silent error. Each flag that cannot take effect is listed here, by recipe and
with its reason, and `check_flags` refuses it before anything is read; flags that are not listed are in force. (Read
from transformers 5.23; a test checks all of its fields.)
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mllm_vision.training.recipe.flag_types import default_of

IMAGE_TEXT, IMAGES = ("pretrain",), ("pretrain_images", "finetune")
OBJECTIVES = (*IMAGE_TEXT, *IMAGES)
LANGUAGE = ("language_model", "align", "instruct")
RECIPES = ("language_model", *OBJECTIVES, "align", "instruct")


@dataclass(frozen=True)
class Refusal:
    """Flags that take no effect in some recipes.

    Attributes:
        flags: their names.
        why: follows `--flag value: ` in the message; reason and remedy.
        recipes: the recipes that refuse them.
        unless: the flag is in force where this is true of the arguments.
        condition: a description of `unless` for the table.
    """

    flags: tuple[str, ...]
    why: str
    recipes: tuple[str, ...] = RECIPES
    unless: Callable[[Any], bool] | None = None
    condition: str = ""


def _value(entry: Any) -> str:
    return str(getattr(entry, "value", entry))


def _reporters(report_to: Any) -> list[str]:
    return [report_to] if isinstance(report_to, str) else list(report_to or [])


def takes_betas(optim: str) -> bool:
    """Whether an optimizer, by its name for `--optim`, reads adam_beta1, adam_beta2 or adam_epsilon."""
    return any(word in optim for word in ("adam", "lamb", "lion", "galore", "apollo")) and optim != "adalomo"


REFUSALS = (
    Refusal(("remove_unused_columns",), "the collators need columns that are not arguments of the model; leave it out"),
    Refusal(
        ("label_names", "prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches",
         "eval_use_gather_object", "eval_accumulation_steps"),
        "is for the Trainer's own evaluation loop, which the evaluators do not use; leave it out",
    ),
    Refusal(
        ("bf16_full_eval", "fp16_full_eval"),
        "evaluation runs in the precision of the training; use --bf16 or --fp16",
    ),
    Refusal(
        ("use_liger_kernel", "liger_kernel_config"),
        "replaces tested losses and layers by others; leave it out",
    ),
    Refusal(("use_cache",), "a key-value cache only costs memory in training; leave it out"),
    Refusal(("parallelism_config",), "tensor, context and pipeline parallelism are not supported; use DDP or --fsdp"),
    Refusal(
        ("ignore_data_skip", "restore_callback_states_from_checkpoint"),
        "a run is resumed exactly, data and state included; leave it out",
    ),
    Refusal(("dataloader_in_order",), "an exact resume needs the order of the rows; leave it out"),
    Refusal(
        ("save_on_each_node",), "a run is one folder: put --output_dir on a disk that all machines share, leave it out"
    ),
    Refusal(
        ("hub_strategy", "hub_always_push"),
        "the finished artifact is pushed once, at the end; leave it out",
    ),
    Refusal(
        ("hub_model_id", "hub_private_repo", "hub_revision", "hub_token"),
        "needs --push_to_hub; add that, or leave it out (scripts/push_to_hub.py pushes later)",
        unless=lambda arguments: arguments.push_to_hub,
        condition="with `--push_to_hub`",
    ),
    Refusal(
        ("do_train", "do_eval", "do_predict"),
        "a recipe always trains, evaluates where it has data for it, and predicts nothing; leave it out "
        "(scripts/evaluate.py evaluates a saved model)",
    ),
    Refusal(
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        "needs --report_to trackio; add that, or leave it out",
        unless=lambda arguments: bool({"trackio", "all"} & set(_reporters(arguments.report_to))),
        condition="with `--report_to trackio`",
    ),
    Refusal(
        ("optim_target_modules",),
        "needs an optimizer of GaLore or APOLLO (--optim galore_adamw); leave it out",
        unless=lambda arguments: _value(arguments.optim).startswith(("galore", "apollo")),
        condition="with `--optim galore_*` or `apollo_*`",
    ),
    Refusal(
        ("adam_beta1", "adam_beta2", "adam_epsilon"),
        "is for optimizers of the Adam family, and --optim names another; use --optim_args for its settings",
        unless=lambda arguments: takes_betas(_value(arguments.optim)),
        condition="with the Adam family",
    ),
    Refusal(
        ("skip_memory_metrics",),
        "memory is measured by the package psutil, which is not installed: pip install psutil",
        unless=lambda arguments: importlib.util.find_spec("psutil") is not None,
        condition="with psutil installed",
    ),
    Refusal(("length_column_name",), "the lengths of conversations are known without a column; leave it out"),
    Refusal(
        ("train_sampling_strategy",),
        "rows of this recipe have no lengths to group by; give random or sequential",
        recipes=("language_model", *OBJECTIVES),
        unless=lambda arguments: _value(arguments.train_sampling_strategy) in ("random", "sequential"),
        condition="random, sequential",
    ),
    Refusal(
        ("train_sampling_strategy",),
        "batches of different sizes cannot be resumed exactly; give random, sequential or group_by_length",
        recipes=("align", "instruct"),
        unless=lambda arguments: _value(arguments.train_sampling_strategy) != "batch_rebalance",
        condition="random, sequential, group_by_length",
    ),
    Refusal(
        ("label_smoothing_factor",),
        "is for the losses of language models; a method with smoothing has its own flag (--help)",
        recipes=OBJECTIVES,
    ),
    Refusal(
        ("average_tokens_across_devices", "include_num_input_tokens_seen", "neftune_noise_alpha"),
        "counts or changes the tokens of a language model, and this recipe trains none; leave it out",
        recipes=OBJECTIVES,
    ),
    Refusal(
        ("neftune_noise_alpha",),
        "adds noise to the embeddings of a trained language model, and here it is frozen; leave it out",
        recipes=("align",),
    ),
    Refusal(
        ("logging_nan_inf_filter",),
        "a loss that is not finite ends the training, with its batch saved; leave it out",
        recipes=OBJECTIVES,
    ),
)  # fmt: skip

# Refused by value, where it is resolved (`check_resolved`).
ACCELERATOR_KEYS = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler")


def check_flags(arguments: Any) -> None:
    """Refuse every flag that would take no effect.

    Args:
        arguments: `RecipeArguments` before `TrainingArguments` rewrites them. With `recipe_name` None (a custom
            trainer) only what all recipes refuse is refused.

    Raises:
        ValueError: with the flag, its value, why it cannot take effect, and the remedy.
    """
    usual, name = {field.name: field for field in dataclasses.fields(arguments)}, arguments.recipe_name
    for refusal in REFUSALS:
        if (name is None and refusal.recipes != RECIPES) or (name is not None and name not in refusal.recipes):
            continue
        for flag in refusal.flags:
            if flag not in usual:  # another release of transformers
                continue
            value = getattr(arguments, flag)
            if _same(value, default_of(usual[flag])) or (refusal.unless is not None and refusal.unless(arguments)):
                continue
            shown = "..." if flag == "hub_token" else _value(value)
            raise ValueError(f"--{flag} {shown}: {refusal.why}")
    _check_reporters(arguments.report_to)


def is_offered(name: str, metadata: Mapping[str, Any], recipe: str | None) -> bool:
    """Whether the help of a recipe lists a flag; flags that are always refused are not listed."""
    refused = [refusal for refusal in REFUSALS if name in refusal.flags and refusal.unless is None]
    return recipe is None or (
        recipe in metadata.get("recipes", RECIPES) and not any(recipe in refusal.recipes for refusal in refused)
    )


def check_resolved(arguments: Any) -> None:
    """Refuse settings of the accelerator that change rows or order; `TrainingArguments` resolves them first."""
    from transformers.trainer_pt_utils import AcceleratorConfig

    given, usual = arguments.accelerator_config, AcceleratorConfig()
    for key in ACCELERATOR_KEYS:
        if getattr(given, key) != getattr(usual, key):
            raise ValueError(
                f"--accelerator_config {key}={getattr(given, key)}: the rows of a batch, and exact resume, depend "
                f"on {key}={getattr(usual, key)}; leave it out"
            )


def check_trainer(trainer: Any) -> None:
    """Refuse flags without effect on this model, these data or these evaluators.

    Raises:
        ValueError: with the flag and the remedy.
    """
    from mllm_vision.data.streams.streams import StreamDataset

    args, model, dataset = trainer.args, trainer.model, trainer.train_dataset
    strategy = _value(args.train_sampling_strategy)
    if isinstance(dataset, StreamDataset):
        if strategy != "random":
            raise ValueError(f"--train_sampling_strategy {strategy}: a stream is shuffled by itself; leave it out")
        if args.data_seed not in (None, args.seed):
            raise ValueError(f"--data_seed {args.data_seed}: the order of a stream comes from --seed; leave it out")
    elif strategy == "group_by_length" and not hasattr(dataset, "lengths"):
        raise ValueError(
            f"--train_sampling_strategy {strategy}: {type(dataset).__name__} has no lengths; give random or "
            "sequential (with --pack_turns all rows have the same length)"
        )
    if args.eval_on_start and not trainer.evaluators and trainer.eval_dataset is None:
        raise ValueError("--eval_on_start: there is nothing to evaluate on; name --eval_dataset_name, or leave it out")
    if args.neftune_noise_alpha is not None:
        training = model.training
        trains = model.train().get_input_embeddings().training  # a frozen language model stays in evaluation mode
        model.train(training)
        if not trains:
            raise ValueError(
                f"--neftune_noise_alpha {args.neftune_noise_alpha}: the language model is frozen and gets no noise; "
                "leave it out, or train it (--train full or lora)"
            )


def length_sampler(dataset: Any, args: Any) -> Any:
    """For `--train_sampling_strategy group_by_length`, a sampler by the tokens of each row (`dataset.lengths`)."""
    from transformers.trainer_pt_utils import LengthGroupedSampler

    lengths = getattr(dataset, "lengths", None)
    if lengths is None or _value(args.train_sampling_strategy) != "group_by_length":
        return None
    rows = args.train_batch_size * args.gradient_accumulation_steps
    return LengthGroupedSampler(rows, lengths=[int(length) for length in lengths])


def _check_reporters(report_to: Any) -> None:
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    there = get_available_reporting_integrations()
    for name in _reporters(report_to):
        if name not in ("none", "all", *there):
            raise ValueError(
                f"--report_to {name}: not installed, or unknown to transformers; installed are "
                f"{', '.join(there) or 'none'} (pip install {name}; or leave it out: metrics.jsonl has every figure)"
            )


def _same(value: Any, usual: Any) -> bool:
    return value == usual or (value in (None, [], "", {}) and usual in (None, [], "", {}))
