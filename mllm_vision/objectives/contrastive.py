"""The contrastive loss of 2006: pairs of a class are drawn together, other pairs pushed apart up to a margin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_vision.distributed import all_gather, all_gather_with_grad, row_counts
from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.functional.engine.tiles import first_row
from mllm_vision.functional.pairs import contrastive
from mllm_vision.objectives.base import ObjectiveOutput
from mllm_vision.objectives.base_labelled import LabelledConfig, LabelledObjective


class Contrastive(LabelledObjective):
    """Two pairs an image: one of its class, and one with the next image of the batch.

    The first view of an image is compared with the second view of the next image of its class in the batch of all
    ranks (of its own where it is alone in its class, or has no label), and with that of the next image, whatever it
    shows. Labels say whether a pair is similar. As in the paper the rows are not normalised, and the loss is the mean
    over pairs of d^2 for similar and max(0, margin - d)^2 for different ones, without its halves. Optimizer, rate and
    views are SupCon's: the paper's are for small networks on digits.

    Args:
        encoder: to train; any backbone.
        config: see `Config`.

    Raises:
        ValueError: a margin that is not positive, or a size below one.

    Reference:
        Hadsell et al., 2006, "Dimensionality Reduction by Learning an Invariant Mapping", equation 4
        (https://doi.org/10.1109/CVPR.2006.100).
    """

    citation: ClassVar[str] = r"""@inproceedings{hadsell2006contrastive,
  title = {Dimensionality Reduction by Learning an Invariant Mapping},
  author = {Hadsell, Raia and Chopra, Sumit and LeCun, Yann},
  booktitle = {CVPR},
  doi = {10.1109/CVPR.2006.100},
  year = {2006}
}"""
    loss_parts: ClassVar[tuple[str, ...]] = ("similar", "different")

    @dataclass
    class Config(LabelledConfig):
        """Flags of the method."""

        margin: float = field(default=1.0, metadata={"help": "Distance from which on a different pair costs nothing."})
        normalize: bool = field(default=False, metadata={"help": "Compare unit vectors, at most 2 apart."})

    def __init__(self, encoder: VisionEncoder, config: Config | None = None) -> None:
        super().__init__(encoder, config)
        if not self.config.margin > 0:
            raise ValueError(f"margin={self.config.margin} must be positive; 1.0 is usual")

    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        """`embeddings` as `embed` returns them."""
        z, labels = embeddings["z"], self.classes(embeddings["labels"])
        if self.config.normalize:
            z = F.normalize(z, dim=-1)
        sizes = row_counts(z)
        classes, others = all_gather(labels, sizes=sizes), all_gather_with_grad(z[:, 1], sizes=sizes)
        row = first_row(sizes, None) + torch.arange(len(z), device=z.device)
        following = (row + 1) % len(classes)
        partners = torch.cat([next_of_class(classes)[row], following])
        different = torch.cat([torch.zeros_like(row, dtype=torch.bool), classes[following] != labels])
        first = z[:, 0].repeat(2, 1)
        loss = contrastive(first, others[partners], different, margin=self.config.margin)
        metrics = self.labelled_metrics(embeddings)
        metrics["positives"] = (classes == labels[:, None]).sum(1).to(loss).mean()
        with torch.no_grad():
            distance = (first - others[partners]).float().norm(dim=1)
            short = (self.config.margin - distance).clamp_min(0)
            metrics["similar"] = (distance.square() * ~different).mean()
            metrics["different"] = (short.square() * different).mean()
        return ObjectiveOutput(loss=loss, metrics=metrics)

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float:
        """What collapsed rows cost: margin^2 for each different pair, which half of the pairs are at most."""
        same = (positives - 1) / max(batch_size - 1, 1)
        return self.config.margin**2 * (1 - same) / 2


def next_of_class(classes: Tensor) -> Tensor:
    """The row of the next member of each row's class, the first one after the last; int64 `[N]`.

    Example:
        >>> next_of_class(torch.tensor([7, 5, 7, 7])).tolist()
        [2, 1, 3, 0]
    """
    ordered, order = classes.sort(stable=True)
    first = torch.searchsorted(ordered, ordered)
    end = torch.searchsorted(ordered, ordered, right=True)
    following = torch.arange(len(classes), device=classes.device) + 1
    return torch.empty_like(order).scatter(0, order, order[torch.where(following < end, following, first)])
