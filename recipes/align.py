"""Stage one: connect a frozen vision encoder to a frozen language model by training a projector on captions.

    python recipes/align.py --encoder runs/encoder --llm runs/language_model/model \\
        --dataset_name pairs.parquet --output_dir runs/align

Writes <output_dir>/model: a LLaVA directory that plain transformers loads. The loss on held-out captions is compared
with that of the untrained projector, of shuffled images and of none.
Next: recipes/instruct.py --model <output_dir>/model
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mllm_vision.data.flags import COLUMN
from mllm_vision.data.streams.flags import StreamArguments
from mllm_vision.training.recipe.common import CommonArguments
from mllm_vision.training.recipe.parser import parse_recipe, recipe_dict, run_recipe
from mllm_vision.vlm.flags import ChatDataArguments

NEXT = "mllm-vision instruct --model {artifact} --dataset_name QUESTIONS --output_dir runs/instruct"


@dataclass(kw_only=True)
class AlignArguments(ChatDataArguments):
    """Encoder, language model, projector and captions."""

    encoder: str = field(metadata={"help": "The vision encoder: a folder or Hub id."})
    llm: str = field(
        metadata={"help": "The causal language model: a folder or Hub id.", "aliases": ["model_name_or_path"]}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "The tokenizer, if it is not beside the model."})
    projector: str = field(default="mlp", metadata={"help": "The kind of projector: mlp or linear."})
    select_layer: int | None = field(default=None, metadata={"help": "The encoder's layer; by default its own choice."})
    select_feature: str | None = field(
        default=None, metadata={"help": "patch or cls_patch; by default the encoder's choice.", "rare": True}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "The side of the images; by default the encoder's own."}
    )
    caption_column: str | None = field(default=None, metadata=COLUMN)
    chat_template: str = "plain"
    sample_count: int = field(default=8, metadata={"help": "Held-out images to caption at the end."})


@dataclass
class Arguments(CommonArguments):
    """Defaults of LLaVA-1.5's first stage (arXiv:2310.03744, table 9); any TrainingArguments name works."""

    recipe_name: ClassVar[str] = "align"

    learning_rate: float | None = 1e-3
    per_device_train_batch_size: int = 32
    num_train_epochs: float = 1.0
    warmup_steps: float = 0.03


def main(argv: list[str] | None = None, *, callbacks: list | None = None) -> None:
    own, arguments, streams = parse_recipe(AlignArguments, Arguments, StreamArguments, argv=argv, description=__doc__)

    from mllm_vision.encoder import VisionEncoder
    from mllm_vision.evaluation.language.captions import caption_samples
    from mllm_vision.modules.audit import audit_table
    from mllm_vision.training.recipe.run import Run
    from mllm_vision.training.trainer.recipe_trainer import RecipeTrainer
    from mllm_vision.vlm import FreezeProof, HeldOutLoss, audit, build_vlm, freeze, save_vlm
    from mllm_vision.vlm.conversation import chat_template, label_preview

    template = chat_template(own.chat_template)
    run = Run("stage_one", arguments, recipe_dict(own, arguments, streams))
    run.start()
    run.inherit("encoder", own.encoder)
    run.inherit("language_model", own.llm)
    encoder = VisionEncoder.from_pretrained(
        own.encoder, select_layer=own.select_layer, select_feature=own.select_feature, image_size=own.image_size
    )
    model, processor = build_vlm(
        encoder, own.llm, own.projector, own.tokenizer, template, dtype=own.dtype, blind=own.blind
    )

    data = own.load_stage_data(model, processor, arguments, streams, roles=("image", "caption"))
    run.describe_data("train", data.train_records, data.columns)
    refused = dict(data.evaluation.bad_samples.reasons)
    run.describe_data("validation", data.eval_records, data.eval_columns, refused=refused)

    freeze(model, ("projector",))
    rows = audit(model, arguments.learning_rate)
    proof = FreezeProof(model, rows)
    heldout = HeldOutLoss("captions", data.evaluation, data.collator, arguments.per_device_eval_batch_size)
    run.record["label_preview"] = label_preview(data, processor)
    if run.is_main:
        print(f"trained on: {run.record['label_preview']}\n{audit_table(rows)}", flush=True)

    trainer = RecipeTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        data_collator=data.collator,
        callbacks=callbacks,
        run=run,
        bad_samples=data.bad_samples,
        evaluators=[heldout],
    )
    trainer.measure_before("untrained")
    trainer.train()

    run.save_artifact(lambda path: save_vlm(model, processor, path), own.artifact_name, "vlm")
    run.after_training("freeze audit", proof.verify, model, trainer.steps, severe=True)
    trainer.final_evaluation(model, own.artifact_name)
    samples = (caption_samples, model, processor, data.eval_records, data.eval_columns, own.sample_count)
    run.record["samples"] += run.after_training("sample captions", *samples) or []
    run.finish(next=NEXT, freeze_problems=proof.problems, modules=proof.rows)


if __name__ == "__main__":
    run_recipe(main)
