"""Stage zero without texts: train a vision encoder on images only, by the method of --objective.

    python recipes/pretrain_images.py --objective simclr --dataset_name cifar10_train.parquet \\
        --encoder vit_tiny_patch4 --image_size 32 --output_dir runs/simclr

Writes <output_dir>/encoder, a native checkpoint. By default optimizer, rate and schedule are the paper's where they fit
the encoder. With a labelled test set (--eval_dataset_name) kNN and a linear probe measure the encoder during the
training; only supcon, contrastive and triplet train on labels. Every method has its own flags and defaults: --help all
--objective byol lists those of byol.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from mllm_vision.data.images.flags import ImageArguments
from mllm_vision.data.streams.flags import StreamArguments
from mllm_vision.encoder.flags import EncoderArguments
from mllm_vision.evaluation.labelled.flags import LabelledArguments
from mllm_vision.objectives.registry import list_objectives
from mllm_vision.training.recipe.common import CommonArguments
from mllm_vision.training.recipe.help import show_help
from mllm_vision.training.recipe.parser import parse_recipe, peek_recipe, recipe_dict, run_recipe

logger = logging.getLogger(__name__)

NEXT = "mllm-vision align --encoder {artifact} --llm LANGUAGE_MODEL --dataset_name CAPTIONS --output_dir runs/align"
MEASURE = "mllm-vision evaluate --model {artifact} --task board --dataset_name IMAGES"  # after a run without evaluation


@dataclass(kw_only=True)
class PretrainImagesArguments(EncoderArguments, ImageArguments):
    """Encoder, images and method."""

    objective: str = field(
        default="simclr",
        metadata={"help": f"{', '.join(list_objectives('images'))}, or package.module:Class.", "imports": True},
    )
    sync_batch_norm: bool = field(
        default=False, metadata={"help": "Normalise the encoder's BatchNorm over all processes.", "rare": True}
    )

    def build_encoder(self) -> Any:
        from mllm_vision.modules.batch_norm import make_batch_norm_global

        encoder = super().build_encoder()
        if self.sync_batch_norm and not make_batch_norm_global(encoder):
            raise ValueError(f"--sync_batch_norm: {self.encoder} has no BatchNorm; leave it out")
        return encoder


@dataclass
class Arguments(CommonArguments):
    """Any TrainingArguments name works; the method chooses optimizer, rate and schedule."""

    recipe_name: ClassVar[str] = "pretrain_images"

    num_train_epochs: float = 100
    per_device_train_batch_size: int = 256
    per_device_eval_batch_size: int = 256
    eval_strategy: str = "steps"
    eval_steps: float = 0.2


def main(argv: list[str] | None = None, *, callbacks: list | None = None) -> None:
    show_help(PretrainImagesArguments, LabelledArguments, Arguments, argv=argv, description=__doc__)  # imports no torch
    from mllm_vision.data.views.views import ViewArguments
    from mllm_vision.objectives import ImageObjective, load_objective

    name = peek_recipe("objective", "simclr", argv=argv)
    method = load_objective(name)
    if not issubclass(method, ImageObjective):
        raise ValueError(f"objective {name!r} trains on image-text pairs: use recipes/pretrain.py")
    kinds = (PretrainImagesArguments, Arguments, method.Config, ViewArguments, LabelledArguments, StreamArguments)
    defaults = method.defaults_beside(peek_recipe("optim", argv=argv), peek_recipe("encoder", "vit", argv=argv))
    flags = parse_recipe(*kinds, argv=argv, description=__doc__, defaults=defaults)
    arguments = flags[1]
    steps, rows = arguments.gradient_accumulation_steps, arguments.per_device_train_batch_size
    method.check_accumulation(steps, rows, arguments.embed_batch_size)
    train(method, flags, callbacks)


def train(method: Any, flags: tuple, callbacks: Any) -> None:
    """Data, encoder, training, artifact, evaluation."""
    from mllm_vision.data import ImageCollator, StreamDataset
    from mllm_vision.data.views.views import WHOLE, ViewMaker
    from mllm_vision.evaluation.maps.views import view_samples
    from mllm_vision.modules.audit import ModuleAudit
    from mllm_vision.training.recipe.run import Run
    from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer

    own, arguments, config, view_flags, labelled, streams = flags
    if streams.streaming and method.needs_features:
        raise ValueError(f"{method.__name__} iterates over all rows before an epoch: leave --streaming out")
    records, stream = own.open(streams, arguments)
    run = Run("stage_zero", arguments, recipe_dict(*flags))
    run.start()
    if not own.is_built:
        run.inherit("encoder", own.encoder)
    encoder = own.build_encoder()
    objective = method(encoder, config)
    make_views = ViewMaker.for_objective(objective, view_flags)
    logger.info("%s: %s", own.objective, make_views)
    whole = own.dataset(records, encoder, seed=arguments.seed)
    labelled.check_labels(whole, streams.streaming, objective=own.objective * ("labels" in objective.columns()))
    dataset = whole if stream is None else StreamDataset(stream, whole)
    facts = {"unlabelled": whole.unlabelled} if stream is None else {}
    run.describe_data("train", records if stream is None else stream, whole.columns, **facts)
    before, after = labelled.prepare(records, own, arguments, run)
    trainer = ObjectiveTrainer(
        model=objective,
        args=arguments,
        train_dataset=dataset,
        data_collator=ImageCollator(),
        callbacks=callbacks,
        run=run,
        learning_rates={"encoder": own.encoder_learning_rate},
        bad_samples=dataset.bad_samples,
        evaluators=before,
        make_views=make_views,
        make_plain_views=ViewMaker.for_encoder(WHOLE, encoder),
    )
    optimizers = (arguments.optim.value, own.objective, method.default_optimizers())
    logger.info("optimizer: %s (%s's default: %s)", *optimizers)
    rates = {"encoder": own.encoder_learning_rate or arguments.learning_rate}
    audit = ModuleAudit.of_children(objective, rates, arguments.learning_rate)
    run.record["modules"], run.record["artifact_is"] = audit.rows, objective.artifact_is
    logger.info("%s", audit)
    audit.warn_of_heavy("encoder")
    trainer.measure_before("untrained" if own.is_built else "before_training", after)
    after = labelled.with_geometry(after)
    trainer.train()

    saved = objective.artifact_encoder
    run.save_artifact(saved.save_pretrained, "encoder", "encoder")
    run.after_training("audit of the parts", audit.close, severe=True)
    trainer.final_evaluation(saved, "encoder", after)
    draw = partial(view_samples, records, whole.columns["image"], make_views, encoder.processor, seed=arguments.seed)
    run.record["arrays"]["views"] = run.after_training("drawing of the views", draw) or []
    run.finish(next=NEXT if after else MEASURE)


if __name__ == "__main__":
    run_recipe(main)
