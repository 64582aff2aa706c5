"""Stage two: teach the aligned model to answer; projector and language model train, the encoder if asked to.

    python recipes/instruct.py --model runs/align/model --dataset_name questions.parquet --output_dir runs/instruct

Takes question-answer columns, `messages`, or LLaVA's `conversations`. Leaves <output_dir>/model: a LLaVA directory that
plain transformers loads (LoRA merged into it), with the answer accuracy by question type beside the majority's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mllm_vision.data.streams.flags import StreamArguments
from mllm_vision.training.recipe.common import CommonArguments
from mllm_vision.training.recipe.parser import parse_recipe, recipe_dict, run_recipe


@dataclass
class InstructArguments:
    """Which model learns, how much of it, and from which conversations."""

    model: str = field(
        metadata={
            "help": "What recipes/align.py left, or any LLaVA checkpoint: folder or Hub id.",
            "aliases": ["model_name_or_path"],
        }
    )
    dataset_name: str = field(metadata={"help": "Conversations: file, pattern, folder or Hub id."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out data; else rows of the training data."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split of the held-out data; default: validation, or the only one."}
    )
    image_root: str | None = field(default=None, metadata={"help": "Folder that relative image paths start from."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images, if not found by name."})
    messages_column: str | None = field(default=None, metadata={"help": "Column of `messages`, likewise."})
    conversations_column: str | None = field(
        default=None, metadata={"help": "Column of LLaVA conversations, likewise."}
    )
    question_column: str | None = field(default=None, metadata={"help": "Column of the question(s), likewise."})
    answer_column: str | None = field(default=None, metadata={"help": "Column of the answer(s), likewise."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use at most so many rows, drawn at random."})
    max_eval_samples: int = field(default=200, metadata={"help": "Rows of the held-out data, at most."})
    chat_template: str = field(default="vicuna", metadata={"help": "plain, vicuna, qa, or a Jinja file."})
    max_length: int | None = field(default=None, metadata={"help": "Longest sequence in tokens, images included."})
    on_truncation: Literal["refuse", "truncate"] = field(
        default="refuse", metadata={"help": "Longer ones are left out (refuse), or cut at their end (truncate)."}
    )
    max_turns: int | None = field(default=None, metadata={"help": "Questions a sample, at most; more become several."})
    shuffle_turns: bool = field(default=True, metadata={"help": "An image's questions come in a new order each epoch."})
    pack_turns: bool = field(
        default=False,
        metadata={"help": "Questions on an image do not see each other: separate samples at the cost of one."},
    )
    train: Literal["full", "lora", "projector"] = field(
        default="full", metadata={"help": "full: projector and language model; lora: adapters; projector alone."}
    )
    train_encoder: bool = field(default=False, metadata={"help": "The vision encoder learns too."})
    encoder_learning_rate: float | None = field(default=None, metadata={"help": "Of the encoder; else learning_rate."})
    projector_learning_rate: float | None = field(default=None, metadata={"help": "Of the projector, likewise."})
    language_model_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the language model, likewise."}
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters (LLaVA-1.5: 128)."})
    lora_alpha: int = field(default=32, metadata={"help": "Their scale is alpha / rank (LLaVA-1.5: 256)."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    max_new_tokens: int = field(default=12, metadata={"help": "Length limit of an answer in the evaluation."})
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32, bfloat16 or auto."})
    blind: bool = field(default=False, metadata={"help": "Zeros instead of images: what text alone can reach."})
    artifact_name: str = field(default="model", metadata={"help": "Folder of the result in output_dir."})


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
    own, arguments, streams = parse_recipe(
        InstructArguments, Arguments, StreamArguments, argv=argv, description=__doc__
    )

    from mllm_vision.evaluation.language.question_answering import QuestionAnswering
    from mllm_vision.training.recipe.run import Run
    from mllm_vision.training.trainer.recipe_trainer import RecipeTrainer
    from mllm_vision.vlm import FreezeProof, HeldOutLoss, add_lora, audit, freeze, learning_rates, load_vlm, save_vlm
    from mllm_vision.vlm.conversation import label_preview, load_stage_data, set_chat_template
    from mllm_vision.vlm.export import merge_lora
    from mllm_vision.vlm.freezing import audit_table
    from mllm_vision.vlm.tokens import settle_ends

    run = Run("stage_two", arguments, recipe_dict(own, arguments, streams))

    run.start()
    run.inherit("vlm", own.model)
    model, processor = load_vlm(own.model, dtype=own.dtype)
    model.blind = model.blind or own.blind
    set_chat_template(processor, own.chat_template)
    settle_ends(model, processor)

    data = load_stage_data(
        model,
        processor,
        own.dataset_name,
        own.eval_dataset_name,
        overrides={
            "image": own.image_column,
            "messages": own.messages_column,
            "conversations": own.conversations_column,
            "question": own.question_column,
            "answer": own.answer_column,
        },
        split=own.dataset_split,
        eval_split=own.eval_split,
        config_name=own.dataset_config_name,
        image_root=own.image_root,
        max_rows=own.max_train_samples,
        eval_rows=own.max_eval_samples,
        max_length=own.max_length,
        on_truncation=own.on_truncation,
        max_turns=own.max_turns,
        shuffle_turns=own.shuffle_turns,
        pack_turns=own.pack_turns,
        seed=arguments.seed,
        streams=streams,
        max_steps=arguments.max_steps,
    )
    data.check(arguments.max_bad_fraction)
    run.describe_data("train", data.train_records, data.columns)
    refused = dict(data.evaluation.bad_samples.reasons)
    run.describe_data("validation", data.eval_records, data.eval_columns, refused=refused)
    heldout = HeldOutLoss("conversations", data.evaluation, data.collator, arguments.per_device_eval_batch_size)
    evaluators: list = [heldout]
    if data.asks_single_questions:
        paired = {"question", "answer"} <= set(data.columns) and data.columns == data.eval_columns
        paired = paired and not streams.streaming  # the most frequent answer is not known before a pass
        asked = QuestionAnswering(
            "answers",
            data.eval_records,
            data.eval_columns,
            processor,
            max_new_tokens=own.max_new_tokens,
            batch_size=arguments.per_device_eval_batch_size,
            training_answers=data.train_records if paired else None,
        )
        evaluators.append(asked)

    trained = model
    if own.train == "lora":
        adapters = {"rank": own.lora_rank, "alpha": own.lora_alpha, "dropout": own.lora_dropout}
        trained = add_lora(model, **adapters, train_encoder=own.train_encoder)
    else:
        groups = ["projector"] + ["language_model"] * (own.train == "full") + ["encoder"] * own.train_encoder
        freeze(model, groups)
    rates = {
        "encoder": own.encoder_learning_rate,
        "projector": own.projector_learning_rate,
        "language_model": own.language_model_learning_rate,
    }
    rows = audit(trained, arguments.learning_rate, rates)
    proof = FreezeProof(trained, rows)
    run.record["label_preview"] = label_preview(data, processor)
    if run.is_main:
        print(f"what is learnt: {run.record['label_preview']}\n{audit_table(rows)}", flush=True)

    trainer = RecipeTrainer(
        model=trained,
        args=arguments,
        train_dataset=data.train,
        data_collator=data.collator,
        callbacks=callbacks,
        run=run,
        learning_rates=learning_rates(trained, rates),
        bad_samples=data.bad_samples,
        evaluators=evaluators,
    )
    trainer.measure_before("untrained", [heldout])
    trainer.train()

    # before saving, which folds the adapters in
    run.after_training("freeze audit", proof.verify, trained, trainer.steps, severe=True)
    run.save_artifact(lambda path: save_vlm(trained, processor, path), own.artifact_name, "vlm")
    run.after_training("merging of the adapters", merge_lora, trained, everywhere=True)  # the main process saved so
    trainer.final_evaluation(model, own.artifact_name)
    run.finish(freeze_problems=proof.problems, modules=proof.rows)


if __name__ == "__main__":
    run_recipe(main)
