"""MoCo v1: a momentum encoder's keys in a queue, found by linear projections of the queries."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from mllm_vision.objectives.base_momentum import QueueObjective


class MoCoV1(QueueObjective):
    """Momentum contrast with a linear head, temperature 0.07, and SGD whose rate falls at 60 and 80 % of the training.

    See `QueueObjective` for the step, the queue and the shuffled BatchNorm.

    Args:
        encoder: to train; any backbone.
        config: see `Config`.

    Raises:
        ValueError: a size below one, a temperature that is not positive, a momentum out of range.

    Reference:
        He et al., 2020, "Momentum Contrast for Unsupervised Visual Representation Learning", sections 3.2 and 3.3,
        equations 1 and 2 (https://arxiv.org/abs/1911.05722).
    """

    citation: ClassVar[str] = r"""@article{he2019moco,
  title = {Momentum Contrast for Unsupervised Visual Representation Learning},
  author = {He, Kaiming and Fan, Haoqi and Wu, Yuxin and Xie, Saining and Girshick, Ross},
  journal = {arXiv:1911.05722},
  year = {2019}
}"""

    views: ClassVar[str] = "moco_v1"
    training_defaults: ClassVar[dict[str, Any]] = {
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "base_learning_rate": 0.03,
        "lr_scaling": "linear",
        "weight_decay": 1e-4,
        "weight_decay_on": "all",
        "lr_scheduler_type": "step",  # its own milestones are the paper's: x0.1 at epochs 120 and 160 of 200
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
    }

    Config = QueueObjective.Config

    def build_head(self, width: int) -> nn.Module:
        """One linear layer: `[N, width]` to `[N, dim]`."""
        return nn.Linear(width, self.config.dim)
