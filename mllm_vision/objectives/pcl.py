"""PCL: momentum contrast of images, and of images with the prototypes that k-means finds before each epoch."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm_vision.distributed import all_gather, rank, world_size
from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.functional.prototypes import concentration, proto_nce, spherical_kmeans
from mllm_vision.modules.heads import MLPHead
from mllm_vision.objectives.base import ObjectiveOutput
from mllm_vision.objectives.base_momentum import QueueObjective

logger = logging.getLogger(__name__)


class PCL(QueueObjective):
    """MoCo v2 with ProtoNCE: after some epochs a query also finds the prototype of its image's cluster.

    Before each of those epochs the momentum encoder passes over the data, as they are, and spherical k-means finds
    the clusters of its keys, once for each number in `num_clusters`, from starts that are the same every epoch, as in
    the official code. Prototypes, the temperature of each and every image's cluster are buffers: a run that resumes
    within an epoch goes on with them. All prototypes are negatives, where the official code draws `queue_size` of them
    (see `functional.prototypes`). See `QueueObjective` for the queue and the order of a step.

    Args:
        encoder: to train; any backbone.
        config: see `Config`.

    Raises:
        ValueError: no clustering, a size below one, a temperature that is not positive, a momentum out of range; in
            `before_training`, more clusters than images.

    Reference:
        Li et al., 2021, "Prototypical Contrastive Learning of Unsupervised Representations", equations 10-12 and
        algorithm 1 (https://arxiv.org/abs/2005.04966).
    """

    citation: ClassVar[str] = r"""@article{li2020pcl,
  title = {Prototypical Contrastive Learning of Unsupervised Representations},
  author = {Li, Junnan and Zhou, Pan and Xiong, Caiming and Hoi, Steven C. H.},
  journal = {arXiv:2005.04966},
  year = {2020}
}"""

    views: ClassVar[str] = "pcl"
    loss_parts: ClassVar[tuple[str, ...]] = ("info_nce", "proto_nce")
    needs_features: ClassVar[bool] = True
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
        """Flags of the method, beside MoCo's."""

        queue_size: int = field(default=16384, metadata={"help": "keys of earlier batches that are kept as negatives"})
        temperature: float = field(default=0.2, metadata={"help": "of the softmax, and the prototypes' mean"})
        num_clusters: list[int] = field(
            default_factory=lambda: [25000, 50000, 100000],
            metadata={"help": "clusters of each clustering (for ImageNet); at most the images, better a tenth of them"},
        )
        prototype_warmup_epochs: float = field(default=20.0, metadata={"help": "epochs of InfoNCE alone"})
        prototype_weight: float = field(default=1.0, metadata={"help": "of the prototypes' loss"})
        kmeans_iterations: int = field(default=20, metadata={"help": "of k-means"})
        kmeans_restarts: int = field(default=5, metadata={"help": "starts of k-means, of which the best is kept"})

    clustered: Tensor

    def __init__(self, encoder: VisionEncoder, config: Config | None = None) -> None:
        super().__init__(encoder, config)
        config = self.config
        if not config.num_clusters or min(config.num_clusters) < 2:
            raise ValueError(f"num_clusters={config.num_clusters} must name numbers of 2 or more, e.g. 250 500 1000")
        for name, least in (("prototype_warmup_epochs", 0), ("prototype_weight", 0), ("kmeans_iterations", 1)):
            if not getattr(config, name) >= least:
                raise ValueError(f"{name}={getattr(config, name)} must be at least {least}")
        if config.kmeans_restarts < 1:
            raise ValueError(f"kmeans_restarts={config.kmeans_restarts} must be at least 1; the official code has 5")
        self.register_buffer("clustered", torch.zeros((), dtype=torch.bool))
        self._clustered = False  # the same for the host, which would wait for the device to read it every step
        self.register_load_state_dict_post_hook(_read_clustered)

    def build_head(self, width: int) -> nn.Module:
        """Two layers without BatchNorm: `[N, width]` to `[N, dim]`."""
        return MLPHead(width, width, self.config.dim, 2, norm=None)

    def before_training(self, rows: int | None, batch_size: int) -> None:
        """Room for the clusters of so many images."""
        super().before_training(rows, batch_size)
        most = max(self.config.num_clusters)
        if rows is None or most > rows:
            raise ValueError(
                f"num_clusters={self.config.num_clusters}: {most} clusters of {rows} images; use numbers below the "
                f"images, e.g. --num_clusters {max(2, (rows or 0) // 100)} {max(4, (rows or 0) // 50)}"
            )
        self._make_room(rows)

    def _make_room(self, rows: int) -> None:
        """Buffers of their final sizes, so that a checkpoint fits."""
        device, dim = self.clustered.device, self.config.dim
        for number, k in enumerate(self.config.num_clusters):
            self.register_buffer(f"prototypes_{number}", torch.zeros(k, dim, device=device))
            self.register_buffer(f"concentration_{number}", torch.ones(k, device=device))
            self.register_buffer(f"cluster_of_{number}", torch.zeros(rows, dtype=torch.int64, device=device))
            # equal on every rank by themselves
            names = ("prototypes", "concentration", "cluster_of")
            self._ddp_params_and_buffers_to_ignore += [f"{name}_{number}" for name in names]

    @property
    def features_due(self) -> bool:  # type: ignore[override]
        """Whether the epoch that begins needs clusters."""
        return self.epoch + 1e-6 >= self.config.prototype_warmup_epochs

    def epoch_features(self, views: Tensor) -> Tensor:
        """The keys of images that are not augmented: `[B, 1, 3, H, W]` to `[B, dim]`."""
        return self._project(self.teacher.module, views)[:, 0]

    @torch.no_grad()
    def before_epoch(self, features: Tensor) -> None:
        """Clusters of all images; each rank searches among its share of the rows.

        Args:
            features: `[rows, dim]`, by row number, the same on every rank.
        """
        if not self.features_due:
            return
        rows = len(features)
        if not hasattr(self, "cluster_of_0") or len(self.get_buffer("cluster_of_0")) != rows:
            self._make_room(rows)
        own = slice(rows * rank() // world_size(), rows * (rank() + 1) // world_size())
        config, share = self.config, features[own].to(self.clustered.device)
        for number, k in enumerate(config.num_clusters):
            found = spherical_kmeans(
                share, k, iterations=config.kmeans_iterations, restarts=config.kmeans_restarts, seed=number
            )
            phi = concentration(share, found.centroids, found.assignments, temperature=config.temperature)
            self.get_buffer(f"prototypes_{number}").copy_(found.centroids)
            self.get_buffer(f"concentration_{number}").copy_(phi)
            self.get_buffer(f"cluster_of_{number}").copy_(all_gather(found.assignments))
            summary = f"{k} clusters of {rows} images, mean cosine {found.similarity:.3f}, temperatures"
            logger.info("%s %.3f to %.3f", summary, phi.min().item(), phi.max().item())
        self.clustered.fill_(True)
        self._clustered = True

    def embed(  # type: ignore[override]
        self, views: Tensor, index: Tensor, seeds: Tensor | None = None
    ) -> dict[str, Tensor]:
        """As `QueueObjective.embed`, with the rows' numbers `index` int64 `[B]` in the data."""
        embeddings = super().embed(views, seeds)
        return embeddings if self.replaying else embeddings | {"index": index}

    def loss(self, embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        """`embeddings` as `embed` returns them."""
        found = super().loss(embeddings)
        if not self._clustered:
            return found
        numbers = range(len(self.config.num_clusters))
        prototypes = [self.get_buffer(f"prototypes_{number}") for number in numbers]
        concentrations = [self.get_buffer(f"concentration_{number}") for number in numbers]
        assigned = [self.get_buffer(f"cluster_of_{number}")[embeddings["index"]] for number in numbers]
        parts = [proto_nce(query, prototypes, concentrations, assigned) for query in embeddings["query"].unbind(1)]
        among = torch.stack(parts).sum()
        metrics = {**found.metrics, "info_nce": found.loss.detach(), "proto_nce": among.detach()}
        return ObjectiveOutput(loss=found.loss + self.config.prototype_weight * among, metrics=metrics)

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float | None:
        """As MoCo's; None once there are prototypes, whose temperatures differ."""
        return None if self._clustered else super().chance_loss(batch_size, positives)


def _read_clustered(objective: PCL, _: Any) -> None:
    objective._clustered = bool(objective.clustered)
