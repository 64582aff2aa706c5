"""The triplet loss: an image lies nearer to those of its class than to others, by a margin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_vision.distributed import all_gather
from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.errors import unknown_name
from mllm_vision.functional.pairs import STRATEGIES, batch_triplet, mine_triplets, triplet, triplet_masks
from mllm_vision.objectives.base import ObjectiveOutput
from mllm_vision.objectives.base_labelled import LabelledConfig, LabelledObjective

SOME = 256  # rows of each rank whose hardest triplets are looked at


class Triplet(LabelledObjective):
    """Triplets mined among all views of the batch, over all ranks; squared distances of unit vectors.

    Every view is an anchor, and the views of its class are its positives, its own image's other view included: a row
    without a label has that one alone. Optimizer, rate and views are SupCon's. FaceNet mines semi-hard triplets, which
    leave pairs without one out: from random weights the rows then end up along one line, and nothing is learnt. All
    active triplets (Hermans et al.) are the default.

    Args:
        encoder: to train; any backbone.
        config: see `Config`.

    Metrics beside those of collapse: `active`, the share of triplets (`batch_all`), anchors (`batch_hard`) or pairs
    (`batch_semi_hard`) with a loss; of the hardest triplets of some rows, whatever is mined, their loss `hardest` (at
    the margin all embeddings coincide) and the shares `hard` and `semi_hard`.

    Raises:
        ValueError: a margin that is not positive, an unknown mining, or a size below one.

    Reference:
        Schroff et al., 2015, "FaceNet: A Unified Embedding for Face Recognition and Clustering", equation 2 and section
        3.2 (https://arxiv.org/abs/1503.03832); Hermans et al., 2017, "In Defense of the Triplet Loss for Person
        Re-Identification" (https://arxiv.org/abs/1703.07737).
    """

    citation: ClassVar[str] = r"""@article{schroff2015facenet,
  title = {FaceNet: A Unified Embedding for Face Recognition and Clustering},
  author = {Schroff, Florian and Kalenichenko, Dmitry and Philbin, James},
  journal = {arXiv:1503.03832},
  year = {2015}
}"""

    @dataclass
    class Config(LabelledConfig):
        """Flags of the method."""

        margin: float = field(default=0.2, metadata={"help": "Between the squared distances."})
        mining: str = field(
            default="batch_all",
            metadata={"help": f"Of the triplets: {', '.join(STRATEGIES)} (FaceNet: semi-hard; Hermans: hard)."},
        )
        normalize: bool = field(default=True, metadata={"help": "Compare unit vectors."})

    def __init__(self, encoder: VisionEncoder, config: Config | None = None) -> None:
        super().__init__(encoder, config)
        if not self.config.margin > 0:
            raise ValueError(f"margin={self.config.margin} must be positive; the paper's is 0.2")
        if self.config.mining not in STRATEGIES:
            raise ValueError(unknown_name("mining", self.config.mining, STRATEGIES))

    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        """`embeddings` as `embed` returns them."""
        z, config = embeddings["z"], self.config
        rows, classes = z.flatten(0, 1), self.classes(embeddings["labels"]).repeat_interleave(z.shape[1])
        settings = {"margin": config.margin, "normalize": config.normalize}
        loss, active = batch_triplet(rows, classes, strategy=config.mining, **settings)
        metrics = self.labelled_metrics(embeddings) | {"active": active}
        return ObjectiveOutput(loss=loss, metrics=metrics | self._hardest(rows, classes))

    @torch.no_grad()
    def _hardest(self, rows: Tensor, classes: Tensor) -> dict[str, Tensor]:
        margin, normalize = self.config.margin, self.config.normalize
        some, classes = all_gather(rows[:SOME].float()), all_gather(classes[:SOME])
        found = mine_triplets(some, classes, margin=margin, strategy="batch_hard", normalize=normalize)
        if not len(found.anchor):  # all of one class, on every rank
            return {}
        anchor, positive, negative = (some[places] for places in found)
        metrics = {"hardest": triplet(anchor, positive, negative, margin=margin, normalize=normalize)}
        if normalize:
            anchor, positive, negative = (F.normalize(part, dim=-1) for part in (anchor, positive, negative))
        distances = ((anchor - other).square().sum(1) for other in (positive, negative))
        kinds = triplet_masks(*distances, margin=margin)
        return metrics | {"hard": kinds.hard.float().mean(), "semi_hard": kinds.semi_hard.float().mean()}

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float | None:
        """The margin, where all rows coincide; None with `batch_semi_hard`, which then finds no triplet."""
        return None if self.config.mining == "batch_semi_hard" else self.config.margin
