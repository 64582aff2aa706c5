"""MoCo v3: predictions of the student find the keys of the momentum encoder within the batch, without a queue."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.encoder.families import family_of
from mllm_vision.encoder.positions import fix_positions
from mllm_vision.functional.infonce import info_nce
from mllm_vision.modules.heads import MLPHead
from mllm_vision.objectives.base import ObjectiveOutput
from mllm_vision.objectives.base_momentum import MomentumObjective

logger = logging.getLogger(__name__)


class MoCoV3(MomentumObjective):
    """Symmetric InfoNCE between predictions and momentum keys over the batch of all ranks, each direction times 2 T.

    A ViT's patch embedding is drawn at random and stays so, which is what keeps its training stable, and its
    positions are fixed sines and cosines. The heads of a ViT are the official code's: projector of 3 layers, BatchNorm
    (of all ranks, without affine) behind the last one of projector and predictor. Behind a convolutional network the
    projector has 2 layers and the predictor no last norm, as there, and there is no patch embedding to freeze. An
    encoder whose weights were loaded keeps patch embedding and positions as they are; the patch embedding is frozen
    all the same. The momentum rises with every step, which the official code does with `--moco-m-cos`. Where this
    differs from it: the rest of the encoder starts as transformers draws it, not by Xavier's rule.

    Args:
        encoder: to train; its patch embedding and positions are changed in place (see `Config`).
        config: see `Config`.

    Raises:
        ValueError: a size below one, a temperature that is not positive, a momentum out of range, a width that is
            not divisible by 4 with `sincos_positions`.

    Reference:
        Chen, Xie and He, 2021, "An Empirical Study of Training Self-Supervised Vision Transformers", algorithm 1 and
        section 4 (https://arxiv.org/abs/2104.02057).
    """

    citation: ClassVar[str] = r"""@article{chen2021mocov3,
  title = {An Empirical Study of Training Self-Supervised Vision Transformers},
  author = {Chen, Xinlei and Xie, Saining and He, Kaiming},
  journal = {arXiv:2104.02057},
  year = {2021}
}"""

    views: ClassVar[str] = "moco_v3"
    momentum_of_next_step: ClassVar[bool] = True
    training_defaults: ClassVar[dict[str, Any]] = {
        "optim": "adamw_torch",
        "base_learning_rate": 1.5e-4,
        "lr_scaling": "linear",
        "weight_decay": 0.1,
        "weight_decay_on": "all",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.133,  # 40 epochs of 300
        "max_grad_norm": 0.0,
    }

    # the official code's own defaults, which are for ResNets: 100 epochs, 10 of warm-up
    convolutional_defaults: ClassVar[dict[str, Any]] = {
        "optim": "lars",
        "optim_args": "variant=barlow_twins",
        "base_learning_rate": 0.6,
        "weight_decay": 1e-6,
        "weight_decay_on": "method",
        "warmup_steps": 0.1,
    }

    @dataclass
    class Config:
        """Flags of the method."""

        temperature: float | None = field(
            default=None, metadata={"help": "of the softmax; default 0.2, and 1.0 with a convolutional network"}
        )
        momentum: float = field(default=0.99, metadata={"help": "of the key encoder at the start; rises to 1"})
        momentum_rises: bool = field(default=True, metadata={"help": "to 1 by a cosine; false: it stays"})
        head_hidden: int = field(default=4096, metadata={"help": "width in projector and predictor"})
        head_out: int = field(default=256, metadata={"help": "width of queries and keys"})
        zero_init_residual: bool = field(
            default=True, metadata={"help": "residual blocks of a built ResNet start as the identity, as there"}
        )
        freeze_patch_embedding: bool = field(
            default=True, metadata={"help": "a ViT's patch embedding stays as it is at the start"}
        )
        redraw_patch_embedding: bool = field(
            default=True, metadata={"help": "draw that of an encoder with random weights as the paper's code does"}
        )
        sincos_positions: bool = field(
            default=True, metadata={"help": "fixed sine-cosine positions, in an encoder with random weights"}
        )

    def __init__(self, encoder: VisionEncoder, config: Config | None = None) -> None:
        config = config if config is not None else self.Config()
        self._convolutional = family_of(encoder.backbone).convolutional
        if config.temperature is None:
            config.temperature = 1.0 if self._convolutional else 0.2
        if not config.temperature > 0:
            raise ValueError(f"temperature={config.temperature} must be positive; the paper's is 0.2 (ResNet: 1.0)")
        if not self._convolutional:  # before the teacher is copied
            if encoder.pretrained:
                logger.info(
                    "MoCo v3: the encoder's weights were loaded, so patch embedding and positions stay as they are"
                )
            redraw = config.redraw_patch_embedding and not encoder.pretrained
            fix_patch_embedding(encoder, redraw=redraw, freeze=config.freeze_patch_embedding)
            if config.sincos_positions and not encoder.pretrained:
                fix_positions(encoder.backbone)
        super().__init__(encoder, config)
        last = None if self._convolutional else "batch_no_affine"
        self.predictor = MLPHead(
            config.head_out, config.head_hidden, config.head_out, 2, last_norm=last, last_bias=False
        )

    def build_head(self, width: int) -> nn.Module:
        """The projector: `[N, width]` to `[N, head_out]`."""
        layers = 2 if self._convolutional else 3
        return MLPHead(width, self.config.head_hidden, self.config.head_out, layers, last_norm="batch_no_affine")

    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        """`embeddings` as `embed` returns them; heads take one view at a time."""
        h = embeddings["student"]
        z = [self.head(view) for view in h.unbind(1)]
        queries = [self.predictor(view) for view in z]
        with torch.no_grad():
            keys = [self.teacher.module["head"](view) for view in embeddings["teacher"].unbind(1)]
        temperature = self.config.temperature
        losses = [
            info_nce(query, key, temperature=temperature) for query, key in zip(queries, reversed(keys), strict=True)
        ]
        loss = 2 * temperature * torch.stack(losses).sum()
        return ObjectiveOutput(loss=loss, metrics=self.collapse_metrics(h=h[:, 0], z=z[0]))

    def negatives(self, batch_size: int) -> int:
        """The keys of every other image."""
        return batch_size - 1

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float:
        """4 T ln N: two directions, each 2 T times the entropy of N equal columns."""
        return 4 * self.config.temperature * math.log(batch_size)


@torch.no_grad()
def fix_patch_embedding(encoder: VisionEncoder, *, redraw: bool = True, freeze: bool = True) -> list[str]:
    """Re-initialises the patch embedding of a transformer (Xavier, no bias) and freezes it, in place.

    Returns:
        Names of its parameters in the backbone.
    """
    found = []
    for name, parameter in encoder.backbone.named_parameters():
        if "patch_embed" not in name:
            continue
        found.append(name)
        if redraw and parameter.ndim > 1:
            fan_in, fan_out = parameter[0].numel(), parameter.shape[0]
            bound = math.sqrt(6 / (fan_in + fan_out))
            parameter.uniform_(-bound, bound)
        elif redraw:
            parameter.zero_()
        parameter.requires_grad_(parameter.requires_grad and not freeze)
    return found
