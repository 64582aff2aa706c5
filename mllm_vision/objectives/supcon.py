"""SupCon: every view finds the views of its class among all views of the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.functional.infonce import sup_con
from mllm_vision.objectives.base import ObjectiveOutput
from mllm_vision.objectives.base_labelled import LabelledConfig, LabelledObjective


class SupCon(LabelledObjective):
    """SimCLR with labels: the positives of a view are all views of its class, over all ranks.

    The form with the sum outside of the logarithm (equation 2). A row labelled -1 has no class: its own other view is
    its only positive, so that a partly labelled set trains too. The official code's head has no BatchNorm, and it
    trains CIFAR-10 at temperature 0.1 (0.07 is its default). Where this differs from it: the loss has no factor
    T / 0.07, and the cosine begins where the warm-up ends and moves with every step.

    Args:
        encoder: to train; any backbone.
        config: see `Config`.

    Raises:
        ValueError: a temperature that is not positive, or a size below one.

    Reference:
        Khosla et al., 2020, "Supervised Contrastive Learning", equation 2 (https://arxiv.org/abs/2004.11362).
    """

    citation: ClassVar[str] = r"""@article{khosla2020supcon,
  title = {Supervised Contrastive Learning},
  author = {Khosla, Prannay and Teterwak, Piotr and Wang, Chen and others},
  journal = {arXiv:2004.11362},
  year = {2020}
}"""

    @dataclass
    class Config(LabelledConfig):
        """Flags of the method."""

        temperature: float = field(default=0.07, metadata={"help": "Of the softmax; CIFAR-10: 0.1."})

    def __init__(self, encoder: VisionEncoder, config: Config | None = None) -> None:
        super().__init__(encoder, config)
        if not self.config.temperature > 0:
            raise ValueError(f"temperature={self.config.temperature} must be positive; the official code's is 0.07")

    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        """`embeddings` as `embed` returns them."""
        classes = self.classes(embeddings["labels"])
        loss = sup_con(embeddings["z"], classes, temperature=self.config.temperature)
        return ObjectiveOutput(loss=loss, metrics=self.labelled_metrics(embeddings))

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float:
        """ln(2N - 1), however the batch falls into classes: every other view equally likely."""
        return math.log(2 * batch_size - 1)
