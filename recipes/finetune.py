"""Fine-tuning: train an encoder of stage zero and a linear layer on labelled images.

    python recipes/finetune.py --encoder runs/simclr/encoder --dataset_name cifar10_train.parquet \\
        --eval_dataset_name cifar10_test.parquet --output_dir runs/simclr_finetuned

Writes <output_dir>/encoder (the fine-tuned encoder, a native checkpoint) and <output_dir>/classifier (encoder and
linear layer: of a ViT or ResNet a native model that pipeline("image-classification") runs).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mllm_vision.data.images.flags import ImageArguments
from mllm_vision.encoder.flags import EncoderArguments
from mllm_vision.training.recipe.common import CommonArguments
from mllm_vision.training.recipe.help import show_help
from mllm_vision.training.recipe.parser import parse_recipe, recipe_dict, run_recipe

logger = logging.getLogger(__name__)

NEXT = "mllm-vision evaluate --model {artifact} --task board --dataset_name IMAGES"


@dataclass(kw_only=True)
class FinetuneArguments(EncoderArguments, ImageArguments):
    """Encoder, labelled images and evaluation."""

    encoder: str = field(
        metadata={
            "help": "A path or Hub id, or a name to build: vit_small, clip_vit_base, resnet50 (docs/encoder.md).",
            "aliases": ["model_name_or_path"],
        }
    )
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Labelled images to measure accuracy on."})
    eval_split: str | None = field(default=None, metadata={"help": "Their split; by default test, or the only one."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Maximum test images, drawn at random."})


@dataclass
class Arguments(CommonArguments):
    """Defaults of fine-tuning a ViT (MAE, appendix A.1); any TrainingArguments name works."""

    recipe_name: ClassVar[str] = "finetune"

    learning_rate: float | None = 1e-3
    weight_decay: float = 0.05
    layer_decay: float | None = 0.75
    warmup_steps: float = 0.05
    lr_scheduler_type: str = "cosine"
    num_train_epochs: float = 50
    per_device_train_batch_size: int = 256
    per_device_eval_batch_size: int = 256
    eval_strategy: str = "epoch"


def main(argv: list[str] | None = None, *, callbacks: list | None = None) -> None:
    show_help(FinetuneArguments, Arguments, argv=argv, description=__doc__)  # before torch is imported
    from mllm_vision.data.views.views import ViewArguments
    from mllm_vision.objectives.classification import Classification

    kinds = (FinetuneArguments, Arguments, Classification.Config, ViewArguments)
    flags = parse_recipe(*kinds, argv=argv, description=__doc__)
    train(flags, callbacks)


def train(flags: tuple, callbacks: Any) -> None:
    """Data, encoder, training, artifacts, evaluation."""
    from mllm_vision.data import ImageCollator, load_records
    from mllm_vision.data.records.records import UsualSplit
    from mllm_vision.data.views.draws import View
    from mllm_vision.data.views.views import ViewMaker, ViewPolicy
    from mllm_vision.evaluation import ClassifierAccuracy, LabelledImages
    from mllm_vision.evaluation.labelled.classifier import save_classifier
    from mllm_vision.modules.audit import ModuleAudit
    from mllm_vision.objectives.classification import Classification
    from mllm_vision.training.recipe.run import Run
    from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer

    own, arguments, config, view_flags = flags
    records = own.load()
    run = Run("stage_zero", arguments, recipe_dict(*flags))
    run.start()
    if not own.is_built:
        run.inherit("encoder", own.encoder)
    encoder = own.build_encoder()
    dataset = own.dataset(records, encoder, seed=arguments.seed, labelled=True)
    run.describe_data("train", records, dataset.columns, unlabelled=dataset.unlabelled)
    names = class_names(dataset)
    config.classes = config.classes or len(names)
    if config.classes < len(names):
        raise ValueError(f"--classes {config.classes}: the training labels have {len(names)} classes ({names[:4]}...)")
    objective = Classification(encoder, config)
    policy = ViewPolicy((View(scale=(0.35, 1.0)),), "fine-tuning", resample="bicubic")
    evaluators = []
    if own.eval_dataset_name:
        split = own.eval_split or UsualSplit("test", "--eval_split")
        test = load_records(own.eval_dataset_name, split=split, image_root=own.image_root)
        limits = {"test_limit": own.max_eval_samples, "batch_size": arguments.per_device_eval_batch_size}
        evaluators = [ClassifierAccuracy("test", LabelledImages(records, test, own.columns, **limits))]
        run.describe_data("test", test, evaluators[0].data.test_columns)
    else:
        arguments.eval_strategy = "no"
    trainer = ObjectiveTrainer(
        model=objective,
        args=arguments,
        train_dataset=dataset,
        data_collator=ImageCollator(),
        callbacks=callbacks,
        run=run,
        learning_rates={"encoder": own.encoder_learning_rate},
        bad_samples=dataset.bad_samples,
        evaluators=evaluators,
        make_views=ViewMaker.for_encoder(policy, encoder, view_flags),
    )
    rates = {"encoder": own.encoder_learning_rate or arguments.learning_rate}
    audit = ModuleAudit.of_children(objective, rates, arguments.learning_rate)
    run.record["modules"] = audit.rows
    trainer.train()

    run.save_artifact(encoder.save_pretrained, "encoder", "encoder")
    padded = [*names, *(f"class {index}" for index in range(len(names), config.classes))]
    run.save_artifact(lambda path: save_classifier(encoder, objective.head, padded, path), "classifier", "classifier")
    run.after_training("audit of the parts", audit.close, severe=True)
    trainer.final_evaluation(objective, "classifier")
    run.finish(next=NEXT)


def class_names(dataset: Any) -> list[str]:
    """Names of the classes by label.

    Raises:
        ValueError: no labels.
    """
    if dataset.labels is None:
        raise ValueError("fine-tuning needs labels, and the data have none; set --label_column")
    return list(dataset.class_names)


if __name__ == "__main__":
    run_recipe(main)
