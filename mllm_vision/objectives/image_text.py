"""What the image-text methods share: a pair of towers, their features, and exact duplicates as positives."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm_vision.encoder.dual import DualEncoder
from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.encoder.features import check_patch_dropout
from mllm_vision.errors import unknown_name
from mllm_vision.functional.geometry import participation_ratio, spread
from mllm_vision.objectives.base import Objective, ObjectiveOutput, reportable


@dataclass
class ImageTextConfig:
    """Flags that every image-text method has; a method's `Config` inherits them and adds its own."""

    initial_logit_scale: float | None = field(
        default=1 / 0.07, metadata={"help": "1 / temperature at the start; 'null' keeps a loaded pair's"}
    )
    duplicate_positives: bool = field(
        default=True, metadata={"help": "captions or images that occur more than once are positives"}
    )
    patch_dropout: float = field(
        default=0.0, metadata={"help": "share of the patches that training leaves out, at random (FLIP): 0.5"}
    )


@dataclass
class TiledConfig(ImageTextConfig):
    """The flags of the methods whose loss compares every image with every text, tile by tile (docs/engine.md)."""

    exchange: Literal["gather", "ring"] = field(
        default="gather",
        metadata={"help": "how texts reach other ranks: gather holds all of them, ring one rank's at a time"},
    )
    tile_size: int | None = field(
        default=None, metadata={"help": "rows of a tile of the loss; it changes time and memory only. Default: chosen"}
    )

    def __post_init__(self) -> None:
        if self.exchange not in ("gather", "ring"):
            raise ValueError(unknown_name("exchange", self.exchange, ("gather", "ring")))
        if self.tile_size is not None and self.tile_size < 1:
            raise ValueError(f"tile_size={self.tile_size} must be at least 1; leave it out to have it chosen")

    @property
    def engine(self) -> dict[str, Any]:
        """The arguments of the loss functions that these flags are."""
        return {"exchange": self.exchange, "tile_size": self.tile_size}


class ImageTextObjective(Objective):
    """Shared by the image-text methods: a `DualEncoder` and exact duplicates as positives.

    Args:
        dual: the pair of towers.
        config: the method's `Config`, an `ImageTextConfig`.

    Attributes:
        has_bias: whether the pair must be made with a logit bias.
        training_defaults: the method's values of `TrainingArguments` where they differ from CLIP's, the recipe's own.
        patch_dropout: share of the patches that training leaves out.

    Raises:
        ValueError: `patch_dropout` outside [0, 1), or with a convolutional image tower.
    """

    has_bias: ClassVar[bool] = False
    training_defaults: ClassVar[dict[str, Any]] = {}

    @classmethod
    def defaults_beside(cls, optim: str | None, encoder: str | None = None) -> dict[str, Any]:
        """`training_defaults`: the method's own values of `TrainingArguments`, where they are not CLIP's.

        What belongs to AdamW goes where `optim` names another optimizer. AdamW is the default for every `encoder`.
        """
        other = optim is not None and not str(optim).startswith("adamw")
        left = ("adam_beta2", "adam_epsilon", "learning_rate", "weight_decay") if other else ()
        return {name: value for name, value in cls.training_defaults.items() if name not in left}

    def __init__(self, dual: DualEncoder, config: Any = None) -> None:
        super().__init__()
        self.dual = dual
        self.config = reportable(config if config is not None else self.Config())
        self.patch_dropout: float = self.config.patch_dropout
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

        What costs nothing and shows trouble early; `callbacks.health.Health` reads it. Spread and rank are those of at
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

    def _start_softmax(self, lowest: float, limit: float) -> None:
        """Sets the initial scale of a softmax loss: no bias, and a scale in [lowest, limit].

        Raises:
            ValueError: a pair with a logit bias, or a scale out of range.
        """
        scale = self.config.initial_logit_scale
        if self.dual.logit_bias is not None:
            raise ValueError("the softmax loss has no bias, but the pair has one; build it with logit_bias=None")
        if limit < lowest or (scale is not None and not lowest <= scale <= limit):
            raise ValueError(f"initial_logit_scale={scale} must lie in [{lowest:g}, max_logit_scale={limit}]")
        self._set(self.dual.logit_scale, None if scale is None else math.log(scale))
