"""What a DINO teacher says: its logits centred or balanced over the batch, and sharpened."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mllm_vision.distributed import all_reduce
from mllm_vision.functional.distillation import centred_softmax, sinkhorn_knopp

CENTRINGS = ("centre", "sinkhorn", "none")


class Centring(nn.Module):
    """Teacher's logits to probabilities, with the state that takes.

    Args:
        width: K, the number of prototypes.
        kind: `"centre"` subtracts a moving average of the logits, `"sinkhorn"` balances the prototypes over the batch
            of all ranks and needs no state, `"none"` only sharpens (which collapses; for studies).
        momentum: of the moving average.
        iterations: of Sinkhorn-Knopp.

    Attributes:
        centre: `[K]`, zeros at first; part of every checkpoint, equal on every rank.

    Raises:
        ValueError: an unknown kind, a momentum out of range, or no iteration.

    Reference:
        Caron et al., 2021, "Emerging Properties in Self-Supervised Vision Transformers", equation 4
        (https://arxiv.org/abs/2104.14294): centre = m centre + (1 - m) mean of the batch's logits, after the loss.

    Example:
        >>> centring = Centring(2, momentum=0.5)
        >>> centring(torch.tensor([[4.0, 0.0]]), temperature=0.1).round().tolist()  # the centre is still zero
        [[1.0, 0.0]]
        >>> centring.update()
        >>> centring.centre.tolist()
        [2.0, 0.0]
    """

    centre: Tensor

    def __init__(self, width: int, kind: str = "centre", *, momentum: float = 0.9, iterations: int = 3) -> None:
        super().__init__()
        if kind not in CENTRINGS:
            raise ValueError(f"centring={kind!r} must be one of {', '.join(map(repr, CENTRINGS))}")
        if not 0 <= momentum < 1:
            raise ValueError(f"centre_momentum={momentum} must lie in [0, 1); the paper's is 0.9")
        if iterations < 1:
            raise ValueError(f"sinkhorn iterations={iterations} must be at least 1; the papers use 3")
        self.kind, self.momentum, self.iterations = kind, momentum, iterations
        self.register_buffer("centre", torch.zeros(width))
        self._pending: Tensor | None = None

    def forward(
        self,
        logits: Tensor,
        temperature: float,
        group: dist.ProcessGroup | None = None,
        *,
        counted: Tensor | None = None,
    ) -> Tensor:
        """`[N, K]` logits of this rank's rows to probabilities; while training the batch's mean waits for `update`.

        Ranks may hold different N, also none. `counted` bool `[N]`: the rows that are there; the others are room that
        was not needed, take no part in what the rows share, and what comes out for them is not to be used.
        """
        if self.kind == "sinkhorn":
            return sinkhorn_knopp(
                logits, temperature=temperature, iterations=self.iterations, counted=counted, group=group
            )
        if self.kind == "centre" and self.training:
            rows = logits.detach().to(self.centre)
            there = rows.new_ones(len(rows)) if counted is None else counted.to(rows)
            sums = all_reduce(torch.cat([there @ rows, there.sum()[None]]), group)
            mean = sums[:-1] / sums[-1].clamp_min(1)
            self._pending = torch.where(sums[-1] > 0, mean, self.centre)  # without any row it stays where it is
        return centred_softmax(logits, self.centre, temperature=temperature)

    @torch.no_grad()
    def update(self) -> None:
        """The centre moves towards the mean of the last batch; once per optimizer step."""
        if self._pending is not None:
            self.centre.lerp_(self._pending, 1 - self.momentum)
        self._pending = None
