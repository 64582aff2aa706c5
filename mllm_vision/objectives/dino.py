"""DINO: a student that sees small crops learns what its own slow copy says of large ones."""

from __future__ import annotations

from typing import Any, ClassVar

from mllm_vision.objectives.base_dino import DINOConfig, DINOObjective


class DINO(DINOObjective):
    """Self-distillation over multi-crop views, with a centred and sharpened teacher.

    The head is an MLP with GELU to a bottleneck of unit length and weight-normalised prototypes, which stand still for
    the first epoch. The order of a step is the official code's: the loss with the centre as it is, the optimizer,
    then the centre and the teacher move. See `DINOObjective` for the details.

    Args:
        encoder: to train; any backbone (with a ResNet `head_batch_norm` suits).
        config: see `Config`.

    Raises:
        ValueError: a temperature that is not positive, a size below one, an unknown centring, a momentum out of
            range, or negative epochs.

    Reference:
        Caron et al., 2021, "Emerging Properties in Self-Supervised Vision Transformers", section 3, equations 1-4 and
        algorithm 1 (https://arxiv.org/abs/2104.14294).
    """

    citation: ClassVar[str] = r"""@article{caron2021dino,
  title = {Emerging Properties in Self-Supervised Vision Transformers},
  author = {Caron, Mathilde and Touvron, Hugo and Misra, Ishan and others},
  journal = {arXiv:2104.14294},
  year = {2021}
}"""

    views: ClassVar[str] = "dino"
    temperature_by_epoch: ClassVar[bool] = True
    training_defaults: ClassVar[dict[str, Any]] = {
        "optim": "adamw_torch",
        "base_learning_rate": 5e-4,
        "lr_scaling": "linear",
        "weight_decay": 0.04,
        "weight_decay_end": 0.4,
        "lr_scheduler_type": "exact_cosine",
        "lr_scheduler_kwargs": {"min_lr": 1e-6, "inclusive_warmup": True},
        "warmup_steps": 0.1,  # the paper's 10 epochs, of 100
        "gradient_clipping": "per_parameter",
        "max_grad_norm": 3.0,
    }

    # the official command for ResNet-50
    convolutional_defaults: ClassVar[dict[str, Any]] = {
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "base_learning_rate": 0.03,
        "weight_decay": 1e-4,
        "weight_decay_end": 1e-4,
    }

    Config = DINOConfig
