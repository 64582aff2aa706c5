"""What every stage-zero method is: a module that owns an encoder and returns a loss with metrics."""

from __future__ import annotations

import dataclasses
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.utils import ModelOutput

from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.encoder.sources import is_convolutional
from mllm_vision.encoder.stems import zero_last_norms
from mllm_vision.functional.geometry import participation_ratio, spread
from mllm_vision.objectives.base_activation import checkpoint_towers

# names of a transformer's tokens and positions, for `Objective.also_decays`
TOKENS = ("cls_token", "class_embedding", "mask_token", "register_tokens")
# What MoCo v3 trains its ViTs with (arXiv:2104.02057), in place of LARS or SGD for ResNets.
TRANSFORMER_DEFAULTS: dict[str, Any] = {
    "optim": "adamw_torch",
    "base_learning_rate": 1.5e-4,
    "lr_scaling": "linear",
    "weight_decay": 0.1,
    "warmup_steps": 0.133,  # 40 epochs of 300
}
POSITIONS = ("position_embeddings", "position_embedding", "pos_embed")


@dataclass
class ObjectiveOutput(ModelOutput):
    """`loss` is a scalar with gradient; `metrics` maps names to scalars without, logged and averaged."""

    loss: Tensor
    metrics: dict[str, Tensor] = None  # type: ignore[assignment]  # ModelOutput wants None for what is left out


def reportable(config: Any) -> Any:
    """`config` with the `to_dict` and `to_json_string` that reporters (tensorboard, wandb) call on `model.config`."""

    def to_dict() -> dict[str, Any]:
        return dataclasses.asdict(config)

    def to_json_string() -> str:
        return json.dumps(to_dict(), indent=2, default=str)

    for name, method in (("to_dict", to_dict), ("to_json_string", to_json_string)):
        if not hasattr(config, name):
            setattr(config, name, method)
    return config


