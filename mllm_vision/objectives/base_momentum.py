"""What the methods with a slow copy of the student share: the copy, its schedule, and MoCo's queue of keys."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mllm_vision.distributed import world_size
from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.functional.infonce import info_nce, mutual_information_bound
from mllm_vision.functional.random import uniform
from mllm_vision.modules.batch_norm import GlobalBatchNorm2d
from mllm_vision.modules.momentum import MomentumTeacher, cosine_momentum
from mllm_vision.modules.queue import FeatureQueue
from mllm_vision.modules.shuffle import in_groups, shuffled
from mllm_vision.objectives.base import ImageObjective, ObjectiveOutput

_DEALING = 1000  # the stream of random numbers that shuffled BatchNorm deals rows by


class MomentumObjective(ImageObjective):
    """An encoder with a head, and a copy of both that follows by an exponential moving average.

    The copy is `teacher.module`, with the keys `encoder` and `head`. It takes no gradient, and its BatchNorms have
    statistics of their own: of what it sees, view by view.

    Args:
        encoder: to train; any backbone.
        config: with a field `momentum`, and `momentum_rises` where it may rise to one along a cosine over the training.

    Attributes:
        momentum_of_next_step: the momentum after step t is that of step t + 1, for codes whose copy follows when the
            next step begins; else that of step t, for codes whose copy follows when a step ends.
    """

    momentum_of_next_step: ClassVar[bool] = False

    def __init__(self, encoder: VisionEncoder, config: Any = None) -> None:
        super().__init__(encoder, config)
        self.head = self.build_head(encoder.pooled_size)
        self.teacher = MomentumTeacher(self.student, self.config.momentum, batch_statistics=True)

    @abstractmethod
    def build_head(self, width: int) -> nn.Module:
        """The head behind both encoder and copy, for vectors of this width."""

    @property
    def student(self) -> nn.ModuleDict:
        """What the teacher is a copy of."""
        return nn.ModuleDict({"encoder": self.encoder, "head": self.head})

    def embed(self, views: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """`views` `[B, 2, 3, H, W]` to `student` and `teacher` `[B, 2, P]`, both before their heads."""
        embeddings = {"student": self.features(self.encoder, views[:, :2], apart=True)}
        if not self.replaying:  # gradient caching asks again for what has a gradient alone
            with torch.no_grad():
                embeddings["teacher"] = self.features(self.teacher.module["encoder"], views[:, :2], apart=True)
        return embeddings

    def momentum_at(self, progress: float) -> float:
        """The momentum when this share of the training is done."""
        rises = getattr(self.config, "momentum_rises", False)
        return cosine_momentum(self.config.momentum, progress) if rises else self.config.momentum

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """The teacher follows."""
        share = progress if self.momentum_of_next_step else self.progress
        self.teacher.update(self.student, self.momentum_at(share))
        self.progress = progress  # a trainer tells it before each step; a loop of one's own need not


class QueueObjective(MomentumObjective):
    """MoCo: a query finds the key of the other view of its image among the keys of earlier batches.

    The order of a step is the paper's: the key encoder follows, keys, loss, enqueue. The queue starts empty, without
    the official code's random vectors; in the very first step the keys of the batch's other images stand in for it.
    Where the encoder has BatchNorm, the keys' rows are permuted over ranks and groups (`modules.shuffle`).

    Args:
        encoder: to train; any backbone.
        config: see `Config`.

    Attributes:
        queue: the last keys, of unit length; gathered from all ranks, part of every checkpoint.

    Raises:
        ValueError: a size below one, a temperature that is not positive, a momentum out of range.
    """

    @dataclass
    class Config:
        """Flags of the method."""

        dim: int = field(default=128, metadata={"help": "width of queries and keys"})
        queue_size: int = field(default=65536, metadata={"help": "keys of earlier batches that are kept as negatives"})
        momentum: float = field(default=0.999, metadata={"help": "of the key encoder, in [0, 1]"})
        temperature: float = field(default=0.07, metadata={"help": "of the softmax"})
        symmetric: bool = field(
            default=False, metadata={"help": "both views are query and key; the two losses are added"}
        )
        batch_norm_groups: int = field(
            default=1,
            metadata={"help": "an encoder's BatchNorm sees a process's rows in so many groups, as on so many GPUs"},
        )

    def __init__(self, encoder: VisionEncoder, config: Config | None = None) -> None:
        super().__init__(encoder, config)
        config = self.config
        if not config.temperature > 0:
            raise ValueError(f"temperature={config.temperature} must be positive; MoCo v1 has 0.07, v2 0.2")
        if config.queue_size < 1 or config.batch_norm_groups < 1:
            values = f"queue_size={config.queue_size} and batch_norm_groups={config.batch_norm_groups}"
            raise ValueError(f"{values} must be at least 1; without a queue, MoCo v3 compares the rows of a batch")
        self.queue = FeatureQueue(config.queue_size, config.dim)
        self._pending: Tensor | None = None
        # equal on every rank by itself: DistributedDataParallel need not send it each step
        self._ddp_params_and_buffers_to_ignore = [f"queue.{name}" for name, _ in self.queue.named_buffers()]

    def embed(self, views: Tensor, seeds: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        """Queries of the first view and keys of the second, or of both views each way where `symmetric`.

        Args:
            views: `[B, 2, 3, H, W]`.
            seeds: int64 `[B]`; an encoder with BatchNorm deals its keys' rows by them.

        Returns:
            `query` `[B, S, dim]` with S one or two, and `key`, of the same shape and of unit length: row by row the
            key that the query is to find. Gradient caching's second pass leaves the keys out.
        """
        sides, norms = 2 if self.config.symmetric else 1, self._norms()
        groups = self.config.batch_norm_groups if norms else 1
        self.check_views(views)
        queries = in_groups(lambda rows: self._project(self, rows), views[:, :sides], groups, norms)
        if self.replaying:
            return {"query": queries}
        others = views[:, :2].flip(1)[:, :sides]
        slow = self.teacher.module

        def project(rows: Tensor) -> Tensor:
            return _unit(self._project(slow, rows))

        with torch.no_grad():
            # dealing changes the company that a BatchNorm sees rows in: not where it sees them all
            if groups == 1 and (world_size() == 1 or all(isinstance(norm, GlobalBatchNorm2d) for norm in norms)):
                return {"query": queries, "key": project(others)}
            if seeds is None:
                raise ValueError(f"{type(self).__name__} needs the column 'seeds' to shuffle what BatchNorm sees")
            order = uniform(seeds, _DEALING, 1)[:, 0]
            own = [module for module in slow["encoder"].modules() if isinstance(module, _BatchNorm)]
            return {"query": queries, "key": shuffled(project, others, order, groups=groups, norms=own)}

    def _project(self, side: Any, rows: Tensor) -> Tensor:
        return side.head(self.features(side.encoder, rows, least=1, apart=True))

    def _norms(self) -> list[nn.Module]:
        return [module for module in self.encoder.modules() if isinstance(module, _BatchNorm)]

    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        """`embeddings` as `embed` returns them; the keys are kept for `after_step`."""
        queries, keys = embeddings["query"], embeddings["key"].detach()
        if self.training:
            self._pending = keys.flatten(0, 1)  # image by image: the same order on any number of ranks
        negatives = self.queue.rows if len(self.queue) else None
        losses = [
            info_nce(_unit(query), key, negatives, temperature=self.config.temperature, normalize=False, longest=1.0)
            for query, key in zip(queries.unbind(1), keys.unbind(1), strict=True)
        ]
        loss = torch.stack(losses).sum()
        with torch.no_grad():
            metrics = self.collapse_metrics(query=queries[:, 0], key=keys[:, 0])
            metrics["positive_similarity"] = F.cosine_similarity(queries.float(), keys, dim=-1).mean()
            metrics["queue_rows"] = loss.new_tensor(float(len(self.queue)))
            if negatives is not None:
                bound = mutual_information_bound(loss / len(losses), len(negatives))
                metrics["information_bound"] = torch.as_tensor(bound)
        return ObjectiveOutput(loss=loss, metrics=metrics)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """The step's keys go into the queue, over the oldest; then the key encoder follows."""
        if self._pending is not None:
            self.queue.enqueue(self._pending)
        self._pending = None
        super().after_step(progress)

    def negatives(self, batch_size: int) -> int:
        """The queue, once it is full."""
        return self.config.queue_size

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float | None:
        """ln(K + 1) with the K keys in the queue by now (before the first step: when full), twice where `symmetric`."""
        columns = (len(self.queue) or self.queue.size) + 1
        return (2 if self.config.symmetric else 1) * math.log(columns)


def _unit(rows: Tensor) -> Tensor:
    """Rows of unit length, in fp32 or better."""
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)
