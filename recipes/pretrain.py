"""Stage zero: contrastive training of an image tower and a text tower on image-text pairs.

    python recipes/pretrain.py --dataset_name pairs.parquet --tokenizer runs/lm/model --output_dir runs/pretrain

Writes <output_dir>/encoder (the vision encoder, a native checkpoint) and <output_dir>/dual (the pair: with two
CLIP or two SigLIP towers a native model that pipeline("zero-shot-image-classification") runs).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mllm_vision.data.flags import PairArguments
from mllm_vision.data.streams.flags import StreamArguments
from mllm_vision.encoder.flags import DualArguments
from mllm_vision.evaluation.pair_flags import PairEvaluationArguments
from mllm_vision.objectives.registry import list_objectives
from mllm_vision.training.recipe.common import CommonArguments
from mllm_vision.training.recipe.help import show_help
from mllm_vision.training.recipe.parser import parse_recipe, peek_recipe, recipe_dict, run_recipe

logger = logging.getLogger(__name__)

NEXT = "mllm-vision align --encoder {artifact} --llm LANGUAGE_MODEL --dataset_name CAPTIONS --output_dir runs/align"


@dataclass(kw_only=True)
class PretrainArguments(PairEvaluationArguments, DualArguments, PairArguments):
    """Pairs, towers and objective."""

    objective: str = field(
        default="clip",
        metadata={"help": f"{', '.join(list_objectives('image_text'))}, or package.module:Class.", "imports": True},
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
        raise ValueError(f"objective {name!r} does not train on image-text pairs: use recipes/pretrain_images.py")
    kinds = (PretrainArguments, Arguments, method.Config, StreamArguments)
    defaults = method.defaults_beside(peek_recipe("optim", argv=argv))
    own, arguments, config, streams = parse_recipe(*kinds, argv=argv, description=__doc__, defaults=defaults)
    steps, rows = arguments.gradient_accumulation_steps, arguments.per_device_train_batch_size
    method.check_accumulation(steps, rows, arguments.embed_batch_size)
    train(method, own, arguments, config, streams, callbacks)


def train(method: Any, own: PretrainArguments, arguments: Any, config: Any, streams: Any, callbacks: Any) -> None:
    """Data, towers, training, artifacts, evaluation."""
    from mllm_vision.data import ImageTransform, PairCollator, PairDataset, StreamDataset, bind_columns
    from mllm_vision.evaluation import Geometry
    from mllm_vision.modules.audit import ModuleAudit
    from mllm_vision.training.recipe.run import Run
    from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer

    records, stream = own.open(streams, arguments)
    columns = bind_columns(records, ("image", "caption"), own.columns)
    run = Run("stage_zero", arguments, recipe_dict(own, arguments, config, streams))
    run.start()
    run.describe_data("train", records if stream is None else stream, columns)

    for role, source in own.parents.items():
        run.inherit(role, source)
    dual = own.build_dual(has_bias=method.has_bias)
    objective = method(dual, config)
    evaluators = own.build_evaluators(own.columns, run, arguments.per_device_eval_batch_size, own.image_root)
    if not evaluators:
        if arguments.load_best_model_at_end:
            raise ValueError("--load_best_model_at_end needs --eval_dataset_name or --zero_shot_dataset_name")
        arguments.eval_strategy = "no"
    rates = {"vision": own.encoder_learning_rate, "text": own.text_learning_rate, "head": None}
    transform = ImageTransform(dual.vision.processor, train=True, scale=tuple(own.crop_scale))
    dataset = PairDataset(records, columns, transform=transform, seed=arguments.seed)
    if stream is not None:
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
    trainer.measure_before("untrained" if own.is_built else "before_training")
    if own.eval_dataset_name:  # not for a verdict: it shows a collapse
        paired = evaluators[0]
        limits = {"limit": own.max_eval_samples, "batch_size": paired.batch_size}
        evaluators = [*evaluators, Geometry("geometry", paired.records, paired.columns, **limits)]
    trainer.train()

    run.save_artifact(dual.vision.save_pretrained, "encoder", "encoder")
    run.save_artifact(dual.save_pretrained, "dual", "dual")
    run.after_training("audit of the parts", audit.close, severe=True)
    trainer.final_evaluation(dual, "dual", evaluators)
    run.finish(next=NEXT)


def groups(dual: Any) -> dict[str, dict[str, Any]]:
    """Parameters of the pair by module group."""
    found: dict[str, dict[str, Any]] = {"vision": {}, "text": {}, "head": {}}
    for name, value in dual.named_parameters():
        found.get(name.partition(".")[0], found["head"])[name] = value
    return found


if __name__ == "__main__":
    run_recipe(main)