class Objective(nn.Module, ABC):
    """A stage-zero method.

    The work is split in two. `embed` treats every row by itself and may run in chunks; `loss` couples the
    batch and is small in memory. `forward` names its arguments (they are the batch's columns) and returns
    `loss(embed(batch))`.

    Attributes:
        Config: a dataclass; its fields become command-line flags and YAML keys.
        citation: the paper's BibTeX entry, for the model card.
        loss_parts: names of the metrics that are parts of the loss; the report draws them in one chart.
        couples_batch: whether the loss sees all rows at once, so that splitting a batch changes it.
        chunkable: whether `embed` may run on chunks of the batch (gradient caching). Set it to False, with
            `unchunkable_reason` in words, where `loss` has to run a tower again.
        also_decays: parts of names of parameters that take weight decay besides matrices and kernels, where the
            method's official code has it so: `"cls_token"`, `"last_layer.norm"`.
        replaying: True while gradient caching embeds rows for the second time, for their gradient alone: outputs
            that carry none (a teacher's) may then be left out, if computing them draws no random numbers.
    """

    Config: ClassVar[type]
    citation: ClassVar[str] = ""
    loss_parts: ClassVar[tuple[str, ...]] = ()
    couples_batch: ClassVar[bool] = True
    chunkable: ClassVar[bool] = True
    unchunkable_reason: ClassVar[str] = ""
    also_decays: ClassVar[tuple[str, ...]] = ()
    replaying: bool = False

    @property
    @abstractmethod
    def encoder(self) -> VisionEncoder:
        """The vision encoder under training."""

    @property
    def artifact_encoder(self) -> VisionEncoder:
        """What a run saves and evaluates: the encoder under training, where a method does not name another."""
        return self.encoder

    @property
    def artifact_is(self) -> str:
        """What `artifact_encoder` is, in words, for a card and a table."""
        return "the trained encoder"

    @abstractmethod
    def embed(self, **batch: Tensor) -> dict[str, Tensor]:
        """Row by row: tensors whose first dimension is the batch.

        Under gradient caching it runs twice for a row, without graph and then with it, so it changes nothing:
        buffers and queues move in `after_step`.
        """

    @abstractmethod
    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        """The loss of a whole batch of embeddings; the same value on every rank.

        Runs once a step, also where the batch was embedded in chunks. Heads that couple rows (BatchNorm) live
        here; what `after_step` needs of the batch is kept on the module, detached.
        """

    def after_step(self, progress: float) -> None:
        """Teacher, queue, centre and clamping; once per optimizer step. `progress` runs from 0 to 1."""

    def before_training(self, rows: int | None, batch_size: int) -> None:
        """Sizes that come from the data; once, before the first step and before a checkpoint is read.

        Args:
            rows: of the training set; None where it has no length.
            batch_size: rows of one loss, over all ranks.

        Raises:
            ValueError: the data are too few for the method.
        """

    def before_epoch(self, features: Tensor) -> None:
        """Prototypes and the like, from a pass over the data."""

    def check_chunks(self, chunk_size: int) -> None:
        """Refuses to embed in chunks what this very model cannot (see `chunkable` for what a method cannot).

        Raises:
            ValueError: with the remedy.
        """

    @classmethod
    def check_accumulation(
        cls, gradient_accumulation_steps: int, batch_size: int, embed_batch_size: int | None = None
    ) -> None:
        """Refuses settings that would silently shrink the negatives, or embed in chunks what cannot be.

        A loss that couples the batch is not accumulated: `ObjectiveTrainer` takes
        `gradient_accumulation_steps * batch_size` rows at once and embeds them `batch_size` at a time.

        Raises:
            ValueError: accumulation or `embed_batch_size`, and the method says that it is not `chunkable`.
        """
        steps = gradient_accumulation_steps
        accumulated = cls.couples_batch and steps > 1
        if cls.chunkable or not (accumulated or (embed_batch_size is not None and embed_batch_size < batch_size)):
            return
        why = f"{cls.__name__} cannot embed its batch in chunks: {cls.unchunkable_reason or 'it says so'}"
        if accumulated:
            raise ValueError(
                f"gradient_accumulation_steps={steps}: each loss of {cls.__name__} would see only {batch_size} rows "
                f"and their negatives, not {steps * batch_size}, and {why}; use --gradient_accumulation_steps 1 with "
                f"--per_device_train_batch_size {steps * batch_size}, or more processes (negatives are gathered)"
            )
        raise ValueError(
            f"embed_batch_size={embed_batch_size}: {why}; leave it out, and use activation checkpointing "
            "or more processes (negatives are gathered) where memory is short"
        )

    def negatives(self, batch_size: int) -> int | None:
        """Negatives of an anchor in a loss of `batch_size` rows over all ranks; None for a method that has none."""
        return batch_size - 1

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float | None:
        """The loss of a model that knows nothing, for a batch of `batch_size` over all ranks.

        `positives` is the mean number of positives of a row, itself included: duplicates make it more than one.
        """
        return None

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **settings: Any
    ) -> None:
        """Each trained tower computes its layers again in the backward pass (see `checkpoint_towers`)."""
        checkpoint_towers(self, activation_checkpointing_kwargs, **settings)

    @property
    def scale_limits(self) -> tuple[float, float] | None:
        """Between which the logit scale is clamped after each step, where it is."""
        return None


