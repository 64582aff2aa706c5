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
        default=None, metadata={"help": "Its split; by default validation, or the only one.", "rare": True}
    )
    max_eval_samples: int = field(default=200, metadata={"help": "Rows of the held-out data, at most."})
    conversations_column: str | None = field(default=None, metadata=COLUMN)
    messages_column: str | None = field(default=None, metadata=COLUMN)
    chat_template: str = field(default="vicuna", metadata={"help": "plain, vicuna, qa, or a Jinja file."})
    max_length: int | None = field(default=None, metadata={"help": "The longest sequence in tokens, images included."})
    on_truncation: Literal["refuse", "truncate"] = field(
        default="refuse", metadata={"help": "Leave longer ones out (refuse), or cut them.", "rare": True}
    )
    packing: bool = field(
        default=False, metadata={"help": "Train several samples a row of max_length tokens, in place of padding."}
    )
    loss_weights: Literal["token", "sample", "square_root"] = field(
        default="token",
        metadata={
            "help": "The mean loss over tokens, over samples, or weighted by 1/sqrt(n) of a sample's n tokens.",
            "rare": True,
        },
    )
    dtype: str = field(default="float32", metadata={"help": "The weights' type: float32, bfloat16 or auto."})
    blind: bool = field(default=False, metadata={"help": "Train on zeros instead of images.", "rare": True})
    cache_features: bool = field(
        default=False, metadata={"help": "Compute a frozen encoder's features of each training image once, on disk."}
    )
    features_dir: str | None = field(
        default=None, metadata={"help": "Their folder; by default in the cache of datasets.", "rare": True}
    )
    features_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Their type; auto is the encoder's own, without rounding.", "rare": True}
    )
    artifact_name: str = field(default="model", metadata={"help": "The result's folder in output_dir.", "rare": True})

    def check_cache(self, streaming: bool) -> None:
        """Raises ValueError for flags that exclude `--cache_features`, before anything is loaded."""
        unused = [
            name for name, plain in (("features_dir", None), ("features_dtype", "auto")) if getattr(self, name) != plain
        ]
        if unused and not self.cache_features:
            raise ValueError(f"--{unused[0]} has no effect without --cache_features; add it, or leave {unused[0]} out")
        for flag, given in {"blind": self.blind, "streaming": streaming}.items():
            if self.cache_features and given:
                raise ValueError(f"--cache_features and --{flag} are mutually exclusive; leave one of them out")

    def cache(self, task: Any, processor: Any, data: Any, arguments: Any) -> None:
        """With `--cache_features`, computes what is missing of the training images' features and reads them from disk.

        Args:
            task, processor: what is trained, its parts already frozen.
            data: the `StageData`.
            arguments: the `RecipeArguments`.

        Raises:
            ValueError: see `cache_features`.
        """
        if not self.cache_features:
            return
        import torch

        from mllm_vision.vlm.feature_cache import cache_features

        task.to(arguments.device)  # the Trainer would move it later
        layout = cache_features(
            task,
            task.system.layout(task.model, processor),
            data.samples.image_cells(),
            folder=self.features_dir,
            dtype=None if self.features_dtype == "auto" else getattr(torch, self.features_dtype),
            autocast=torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None,
            batch_size=arguments.per_device_train_batch_size,
        )
        data.use_layout(layout, processor.tokenizer)

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
            packing=self.packing,
            loss_weights=self.loss_weights,
            seed=arguments.seed,
            streams=streams,
            max_steps=arguments.max_steps,
            **more,
        )
        data.check(arguments.max_bad_fraction)
        return data


@dataclass(kw_only=True)
class ModelArguments:
    """The model: one of an earlier stage, or a new one from an encoder and a language model."""

    model: str | None = field(
        default=None, metadata={"help": "A model of an earlier stage, or any checkpoint of a system's class."}
    )
    encoder: str | None = field(
        default=None, metadata={"help": "Of a new model: the vision encoder, a folder or Hub id."}
    )
    llm: str | None = field(
        default=None,
        metadata={
            "help": "Of a new model: the causal language model, a folder or Hub id.",
            "aliases": ["model_name_or_path"],
        },
    )
    system: str = field(
        default="llava15",
        metadata={
            "help": "Of a new model: its system, as docs/systems.md lists them.",
            "imports": True,
        },
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "The tokenizer, if it is not beside the model.", "rare": True}
    )
    select_layer: int | None = field(
        default=None, metadata={"help": "The encoder's layer; by default its own choice.", "rare": True}
    )
    select_feature: str | None = field(
        default=None, metadata={"help": "patch or cls_patch; by default the encoder's choice.", "rare": True}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "The side of the images; by default the encoder's own.", "rare": True}
    )

    def check_model(self) -> None:
        """Raises ValueError unless either a model, or an encoder and a language model are named."""
        if self.model is None and (self.encoder is None or self.llm is None):
            missing = "--encoder" if self.encoder is None else "--llm"
            raise ValueError(
                f"missing: {missing} (a new model needs --encoder and --llm; --model continues an earlier one)"
            )
        given = [name for name in ("encoder", "llm", "tokenizer") if self.model and getattr(self, name) is not None]
        if given:
            raise ValueError(
                f"--model and --{given[0]} are mutually exclusive: {self.model} holds its own; leave one of them out"
            )

    def open(self, run: Any, settings: Any, *, dtype: str, blind: bool) -> tuple[Any, Any]:
        """The `LanguageTask` and its processor, with the parents recorded in ``run``.

        Args:
            run: the started `Run`.
            settings: the system's `Config`, for a new model.
            dtype, blind: see `build_vlm`.

        Raises:
            ValueError: see `build_vlm` and `load_vlm`.
        """
        from mllm_vision.encoder import VisionEncoder
        from mllm_vision.vlm import build_vlm, load_system, load_vlm

        if self.model is not None:
            run.inherit("vlm", self.model)
            task, processor = load_vlm(self.model, dtype=dtype)
            task.blind = task.blind or blind
            return task, processor
        run.inherit("encoder", self.encoder)
        for path in getattr(settings, "more_encoders", ()):
            run.inherit("encoder", path)
        run.inherit("language_model", self.llm)
        encoder = VisionEncoder.from_pretrained(
            str(self.encoder),
            select_layer=self.select_layer,
            select_feature=self.select_feature,
            image_size=self.image_size,
        )
        system = load_system(self.system)(settings)
        return build_vlm(encoder, str(self.llm), system, self.tokenizer, dtype=dtype, blind=blind)


