"""Stage two: train the aligned model to answer: connector and language model, and on request the encoder.

    python recipes/instruct.py --model runs/align/model --dataset_name questions.parquet --output_dir runs/instruct

Reads question-answer columns, `messages`, or LLaVA's `conversations`. Writes <output_dir>/model: a folder that plain
transformers loads (adapters merged). The answer accuracy by question type is compared with the majority's.
Without stage one: --encoder and --llm in place of --model.
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

NEXT = "mllm-vision chat --model {artifact} --image IMAGE"


@dataclass(kw_only=True)
class InstructArguments(TuningArguments, ModelArguments, ChatDataArguments):
    """The model, which of its parts train, and the conversations."""

    train: list[str] = field(
        default_factory=lambda: ["connector", "language_model"],
        metadata={"help": "Parts that train: encoder, connector, language_model; each in full, or =lora or =dora."},
    )
    question_column: str | None = field(default=None, metadata=COLUMN)
    answer_column: str | None = field(default=None, metadata=COLUMN)
    max_turns: int | None = field(default=None, metadata={"help": "Maximum questions in a sample.", "rare": True})
    shuffle_turns: bool = field(default=True, metadata={"help": "Ask an image's questions in a new order each epoch."})
    pack_turns: bool = field(
        default=False, metadata={"help": "Train an image's questions as separate samples at the cost of one."}
    )
    max_new_tokens: int = field(default=12, metadata={"help": "The length limit of an answer in the evaluation."})

    def asked(self, data: Any, processor: Any, batch_size: int, streaming: bool) -> Any:
        """The evaluator on held-out questions, with the most frequent training answers as baseline."""
        from mllm_vision.evaluation.language.question_answering import QuestionAnswering

        paired = {"question", "answer"} <= set(data.columns) and data.columns == data.eval_columns
        return QuestionAnswering(
            "answers",
            data.eval_records,
            data.eval_columns,
            processor,
            max_new_tokens=self.max_new_tokens,
            batch_size=batch_size,
            training_answers=data.train_records if paired and not streaming else None,  # a stream is read only once
        )


@dataclass
class Arguments(CommonArguments):
    """Defaults of LLaVA-1.5's second stage (arXiv:2310.03744, table 9); any TrainingArguments name works."""

    recipe_name: ClassVar[str] = "instruct"

    learning_rate: float | None = 2e-5
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 32
    num_train_epochs: float = 1.0
    warmup_steps: float = 0.03


def main(argv: list[str] | None = None, *, callbacks: list | None = None) -> None:
    show_help(InstructArguments, Arguments, argv=argv, description=__doc__)  # imports no torch
    from mllm_vision.vlm.systems import load_system

    settings = load_system(peek_recipe("system", "llava15", argv=argv)).Config
    flags = parse_recipe(InstructArguments, Arguments, settings, StreamArguments, argv=argv, description=__doc__)
    own, arguments, settings, streams = flags
    own.check_model()
    own.check_train(arguments)
    own.check_cache(streams.streaming)

    from mllm_vision.modules.audit import audit_table
    from mllm_vision.training.recipe.run import Run
    from mllm_vision.training.trainer.recipe_trainer import RecipeTrainer
    from mllm_vision.vlm import FreezeProof, HeldOutLoss, audit, merge_adapters, save_vlm
    from mllm_vision.vlm.conversation import label_preview, set_chat_template

    run = Run("stage_two", arguments, recipe_dict(*flags))
    run.start()
    task, processor = own.open(run, settings, dtype=own.dtype, blind=own.blind)
    set_chat_template(processor, own.chat_template, task)

    turns = {"max_turns": own.max_turns, "shuffle_turns": own.shuffle_turns, "pack_turns": own.pack_turns}
    data = own.load_stage_data(task, processor, arguments, streams, **turns)
    run.describe_data("train", data.train_records, data.columns)
    refused = dict(data.evaluation.bad_samples.reasons)
    run.describe_data("validation", data.eval_records, data.eval_columns, refused=refused)
    heldout = HeldOutLoss("conversations", data.evaluation, data.collator, arguments.per_device_eval_batch_size)
    evaluators = [heldout]
    if data.asks_single_questions:
        evaluators.append(own.asked(data, processor, arguments.per_device_eval_batch_size, streams.streaming))

    own.prepare(task)
    own.cache(task, processor, data, arguments)
    rows = audit(task, arguments.learning_rate, own.rates, arguments.weight_decay, own.weight_decays)
    proof = FreezeProof(task, rows)
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
        evaluators=evaluators,
    )
    trainer.measure_before("untrained", [heldout])
    trainer.train()

    # before saving, which merges the adapters
    run.after_training("freeze audit", proof.verify, task, trainer.steps, severe=True)
    run.save_artifact(lambda path: save_vlm(task, processor, path), own.artifact_name, "vlm")
    run.after_training("merging of the adapters", merge_adapters, task, everywhere=True)  # as the main process did
    trainer.final_evaluation(task, own.artifact_name)
    run.finish(next=NEXT, freeze_problems=proof.problems, modules=proof.rows)


if __name__ == "__main__":
    run_recipe(main)
