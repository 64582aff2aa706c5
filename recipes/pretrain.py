"""Stage zero: an image tower and a text tower learn one space from image-text pairs, by contrast.

    python recipes/pretrain.py --dataset_name pairs.parquet --tokenizer runs/lm/model --output_dir runs/pretrain

Leaves <output_dir>/encoder (the vision encoder, a native checkpoint) and <output_dir>/dual (the pair: with two
CLIP or two SigLIP towers a native model that pipeline("zero-shot-image-classification") runs).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mllm_vision.data.streams.flags import StreamArguments
from mllm_vision.objectives.registry import list_objectives
from mllm_vision.training.recipe.common import CommonArguments
from mllm_vision.training.recipe.help import show_help
from mllm_vision.training.recipe.parser import parse_recipe, peek_recipe, recipe_dict, run_recipe

logger = logging.getLogger(__name__)


@dataclass
class PretrainArguments:
    """What the pairs are, and which towers meet in which objective."""

    dataset_name: str = field(metadata={"help": "Pairs: a file, folder, pattern or Hub id."})
    objective: str = field(
        default="clip",
        metadata={
            "help": f"{', '.join(list_objectives('image_text'))}, or package.module:Class of your own.",
            "imports": True,
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that relative image paths start from."})
    image_column: str | None = field(default=None, metadata={"help": "Image column, where its name does not tell."})
    caption_column: str | None = field(default=None, metadata={"help": "Caption column, likewise."})
    label_column: str | None = field(default=None, metadata={"help": "Label column of the zero-shot set."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use at most so many rows, drawn at random."})
    encoder: str = field(
        default="clip_vision_model",
        metadata={"help": "Path, Hub id, or a model type to build.", "aliases": ["model_name_or_path"]},
    )
    encoder_overrides: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Config fields of a built encoder: hidden_size=128,patch_size=8"}
    )
    image_size: int | None = field(default=None, metadata={"help": "Side of the square image in pixels."})
    text_tower: str | None = field(
        default=None, metadata={"help": "Path, Hub id, clip_text_model or siglip_text_model; default: the encoder's."}
    )
    text_overrides: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Config fields of a built text tower: hidden_size=128"}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Path or Hub id; default: the text tower's."})
    embed_dim: int | None = field(default=None, metadata={"help": "Width of the shared space; default: the narrower."})
    max_text_length: int | None = field(default=None, metadata={"help": "Tokens; default 77 (CLIP), 64 (SigLIP)."})
    crop_scale: list[float] = field(
        default_factory=lambda: [0.9, 1.0], metadata={"help": "Share of the image a training crop keeps."}
    )
    encoder_learning_rate: float | None = field(default=None, metadata={"help": "Of the image tower alone."})
    text_learning_rate: float | None = field(default=None, metadata={"help": "Of the text tower alone."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Pairs for retrieval R@1/5/10."})
    eval_split: str | None = field(default=None, metadata={"help": "Its split; default: validation, or the only one."})
    max_eval_samples: int | None = field(default=1000, metadata={"help": "Images in retrieval, at most."})
    zero_shot_dataset_name: str | None = field(default=None, metadata={"help": "Labelled images for zero-shot."})
    zero_shot_split: str | None = field(default=None, metadata={"help": "Its split; default: test, or the only one."})
    templates: list[str] = field(
        default_factory=lambda: ["a photo of a {}."], metadata={"help": "Prompts of zero-shot, {} is the class."}
    )


@dataclass
class Arguments(CommonArguments):
    """Defaults of the CLIP paper; any TrainingArguments name works."""

    recipe_name: ClassVar[str] = "pretrain"

    learning_rate: float | None = 5e-4
    weight_decay: float = 0.2
    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-6
    warmup_steps: float = 0.05
    per_device_train_batch_size: int = 256
    per_device_eval_batch_size: int = 64
    max_grad_norm: float = 1.0
    eval_strategy: str = "steps"
    eval_steps: float = 0.2


def main(argv: list[str] | None = None, *, callbacks: list | None = None) -> None:
    show_help(PretrainArguments, Arguments, argv=argv, description=__doc__)  # before torch is imported
    from mllm_vision.objectives import ImageTextObjective, load_objective

    name = peek_recipe("objective", "clip", argv=argv)
    method = load_objective(name)
    if not issubclass(method, ImageTextObjective):
        raise ValueError(f"objective {name!r} takes no image-text pairs, and this recipe trains on pairs")
    own, arguments, config, streams = parse_recipe(
        PretrainArguments,
        Arguments,
        method.Config,
        StreamArguments,
        argv=argv,
        description=__doc__,
        defaults=method.defaults_beside(peek_recipe("optim", argv=argv)),
    )
    steps, rows = arguments.gradient_accumulation_steps, arguments.per_device_train_batch_size
    method.check_accumulation(steps, rows, arguments.embed_batch_size)

    from mllm_vision.data import ImageTransform, PairCollator, PairDataset, StreamDataset, bind_columns, load_records
    from mllm_vision.encoder.sources import is_model_type
    from mllm_vision.encoder.text.towers import CLIP_TEXT, SIGLIP_TEXT
    from mllm_vision.evaluation import Geometry
    from mllm_vision.training.recipe.module_audit import ModuleAudit
    from mllm_vision.training.recipe.run import Run
    from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer

    named = {"image": own.image_column, "caption": own.caption_column, "label": own.label_column}
    overrides = {role: column for role, column in named.items() if column}
    where = {"split": own.dataset_split, "config_name": own.dataset_config_name, "max_rows": own.max_train_samples}
    where["image_root"] = own.image_root
    if streams.streaming:
        stream = streams.open(own.dataset_name, **where, seed=arguments.seed, max_steps=arguments.max_steps)
    records = stream.head() if streams.streaming else load_records(own.dataset_name, **where)
    columns = bind_columns(records, ("image", "caption"), overrides)
    run = Run("stage_zero", arguments, recipe_dict(own, arguments, config, streams))
    run.start()
    run.describe_data("train", stream if streams.streaming else records, columns)

    model_types = (CLIP_TEXT, SIGLIP_TEXT)  # of texts; the weights of a model type come from no parent
    for role, source in (("encoder", own.encoder), ("text_tower", own.text_tower), ("tokenizer", own.tokenizer)):
        if source and source not in model_types and not is_model_type(source):
            run.inherit(role, source)
    dual = build_pair(own, method)
    objective = method(dual, config)
    evaluators = build_evaluators(own, overrides, run, arguments.per_device_eval_batch_size)
    if not evaluators:
        if arguments.load_best_model_at_end:
            raise ValueError("--load_best_model_at_end needs --eval_dataset_name or --zero_shot_dataset_name")
        arguments.eval_strategy = "no"
    rates = {"vision": own.encoder_learning_rate, "text": own.text_learning_rate, "head": None}
    transform = ImageTransform(dual.vision.processor, train=True, scale=tuple(own.crop_scale))
    dataset = PairDataset(records, columns, transform=transform, seed=arguments.seed)
    if streams.streaming:
        dataset = StreamDataset(stream, dataset)
    trainer = ObjectiveTrainer(
        model=objective,
        args=arguments,
        train_dataset=dataset,
        data_collator=PairCollator(transform, dual.tokenizer, dual.max_text_length),
        callbacks=callbacks,
        run=run,
        learning_rates={f"dual.{tower}": rates[tower] for tower in ("vision", "text")},
        bad_samples=dataset.bad_samples,
        evaluators=evaluators,
    )
    peaks = {name: rate or arguments.learning_rate for name, rate in rates.items()}
    parts = groups(dual)
    parts["head"] |= dict(objective.named_parameters(recurse=False))  # ITC's temperature
    audit = ModuleAudit(parts, peaks)
    run.record["modules"] = audit.rows
    logger.info("%s", audit)
    trainer.measure_before("untrained" if is_model_type(own.encoder) else "before_training")
    if own.eval_dataset_name:  # not for a verdict: it shows a collapse, and draws the spectrum
        paired = evaluators[0]
        limits = {"limit": own.max_eval_samples, "batch_size": paired.batch_size}
        evaluators = [*evaluators, Geometry("geometry", paired.records, paired.columns, **limits)]
    trainer.train()

    run.save_artifact(dual.vision.save_pretrained, "encoder", "encoder")
    run.save_artifact(dual.save_pretrained, "dual", "dual")
    run.after_training("audit of the parts", audit.close, severe=True)
    trainer.final_evaluation(dual, "dual", evaluators)
    run.finish()


def build_pair(own: PretrainArguments, method: Any) -> Any:
    """The two towers, loaded or built, with what the objective needs (scripts/doctor.py examines the same ones)."""
    from mllm_vision.encoder.dual import build_dual

    return build_dual(
        own.encoder,
        text_tower=own.text_tower,
        tokenizer=own.tokenizer,
        encoder_overrides=own.encoder_overrides,
        text_overrides=own.text_overrides,
        image_size=own.image_size,
        embed_dim=own.embed_dim,
        max_text_length=own.max_text_length,
        logit_bias=0.0 if method.has_bias else None,  # the objective sets its initial value
    )


def build_evaluators(own: PretrainArguments, overrides: dict[str, str], run: Any, batch_size: int) -> list:
    """Retrieval and zero-shot, each where its data set is named."""
    from mllm_vision.data import bind_columns, load_records
    from mllm_vision.data.records.records import UsualSplit
    from mllm_vision.evaluation import Retrieval, ZeroShot

    evaluators: list[Any] = []
    if own.eval_dataset_name:
        split = own.eval_split or UsualSplit("validation", "--eval_split")
        records = load_records(own.eval_dataset_name, split=split, image_root=own.image_root)
        columns = bind_columns(records, ("image", "caption"), overrides)
        run.describe_data("validation", records, columns)
        limits = {"limit": own.max_eval_samples, "batch_size": batch_size}
        evaluators.append(Retrieval("retrieval", records, columns, distinct=True, **limits))
    if own.zero_shot_dataset_name:
        split = own.zero_shot_split or UsualSplit("test", "--zero_shot_split")
        records = load_records(own.zero_shot_dataset_name, split=split, image_root=own.image_root)
        columns = bind_columns(records, ("image", "label"), overrides)
        run.describe_data("zero_shot", records, columns)
        evaluators.append(ZeroShot("zero_shot", records, None, own.templates, columns, batch_size))
    return evaluators


def groups(dual: Any) -> dict[str, dict[str, Any]]:
    """Parameters of the pair by module group."""
    found: dict[str, dict[str, Any]] = {"vision": {}, "text": {}, "head": {}}
    for name, value in dual.named_parameters():
        found.get(name.partition(".")[0], found["head"])[name] = value
    return found


if __name__ == "__main__":
    run_recipe(main)
