"""Tiny objectives for the tests of gradient caching: image-text pairs, and two views of an image.

Importable, because worker processes build them too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import tiny
import torch
from pairs_for_tests import tokenizer
from torch import Tensor, nn

from mllm_vision.encoder.dual import DualEncoder
from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.encoder.text.towers import build_text_tower
from mllm_vision.functional.infonce import nt_xent
from mllm_vision.objectives import Objective, load_objective
from mllm_vision.objectives.base import ObjectiveOutput

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SMALL, "patch_size": 16}
KINDS = ("clip", "siglip", "simclr", "batchnorm")


class TwoViews(Objective):
    """SimCLR in small: two views, a head, NT-Xent.

    Args:
        batchnorm: a head with BatchNorm, which couples rows and so lives in `loss`; else a head row by row in `embed`.
        dropout: in the encoder.
        augment: noise on the pixels inside `embed`, drawn from Python's, numpy's and torch's generators.
    """

    @dataclass
    class Config:
        temperature: float = 0.5

    def __init__(self, batchnorm: bool = False, dropout: float = 0.0, augment: bool = False) -> None:
        super().__init__()
        # weights large enough that images differ in their embeddings: BatchNorm divides by that spread
        dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        backbone = tiny.tiny_vit(**VISION, **dropouts, initializer_range=0.2)
        self.vision = VisionEncoder.from_backbone(backbone, tiny.tiny_image_processor("vit"))
        norm = nn.BatchNorm1d(16) if batchnorm else nn.Identity()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            # no bias before BatchNorm: its gradient is zero but for rounding, which AdamW would make a step of
            self.head = nn.Sequential(nn.Linear(16, 16, bias=not batchnorm), norm, nn.ReLU(), nn.Linear(16, 8))
        self.log_temperature = nn.Parameter(torch.tensor(0.5).log())
        self.batchnorm, self.augment, self.steps = batchnorm, augment, 0

    @property
    def encoder(self) -> VisionEncoder:
        return self.vision

    def embed(self, views: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """`views` [B, 2, 3, H, W]."""
        if self.augment:
            views = views * torch.rand(len(views), 1, 1, 1, 1) + random.random() + np.random.rand()
        first, second = (self.vision(view).pooled for view in views.unbind(1))
        if not self.batchnorm:
            first, second = self.head(first), self.head(second)
        return {"first": first, "second": second}

    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        first, second = embeddings["first"], embeddings["second"]
        if self.batchnorm:
            first, second = self.head(first), self.head(second)
        width = self.log_temperature.exp()  # a parameter that only the loss uses
        loss = nt_xent(first, second, temperature=0.5) + 0.1 * (width - 0.3).square()
        return ObjectiveOutput(loss=loss, metrics={"spread": first.detach().float().std(), "width": width.detach()})

    def forward(self, views: Tensor) -> ObjectiveOutput:
        return self.loss(self.embed(views))

    def after_step(self, progress: float) -> None:
        self.steps += 1


def build(kind: str, dropout: float = 0.0, augment: bool = False, **config: Any) -> Any:
    """One of `KINDS`, always with the same weights."""
    if kind in ("simclr", "batchnorm"):
        return TwoViews(kind == "batchnorm", dropout, augment).train()
    make = tiny.tiny_siglip_vision if kind == "siglip" else tiny.tiny_clip_vision
    vision = VisionEncoder.from_backbone(make(**VISION, attention_dropout=dropout), tiny.tiny_image_processor(kind))
    method = load_objective(kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text, prepared = build_text_tower(
            f"{kind}_text_model", tokenizer(), overrides={**SMALL, "attention_dropout": dropout}, max_length=8,
            **({"projection_size": 16} if kind == "siglip" else {}),
        )  # fmt: skip
        sizes = {} if kind == "siglip" else {"embed_dim": 8}
        dual = DualEncoder(vision, text, prepared, logit_bias=-5.0 if method.has_bias else None, **sizes)
    return method(dual, method.Config(**config)).train()


def rows_of(kind: str, count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """A data set, as a list of rows; among the pairs some captions and images occur twice."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 2, 3, 32, 32, generator=generator)
    if kind in ("simclr", "batchnorm"):
        return [{"views": pair} for pair in images]
    words = torch.cat([torch.randint(5, 200, (count, 5), generator=generator), torch.full((count, 1), 3)], dim=1)
    which = torch.randint(0, count, (2, count), generator=generator)
    return [
        {
            "pixel_values": images[image, 0],
            "input_ids": words[caption],
            "attention_mask": torch.ones(6, dtype=torch.long),
            "caption_ids": caption,
            "image_ids": image,
        }
        for image, caption in which.T
    ]


def batch_of(kind: str, count: int, seed: int = 0) -> dict[str, Tensor]:
    rows = rows_of(kind, count, seed)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
