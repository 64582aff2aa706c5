"""What the ranks do in test_distillation; importable, because workers unpickle by name."""

from __future__ import annotations

import torch
from work import share

from mllm_vision import distributed
from mllm_vision.functional import distillation, prototypes
from mllm_vision.modules.centring import Centring


def row_losses(student, taught, mask, sizes):
    """{name: (value, gradient of all rows)} as DDP's mean over ranks leaves it. `student` is [N, V, K]."""
    prototypes_, phi = torch.eye(student.shape[-1], dtype=student.dtype), torch.rand(student.shape[-1]).double() + 0.1
    chosen = share(mask, sizes)

    def cluster_loss(own, teacher, repeats=True):
        return prototypes.proto_nce(own[:, 0], [prototypes_], [phi], [teacher[:, 0].argmax(1)], repeats=repeats)

    losses = {
        "negative_cosine": lambda own, teacher: distillation.negative_cosine(own[:, 0], teacher[:, 0]),
        "negative_cosine of both": lambda own, teacher: distillation.negative_cosine(
            own[:, 0], own[:, 1], stop_gradient=False
        ),
        "dino": distillation.dino_loss,
        "ibot": lambda own, teacher: distillation.ibot_loss(own, teacher, chosen),
        "koleo": lambda own, teacher: distillation.koleo(own[:, 0]),
        "proto_nce": cluster_loss,
        "proto_nce of the paper": lambda own, teacher: cluster_loss(own, teacher, repeats=False),
    }
    found = {}
    for name, loss in losses.items():
        own = share(student, sizes).clone().requires_grad_()
        value = loss(own, share(taught, sizes))
        value.backward()
        found[name] = value.item(), distributed.all_gather(own.grad) / distributed.world_size()
    return found


def teacher_side(logits, sizes):
    """Sinkhorn's rows, and the centre after two batches, each rank with its share."""
    own = share(logits, sizes)
    balanced = distributed.all_gather(distillation.sinkhorn_knopp(own, temperature=0.1))
    centring = Centring(logits.shape[1]).double()
    for batch in (own, own**2):
        centring(batch, 0.1)
        centring.update()
    return balanced, centring.centre


def clusters(rows, k, sizes):
    """Centroids, all assignments, similarity and concentrations."""
    own = share(rows, sizes)
    found = prototypes.spherical_kmeans(own, k, restarts=2, seed=3)
    phi = prototypes.concentration(own, found.centroids, found.assignments)
    return found.centroids, distributed.all_gather(found.assignments), found.similarity, phi
