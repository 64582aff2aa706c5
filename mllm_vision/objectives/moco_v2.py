"""MoCo v2: MoCo with an MLP head, blur among the views, a cosine schedule and a higher temperature."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from mllm_vision.modules.heads import MLPHead
from mllm_vision.objectives.base_momentum import QueueObjective


class MoCoV2(QueueObjective):
    """Momentum contrast with a head of two layers without BatchNorm, temperature 0.2, and a cosine schedule.

    See `QueueObjective` for the step, the queue and the shuffled BatchNorm.

    Args:
        encoder: to train; any backbone.
        config: see `Config`.

    Raises:
        ValueError: a size below one, a temperature that is not positive, a momentum out of range.

    Reference:
        Chen et al., 2020, "Improved Baselines with Momentum Contrastive Learning" (https://arxiv.org/abs/2003.04297).
    """

    citation: ClassVar[str] = r"""@article{chen2020mocov2,
  title = {Improved Baselines with Momentum Contrastive Learning},
  author = {Chen, Xinlei and Fan, Haoqi and Girshick, Ross and He, Kaiming},
  journal = {arXiv:2003.04297},
  year = {2020}
}"""

    views: ClassVar[str] = "moco_v2"
    training_defaults: ClassVar[dict[str, Any]] = {
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "base_learning_rate": 0.03,
        "lr_scaling": "linear",
        "weight_decay": 1e-4,
        "weight_decay_on": "all",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
    }

    @dataclass
    class Config(QueueObjective.Config):
        """Flags of the method."""

        temperature: float = field(default=0.2, metadata={"help": "of the softmax"})
        head_hidden: int | None = field(default=None, metadata={"help": "width in the head; default: the encoder's"})

    def build_head(self, width: int) -> nn.Module:
        """Two linear layers and a ReLU: `[N, width]` to `[N, dim]`."""
        return MLPHead(width, self.config.head_hidden or width, self.config.dim, 2, norm=None)
