"""Train a small language model from text files: tokenizer, packed blocks, a Llama, perplexity on held-out lines.

For machines without access to the Hub; every stage accepts any Hugging Face causal model instead.

    python recipes/language_model.py --text_files corpus.txt --output_dir runs/language_model

Writes <output_dir>/model: a LlamaForCausalLM with its tokenizer that plain transformers loads.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mllm_vision.training.recipe.common import CommonArguments
from mllm_vision.training.recipe.parser import parse_recipe, recipe_dict, run_recipe

NEXT = "mllm-vision pretrain --tokenizer {artifact} --dataset_name PAIRS --output_dir runs/pretrain"


@dataclass
class LanguageModelArguments:
    """Text, tokenizer and size of the model."""

    text_files: list[str] = field(metadata={"help": "Text files or patterns, one document a line."})
    lower_case: bool = field(default=False, metadata={"help": "Lower-case the text before anything else."})
    max_documents: int | None = field(default=None, metadata={"help": "Use only so many lines, the first ones."})
    validation_lines: int = field(default=200, metadata={"help": "Lines held out for perplexity (at most a tenth)."})
    tokenizer: str | None = field(default=None, metadata={"help": "An existing tokenizer instead of a new one."})
    vocab_size: int = field(default=1024, metadata={"help": "Maximum vocabulary size of a new tokenizer."})
    block_size: int = field(default=128, metadata={"help": "Tokens in a training block."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the model."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers."})
    num_attention_heads: int = field(default=4, metadata={"help": "Attention heads; divides hidden_size."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Width of the MLPs; by default 8/3."})
    max_position_embeddings: int = field(default=512, metadata={"help": "Maximum sequence length of the model."})
    initializer_range: float = field(default=0.02, metadata={"help": "Of the weights; 1/sqrt(width) if narrow."})
    tie_word_embeddings: bool = field(default=False, metadata={"help": "Share input and output embeddings."})
    artifact_name: str = field(default="model", metadata={"help": "Folder of the result in output_dir."})

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            heads, width = self.num_attention_heads, self.hidden_size
            near = width - width % heads or heads
            raise ValueError(f"hidden_size={width} is not divisible by num_attention_heads={heads}; use e.g. {near}")
        if not 2 <= self.block_size <= self.max_position_embeddings:
            limit = self.max_position_embeddings
            raise ValueError(f"block_size={self.block_size} is not between 2 and max_position_embeddings={limit}")

    def build(self, tokenizer: Any) -> Any:
        """The `LlamaForCausalLM` with random weights."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size or -(-self.hidden_size * 8 // 3 // 32) * 32,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_attention_heads,
            max_position_embeddings=self.max_position_embeddings,
            initializer_range=self.initializer_range,
            tie_word_embeddings=self.tie_word_embeddings,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return LlamaForCausalLM(config)


@dataclass
class Arguments(CommonArguments):
    """Defaults for a small model from scratch; any TrainingArguments name works."""

    recipe_name: ClassVar[str] = "language_model"

    learning_rate: float | None = 2e-3
    per_device_train_batch_size: int = 32
    num_train_epochs: float = 1.0
    weight_decay: float = 0.1
    warmup_steps: float = 0.05
    adam_beta2: float = 0.98


def main(argv: list[str] | None = None, *, callbacks: list | None = None) -> None:
    own, arguments = parse_recipe(LanguageModelArguments, Arguments, argv=argv, description=__doc__)

    from transformers import AutoTokenizer

    from mllm_vision.data import documents as language
    from mllm_vision.training.recipe.run import Run
    from mllm_vision.training.trainer.recipe_trainer import RecipeTrainer

    documents = language.read_documents(own.text_files, lower_case=own.lower_case, max_rows=own.max_documents)
    train, heldout = language.hold_out(documents, own.validation_lines, arguments.seed)

    run = Run("language_model", arguments, recipe_dict(own, arguments))
    run.start()
    run.describe_data("train", train)
    run.describe_data("validation", heldout)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if own.tokenizer:
            run.inherit("tokenizer", own.tokenizer)
            tokenizer = AutoTokenizer.from_pretrained(own.tokenizer)
        else:
            limits = {"vocab_size": own.vocab_size, "max_length": own.max_position_embeddings}
            tokenizer = language.train_tokenizer(train, folder, **limits)
            language.check_tokenizer(folder, documents[:200])
        if (eos := tokenizer.eos_token_id) is None:
            raise ValueError(f"--tokenizer {own.tokenizer} has no eos token, which separates documents")
        data = language.PackedBlocks(language.encode_documents(tokenizer, train, eos), own.block_size)
        test = language.PackedBlocks(language.encode_documents(tokenizer, heldout, eos), own.block_size)

        model = own.build(tokenizer)
        known = {"unigram": language.unigram_perplexity(data, test, len(tokenizer))}
        evaluator = language.Perplexity(test, batch_size=arguments.per_device_eval_batch_size, baselines=known)
        trainer = RecipeTrainer(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=data.collate,
            callbacks=callbacks,
            run=run,
            evaluators=[evaluator],
        )
        trainer.measure_before("untrained")
        trainer.train()

        def save(path: Path) -> None:
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
            if (folder / "tokenizer.model").is_file():  # beside tokenizer.json, for tools that read sentencepiece
                shutil.copy(folder / "tokenizer.model", path)

        saved = run.save_artifact(save, own.artifact_name, "language_model")
        if (folder / "tokenizer.model").is_file():
            check = (language.check_tokenizer, saved, documents[:200])
            run.after_training("check of the saved tokenizer", *check, severe=True)
        trainer.final_evaluation(model, own.artifact_name)
        samples = (language.continuations, model, tokenizer, heldout[:5])
        run.record["samples"] += run.after_training("sample continuations", *samples) or []
        run.finish(next=NEXT)


if __name__ == "__main__":
    run_recipe(main)
