"""Stage one: connect a frozen vision encoder to a frozen language model by training a connector on captions.

    python recipes/align.py --encoder runs/encoder --llm runs/language_model/model --system llava15 \\
        --dataset_name pairs.parquet --output_dir runs/align

Writes <output_dir>/model: a folder that plain transformers loads. The loss on held-out captions is compared with that
of the untrained connector, of shuffled images and of none. Further stages before stage two: the same with --model.
Next: recipes/instruct.py --model <output_dir>/model
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from mllm_vision.data.flags import COLUMN
from mllm_vision.data.streams.flags import StreamArguments
from mllm_vision.training.recipe.common import CommonArguments
from mllm_vision.training.recipe.help import show_help
from mllm_vision.training.recipe.parser import parse_recipe, peek_recipe, recipe_dict, run_recipe
from mllm_vision.vlm.flags import ChatDataArguments, ModelArguments, TuningArguments

NEXT = "mllm-vision instruct --model {artifact} --dataset_name QUESTIONS --output_dir runs/instruct"


@dataclass(kw_only=True)
class AlignArguments(TuningArguments, ModelArguments, ChatDataArguments):
    """The model, which of its parts train, and the captions."""

    caption_column: str | None = field(default=None, metadata=COLUMN)
    chat_template: str = "plain"
    sample_count: int = field(
        default=100, metadata={"help": "Held-out images to caption and score at the end; 0: none."}
    )
    max_new_tokens: int = field(default=40, metadata={"help": "The length limit of these captions."})

    def captioning(self, data: Any, processor: Any, batch_size: int) -> list[Any]:
        """The evaluator that captions held-out images, or none."""
        from mllm_vision.evaluation.language.captions import Captioning

        limits: dict[str, Any] = {"limit": self.sample_count, "max_new_tokens": self.max_new_tokens}
        if not self.sample_count:
            return []
        return [
            Captioning("captioning", data.eval_records, data.eval_columns, processor, batch_size=batch_size, **limits)
        ]


@dataclass
class Arguments(CommonArguments):
    """Defaults of LLaVA-1.5's first stage (arXiv:2310.03744, table 9); any TrainingArguments name works."""

    recipe_name: ClassVar[str] = "align"

    learning_rate: float | None = 1e-3
    per_device_train_batch_size: int = 32
    num_train_epochs: float = 1.0
    warmup_steps: float = 0.03


def main(argv: list[str] | None = None, *, callbacks: list | None = None) -> None:
    show_help(AlignArguments, Arguments, argv=argv, description=__doc__)  # imports no torch
    from mllm_vision.vlm.systems import load_system

    settings = load_system(peek_recipe("system", "llava15", argv=argv)).Config
    flags = parse_recipe(AlignArguments, Arguments, settings, StreamArguments, argv=argv, description=__doc__)
    own, arguments, settings, streams = flags
    own.check_model()
    own.check_train(arguments)
    own.check_cache(streams.streaming)

    from mllm_vision.modules.audit import audit_table
    from mllm_vision.training.recipe.run import Run
    from mllm_vision.training.trainer.recipe_trainer import RecipeTrainer
    from mllm_vision.vlm import FreezeProof, HeldOutLoss, audit, merge_adapters, save_vlm
    from mllm_vision.vlm.conversation import label_preview, set_chat_template

    run = Run("stage_one", arguments, recipe_dict(*flags))
    run.start()
    task, processor = own.open(run, settings, dtype=own.dtype, blind=own.blind)
    set_chat_template(processor, own.chat_template, task)

    data = own.load_stage_data(task, processor, arguments, streams, roles=("image", "caption"))
    run.describe_data("train", data.train_records, data.columns)
    refused = dict(data.evaluation.bad_samples.reasons)
    run.describe_data("validation", data.eval_records, data.eval_columns, refused=refused)

    own.prepare(task)
    own.cache(task, processor, data, arguments)
    rows = audit(task, arguments.learning_rate, own.rates, arguments.weight_decay, own.weight_decays)
    proof = FreezeProof(task, rows)
    heldout = HeldOutLoss("captions", data.evaluation, data.collator, arguments.per_device_eval_batch_size)
    run.record["label_preview"] = label_preview(data, processor)
    if run.is_main:
        print(f"trained on: {run.record['label_preview']}\n{audit_table(rows)}", flush=True)

    trainer = RecipeTrainer(
        model=task,
        args=arguments,
        train_dataset=data.train,
        data_collator=data.train_collator,
        callbacks=callbacks,
        run=run,
        **own.by_prefix(task),
        bad_samples=data.bad_samples,
        evaluators=[heldout],
    )
    trainer.measure_before("untrained")
    trainer.train()

    # before saving, which merges the adapters
    run.after_training("freeze audit", proof.verify, task, trainer.steps, severe=True)
    run.save_artifact(lambda path: save_vlm(task, processor, path), own.artifact_name, "vlm")
    run.after_training("merging of the adapters", merge_adapters, task, everywhere=True)  # as the main process did
    captions = own.captioning(data, processor, arguments.per_device_eval_batch_size)
    trainer.final_evaluation(task, own.artifact_name, [heldout, *captions])
    run.finish(next=NEXT, freeze_problems=proof.problems, modules=proof.rows)


if __name__ == "__main__":
    run_recipe(main)
