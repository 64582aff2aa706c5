"""The flags of stages one and two, shared by their recipes. Nothing here imports torch before it is needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mllm_vision.data.flags import COLUMN, DataArguments


@dataclass(kw_only=True)
class ChatDataArguments(DataArguments):
    """Training and held-out conversations, and their chat template."""

    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out data; by default rows of the training data."}
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "Its split; by default validation, or the only one."}
    )
    max_eval_samples: int = field(default=200, metadata={"help": "Rows of the held-out data, at most."})
    conversations_column: str | None = field(default=None, metadata=COLUMN)
    messages_column: str | None = field(default=None, metadata=COLUMN)
    chat_template: str = field(default="vicuna", metadata={"help": "plain, vicuna, qa, or a Jinja file."})
    max_length: int | None = field(default=None, metadata={"help": "The longest sequence in tokens, images included."})
    on_truncation: Literal["refuse", "truncate"] = field(
        default="refuse", metadata={"help": "Leave longer ones out (refuse), or cut them.", "rare": True}
    )
    dtype: str = field(default="float32", metadata={"help": "The weights' type: float32, bfloat16 or auto."})
    blind: bool = field(default=False, metadata={"help": "Train on zeros instead of images.", "rare": True})
    artifact_name: str = field(default="model", metadata={"help": "The result's folder in output_dir.", "rare": True})

    def load_stage_data(self, model: Any, processor: Any, arguments: Any, streams: Any, **more: Any) -> Any:
        """The `StageData` of these flags; too many bad rows are refused.

        Args:
            model, processor: what is trained.
            arguments: the `RecipeArguments`.
            streams: the `StreamArguments`.
            more: for `vlm.conversation.load_stage_data`.

        Raises:
            ValueError: see `load_stage_data` and `StageData.check`.
        """
        from mllm_vision.vlm.conversation import load_stage_data

        data = load_stage_data(
            model,
            processor,
            self.dataset_name,
            self.eval_dataset_name,
            overrides=self.overrides,
            **self.where,
            eval_split=self.eval_split,
            eval_rows=self.max_eval_samples,
            max_length=self.max_length,
            on_truncation=self.on_truncation,
            seed=arguments.seed,
            streams=streams,
            max_steps=arguments.max_steps,
            **more,
        )
        data.check(arguments.max_bad_fraction)
        return data


@dataclass(kw_only=True)
class TuningArguments:
    """Which parts of the model are trained, and at which learning rates."""

    train: Literal["full", "lora", "projector"] = field(
        default="full", metadata={"help": "Projector and language model, adapters, or the projector alone."}
    )
    train_encoder: bool = field(default=False, metadata={"help": "Train the vision encoder too."})
    encoder_learning_rate: float | None = field(default=None, metadata={"help": "The rate of that part."})
    projector_learning_rate: float | None = field(default=None, metadata={"help": "The rate of that part."})
    language_model_learning_rate: float | None = field(default=None, metadata={"help": "The rate of that part."})
    lora_rank: int = field(default=16, metadata={"help": "The rank of the adapters (LLaVA-1.5: 128)."})
    lora_alpha: int = field(default=32, metadata={"help": "Their scale times the rank (LLaVA-1.5: 256).", "rare": True})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters.", "rare": True})

    @property
    def rates(self) -> dict[str, float | None]:
        """Module group -> its learning rate; None is the run's."""
        return {
            "encoder": self.encoder_learning_rate,
            "projector": self.projector_learning_rate,
            "language_model": self.language_model_learning_rate,
        }

    def prepare(self, model: Any) -> Any:
        """The model with frozen and trainable parts set; with LoRA the peft model around it."""
        from mllm_vision.vlm.freezing import add_lora, freeze

        if self.train == "lora":
            adapters: dict[str, Any] = {"rank": self.lora_rank, "alpha": self.lora_alpha, "dropout": self.lora_dropout}
            return add_lora(model, **adapters, train_encoder=self.train_encoder)
        groups = ["projector"] + ["language_model"] * (self.train == "full") + ["encoder"] * self.train_encoder
        return freeze(model, groups)