@dataclass(kw_only=True)
class TuningArguments:
    """Which parts of the model are trained, and how."""

    train: list[str] = field(
        default_factory=lambda: ["connector"],
        metadata={"help": "Parts that train: encoder, connector, language_model; each in full, or =lora or =dora."},
    )
    encoder_learning_rate: float | None = field(default=None, metadata={"help": "The rate of that part."})
    connector_learning_rate: float | None = field(default=None, metadata={"help": "The rate of that part."})
    language_model_learning_rate: float | None = field(default=None, metadata={"help": "The rate of that part."})
    encoder_weight_decay: float | None = field(
        default=None, metadata={"help": "The weight decay of that part.", "rare": True}
    )
    connector_weight_decay: float | None = field(
        default=None, metadata={"help": "The weight decay of that part.", "rare": True}
    )
    language_model_weight_decay: float | None = field(
        default=None, metadata={"help": "The weight decay of that part.", "rare": True}
    )
    lora_rank: int = field(default=16, metadata={"help": "The rank of the adapters (LLaVA-1.5: 128).", "rare": True})
    lora_alpha: int = field(default=32, metadata={"help": "Their scale times the rank (LLaVA-1.5: 256).", "rare": True})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters.", "rare": True})

    @property
    def rates(self) -> dict[str, float | None]:
        """Module group -> its learning rate; None is the run's."""
        return {
            "encoder": self.encoder_learning_rate,
            "connector": self.connector_learning_rate,
            "language_model": self.language_model_learning_rate,
        }

    @property
    def weight_decays(self) -> dict[str, float | None]:
        """Module group -> its weight decay; None is the run's."""
        return {
            "encoder": self.encoder_weight_decay,
            "connector": self.connector_weight_decay,
            "language_model": self.language_model_weight_decay,
        }

    def by_prefix(self, task: Any) -> dict[str, dict[str, float]]:
        """The keywords `learning_rates` and `weight_decays` of `RecipeTrainer`, for the parts that train."""
        from mllm_vision.vlm.freezing import by_prefix

        return {
            "learning_rates": by_prefix(task, self.rates),
            "weight_decays": by_prefix(task, self.weight_decays),
        }

    def check_train(self, arguments: Any) -> None:
        """Raises ValueError for flags of the parts that cannot hold, before anything is loaded.

        They are a part or a way that does not exist, a rate or weight decay of a part that stays frozen or below 0, and
        a weight decay of one part beside ``--weight_decay_end``, which sets that of all.
        """
        from mllm_vision.vlm.freezing import read_groups

        trained = read_groups(self.train)
        for kind, values in (("learning_rate", self.rates), ("weight_decay", self.weight_decays)):
            for group, value in values.items():
                if value is None:
                    continue
                if group not in trained:
                    raise ValueError(
                        f"--{group}_{kind} has no effect: --train names {' '.join(self.train)}, so the {group} stays "
                        "frozen; add it to --train, or leave the flag out"
                    )
                if value < 0:
                    raise ValueError(f"--{group}_{kind} {value} must not be negative")
                if kind == "weight_decay" and arguments.weight_decay_end is not None:
                    raise ValueError(
                        f"--weight_decay_end and --{group}_weight_decay are mutually exclusive: the schedule sets the "
                        "weight decay of every part; leave one of them out"
                    )

    def prepare(self, task: Any) -> Any:
        """The task with frozen and trainable parts set, and adapters added."""
        from mllm_vision.vlm.freezing import freeze

        return freeze(task, self.train, rank=self.lora_rank, alpha=self.lora_alpha, dropout=self.lora_dropout)