class ImageObjective(Objective):
    """Shared by the methods that learn from images alone: an encoder, and how its views and training are made.

    A batch has the columns `views` `[B, V, 3, H, W]` (normalised), `local_views` `[B, L, 3, h, w]`, `index` `[B]`
    (row of the data set), `seeds` `[B]` (a random key of every sample, from the seed, the epoch and the row) and
    `labels` `[B]`; `embed` names those that it takes.

    Args:
        encoder: the encoder to train.
        config: the method's `Config`.

    Attributes:
        views: name of the view policy (data/views/views.py).
        training_defaults: the paper's values of `TrainingArguments` and `OptimizerArguments`; flags and YAML win.
        convolutional_defaults: those that differ with a convolutional network.
        needs_features: whether the trainer passes over the data before each epoch and calls `before_epoch` with
            `epoch_features` of every row.
        features_due: whether the epoch that begins needs that pass.
        least_views: how many views of a sample a loss needs.
        progress: share of the training that is done, in [0, 1], set before each step.
        epoch: epochs done, with their fraction, set before each step.
        epochs_a_step: fraction of an epoch per step, set likewise; 0 before the first.
    """

    views: ClassVar[str] = "simclr"
    training_defaults: ClassVar[dict[str, Any]] = {}
    convolutional_defaults: ClassVar[dict[str, Any]] = {}
    needs_features: ClassVar[bool] = False
    features_due: bool = True
    least_views: ClassVar[int] = 2

    def __init__(self, encoder: VisionEncoder, config: Any = None) -> None:
        super().__init__()
        self.encoder = encoder  # type: ignore[misc]  # registers the module; the property below reads it
        self.config = reportable(config if config is not None else self.Config())
        self.progress, self.epoch, self.epochs_a_step = 0.0, 0.0, 0.0
        if getattr(self.config, "zero_init_residual", False) and not getattr(encoder, "pretrained", False):
            zero_last_norms(encoder.backbone)
        for name, parameter in encoder.backbone.named_parameters():
            if name.endswith("mask_token"):  # no pass reads it (DDP would wait for it); who masks turns it on again
                parameter.requires_grad_(False)

    @property
    def encoder(self) -> VisionEncoder:
        return self._modules["encoder"]  # type: ignore[return-value]

    @classmethod
    def defaults_beside(cls, optim: str | None, encoder: str | None = None) -> dict[str, Any]:
        """`training_defaults` as they fit the encoder, without those that belong to another optimizer than `optim`.

        Args:
            optim: the optimizer that is asked for, if any.
            encoder: name, path or Hub id of the encoder. For a convolutional one `convolutional_defaults` come on top;
                for a transformer `TRANSFORMER_DEFAULTS` take the place of LARS or SGD, unless `optim` names another
                optimizer than AdamW.
        """
        defaults, left = dict(cls.training_defaults), ("optim_args", "base_bias_learning_rate")
        adamw = optim is None or optim.startswith("adamw")
        if encoder is not None and is_convolutional(encoder):
            defaults |= cls.convolutional_defaults
        elif encoder is not None and adamw and defaults.get("optim") in ("lars", "sgd"):
            return {name: value for name, value in (defaults | TRANSFORMER_DEFAULTS).items() if name not in left}
        if optim is None or optim == defaults.get("optim"):
            return defaults
        return {name: value for name, value in defaults.items() if name not in left}

    @classmethod
    def default_optimizers(cls) -> str:
        """The method's default optimizer for each kind of encoder, for a log line."""
        transformer, convolutional = (cls.defaults_beside(None, name).get("optim") for name in ("vit", "resnet"))
        usual = "adamw_torch"
        return f"{transformer or usual} for a transformer, {convolutional or usual} for a convolutional network"

    @classmethod
    def columns(cls) -> list[str]:
        """Names of the batch's columns that the method takes: the arguments of `embed`."""
        return [name for name in inspect.signature(cls.embed).parameters if name != "self"]

    def forward(
        self,
        views: Tensor,
        local_views: Tensor | None = None,
        index: Tensor | None = None,
        seeds: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ObjectiveOutput:
        """`loss(embed(batch))`, with those columns that `embed` names.

        Raises:
            ValueError: `embed` needs a column that the batch lacks.
        """
        given = {"views": views, "local_views": local_views, "index": index, "seeds": seeds, "labels": labels}
        embeddings = self.embed(**self.select_columns(given))
        if not isinstance(embeddings, Mapping):
            raise ValueError(
                f"{type(self).__name__}.embed returned {type(embeddings).__name__}; it returns a dict of tensors "
                '[B, ...], such as {"h": self.features(self.encoder, views)}'
            )
        return self.loss(embeddings)

    @classmethod
    def select_columns(cls, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Those columns of a batch that `embed` takes.

        Raises:
            ValueError: `embed` needs a column that the batch lacks.
        """
        found = {name: batch[name] for name in cls.columns() if batch.get(name) is not None}
        for name, parameter in inspect.signature(cls.embed).parameters.items():
            if name != "self" and name not in found and parameter.default is parameter.empty:
                remedy = {"labels": "name the label column (--label_column)", "local_views": "ask for local crops"}
                has = ", ".join(name for name, value in batch.items() if value is not None)
                raise ValueError(
                    f"{cls.__name__} needs the column {name!r}, and the batch has {has}; {remedy.get(name, 'give it')}"
                )
        return found

    def features(
        self, encoder: VisionEncoder, views: Tensor, *, least: int | None = None, apart: bool = False
    ) -> Tensor:
        """Pooled vectors before any head (what an evaluation uses), one pass for all views of one size.

        Args:
            encoder: the method's own, or a teacher's.
            views: `[B, V, 3, H, W]`.
            least: views that a sample must have; default `least_views`.
            apart: an encoder with BatchNorm takes one view after the other, each normalised by itself.

        Returns:
            `[B, V, P]`.

        Raises:
            ValueError: another shape, or fewer views than the method needs.
        """
        self.check_views(views, least)
        rows, count = views.shape[:2]
        if apart and any(isinstance(module, _BatchNorm) for module in encoder.modules()):
            return torch.stack([encoder(view, tokens=False).pooled for view in views.unbind(1)], dim=1)
        return encoder(views.flatten(0, 1), tokens=False).pooled.unflatten(0, (rows, count))

    def check_views(self, views: Tensor, least: int | None = None) -> None:
        """Raises ValueError unless `views` is `[B, V, 3, H, W]` with enough views for the method."""
        least = self.least_views if least is None else least
        if views.ndim != 5 or views.shape[1] < least:
            raise ValueError(
                f"{type(self).__name__} needs views [B, V, 3, H, W] with V >= {least}, got {list(views.shape)}; "
                f"the view policy {self.views!r} makes them (data/views/views.py)"
            )

    def epoch_features(self, views: Tensor) -> Tensor:
        """What `before_epoch` gets of every row: `views` `[B, 1, 3, H, W]`, not augmented, to `[B, D]`."""
        return self.features(self.encoder, views, least=1)[:, 0]

    def negatives(self, batch_size: int) -> int | None:
        """As `Objective.negatives`; most methods from images have none."""
        return None

    def rates(self) -> dict[str, float | str]:
        """Learning rates that differ, by parameter-name prefix (`"predictor"`, `"head.last_layer"`).

        A number is a factor on the learning rate. `"constant"` holds the rate at its peak, without warm-up and decay.
        `"frozen:1"` leaves the parameters as they are for so many epochs: they get no gradient, so the optimizer
        skips them. `"still:1"` gives them a rate of zero for so many epochs: the optimizer sees their gradients.
        """
        return {}

    def before_training(self, rows: int | None, batch_size: int) -> None:
        """Refuses a batch of one where rows are contrasted, and a queue that the data cannot fill."""
        if self.couples_batch and batch_size < 2:
            raise ValueError(
                f"{type(self).__name__} compares the rows of a batch, and this one has {batch_size}; "
                "use --per_device_train_batch_size 2 or more"
            )
        queue = getattr(self.config, "queue_size", None)
        if queue and rows is not None and queue > rows:
            raise ValueError(
                f"queue_size={queue} is more than the {rows} images of the training set, so that an image would be "
                f"its own negative; use --queue_size {max(1, rows // 2)} or less"
            )

    def check_chunks(self, chunk_size: int) -> None:
        """BatchNorm in the encoder normalises with the rows that pass together, so chunks would change it."""
        encoders = [module for module in self.modules() if isinstance(module, VisionEncoder)]
        norms = [
            name for encoder in encoders for name, module in encoder.named_modules() if isinstance(module, _BatchNorm)
        ]
        if norms:
            raise ValueError(
                f"embedding in chunks of {chunk_size} would change {len(norms)} BatchNorm layers of the encoder "
                f"({norms[0]}), which normalise with the batch: leave --embed_batch_size and "
                "--gradient_accumulation_steps out and use more processes with --sync_batch_norm, or an encoder "
                "without BatchNorm (a ViT)"
            )

    @staticmethod
    @torch.no_grad()
    def collapse_metrics(**vectors: Tensor) -> dict[str, Tensor]:
        """`<name>_spread` and `<name>_rank` of `[N, D]` vectors (at most 256 rows), which the health callback reads."""
        found: dict[str, Tensor] = {}
        for name, rows in vectors.items():
            some = rows.detach()[:256]
            found[f"{name}_spread"], found[f"{name}_rank"] = spread(some), participation_ratio(some)
        return found
