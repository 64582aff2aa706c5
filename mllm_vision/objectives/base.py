"""What every stage-zero method is: a module that owns an encoder and returns a loss with metrics."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from mllm_vision.encoder.dual import DualEncoder
from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.encoder.features import check_patch_dropout
from mllm_vision.errors import unknown_name
from mllm_vision.functional.geometry import participation_ratio, spread

OBJECTIVES = {
    "clip": "mllm_vision.objectives.clip:Clip",
    "itc": "mllm_vision.objectives.itc:Itc",
    "siglip": "mllm_vision.objectives.siglip:SigLip",
}


@dataclass
class ObjectiveOutput(ModelOutput):
    """`loss` is a scalar with gradient; `metrics` maps names to scalars without, logged and averaged."""

    loss: Tensor | None = None
    metrics: dict[str, Tensor] | None = None


class Objective(nn.Module, ABC):
    """A stage-zero method.

    The work is split in two. `embed` treats every row by itself and may run in chunks; `loss` couples the
    batch and is small in memory. `forward` names its arguments (they are the batch's columns) and returns
    `loss(embed(batch))`.

    Attributes:
        Config: a dataclass; its fields become command-line flags and YAML keys.
        couples_batch: whether the loss sees all rows at once, so that splitting a batch changes it.
        chunkable: whether `embed` may run on chunks of the batch (gradient caching). Set it to False, with
            `unchunkable_reason` in words, where `loss` has to run a tower again.
        replaying: True while gradient caching embeds rows for the second time, for their gradient alone: outputs
            that carry none (a teacher's) may then be left out, if computing them draws no random numbers.
    """

    Config: ClassVar[type]
    couples_batch: ClassVar[bool] = True
    chunkable: ClassVar[bool] = True
    unchunkable_reason: ClassVar[str] = ""
    replaying: bool = False

    @property
    @abstractmethod
    def encoder(self) -> VisionEncoder:
        """The artifact: the vision encoder under training."""

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

    def before_epoch(self, features: Tensor) -> None:
        """Prototypes and the like, from a pass over the data."""

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

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float | None:
        """The loss of a model that knows nothing, for a batch of `batch_size` over all ranks.

        `positives` is the mean number of positives of a row, itself included: duplicates make it more than one.
        """
        return None

    @property
    def scale_limits(self) -> tuple[float, float] | None:
        """Between which the logit scale is clamped after each step, where it is."""
        return None


class ImageTextObjective(Objective):
    """Shared by the image-text methods: a `DualEncoder` and exact duplicates as positives.

    Args:
        dual: the pair of towers.
        config: the method's `Config`.

    Attributes:
        has_bias: whether the pair must be made with a logit bias.
        patch_dropout: share of the patches that training leaves out, where the method's `Config` has the field.

    Raises:
        ValueError: `patch_dropout` outside [0, 1), or with a convolutional image tower.
    """

    has_bias: ClassVar[bool] = False

    def __init__(self, dual: DualEncoder, config: Any = None) -> None:
        super().__init__()
        self.dual = dual
        self.config = config if config is not None else self.Config()
        self.patch_dropout: float = getattr(self.config, "patch_dropout", 0.0)
        check_patch_dropout(self.patch_dropout, dual.vision.backbone)

    @property
    def encoder(self) -> VisionEncoder:
        return self.dual.vision

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.dual.logit_scale

    def embed(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        caption_ids: Tensor | None = None,
        image_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Features of every pair, and the ids that tell duplicates.

        Args:
            pixel_values: `[B, 3, H, W]`.
            input_ids: `[B, T]`, padded on the right.
            attention_mask: `[B, T]`.
            caption_ids: `[B]` int64; equal ids are the same caption.
            image_ids: `[B]` int64; equal ids are the same image.

        Returns:
            `image` and `text` `[B, E]`, and `ids` `[B, K]` where ids were given.
        """
        # Texts first: a tower that runs packed asks for their lengths, which waits for whatever the GPU has to do.
        text = self.dual.text_features(input_ids, attention_mask)
        embeddings = {"image": self.dual.image_features(pixel_values, patch_dropout=self.patch_dropout), "text": text}
        ids = [column for column in (caption_ids, image_ids) if column is not None]
        if ids and self.config.duplicate_positives:
            embeddings["ids"] = torch.stack(ids, dim=1)
        return embeddings

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        caption_ids: Tensor | None = None,
        image_ids: Tensor | None = None,
    ) -> ObjectiveOutput:
        """`loss(embed(batch))`; see `embed` for the arguments."""
        return self.loss(self.embed(pixel_values, input_ids, attention_mask, caption_ids, image_ids))

    @torch.no_grad()
    def metrics(self, embeddings: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scale, bias, the mean cosine of the pairs, and how the embeddings fill their space.

        What costs nothing and shows trouble early; `training.health.Health` reads it. Spread and rank are those of at
        most 256 rows of this rank, averaged over ranks when logged.
        """
        cosine = F.cosine_similarity(embeddings["image"].float(), embeddings["text"].float(), dim=-1).mean()
        metrics = {"logit_scale": self.dual.logit_scale.detach().exp(), "positive_similarity": cosine}
        for side in ("image", "text"):
            some = embeddings[side][:256]
            metrics[f"{side}_spread"], metrics[f"{side}_rank"] = spread(some), participation_ratio(some)
        if self.dual.logit_bias is not None:
            metrics["logit_bias"] = self.dual.logit_bias.detach().clone()
        return metrics

    def _set(self, parameter: nn.Parameter, value: float | None) -> None:
        if value is not None:
            with torch.no_grad():
                parameter.fill_(value)


def list_objectives() -> list[str]:
    """Names that `load_objective` knows."""
    return sorted(OBJECTIVES)


def load_objective(name: str) -> type[Objective]:
    """A method's class.

    Args:
        name: one of `list_objectives()`, or `"package.module:Class"` for a method of your own.

    Raises:
        ValueError: an unknown name (the nearest known one is named), a module that cannot be imported, or a
            class that is no `Objective`.
    """
    path = OBJECTIVES.get(name.lower(), name)
    if ":" not in path:
        told = unknown_name("objective", name, list_objectives())
        raise ValueError(f"{told}. A method of your own is 'package.module:Class'")
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot load objective {name!r}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise ValueError(f"{name!r} is {found!r}, which is no subclass of mllm_vision.objectives.Objective")
    if not hasattr(found, "Config"):
        raise ValueError(f"objective {name!r} has no Config dataclass; its fields are the method's flags")
    return found
