"""BatchNorm over the batch of all ranks, with its exact gradient."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mllm_vision.distributed import all_gather_with_grad, world_size
from mllm_vision.functional.precision import full_fp32


class _GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Shared by the two below: only the shapes that they take differ.

    Attributes:
        group: process group; None is the default group when initialised, else this process alone.
    """

    group: dist.ProcessGroup | None = None

    def forward(self, input: Tensor) -> Tensor:
        """`[N, C]` or `[N, C, ...]` of this rank, normalised with the statistics of all ranks while training.

        Raises:
            ValueError: a shape of another kind, or one value a channel while training.
        """
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        if world_size(self.group) == 1:
            values = input.numel() // input.shape[1]
            if values < 2:
                raise ValueError(
                    f"BatchNorm needs more than one value a channel to normalise with, got {list(input.shape)}; "
                    "use a batch of two or more"
                )
            return super().forward(input)
        if input.device.type == "cuda":  # the same sums in kernels of torch's own, with one copy of the maps
            return nn.SyncBatchNorm.forward(self, input)  # type: ignore[arg-type]
        return self._forward_global(input)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """`group`, by the name that nn.SyncBatchNorm looks for."""
        return self.group

    def _check_non_zero_input_channels(self, input: Tensor) -> None:
        """What nn.SyncBatchNorm (read in torch 2.13) asks of itself; `_check_input_dim` has looked already."""

    def _forward_global(self, input: Tensor) -> Tensor:
        with full_fp32(input.device):
            values = input.to(torch.promote_types(input.dtype, torch.float32)).transpose(0, 1).flatten(1)  # [C, n]
            count = values.new_full((1,), float(values.shape[1]))
            mean = values.mean(1) if values.shape[1] else values.sum(1)
            squares = (values - mean[:, None]).square().sum(1)
            # every rank's mean and its squares around it: adding plain squares would lose small variances
            row = torch.cat([mean, squares, count])[None]
            means, squares, counts = all_gather_with_grad(row, self.group, [1] * world_size(self.group)).split(
                [len(mean), len(mean), 1], dim=1
            )
            total = counts.sum()
            mean = (counts * means).sum(0) / total
            variance = (squares + counts * (means - mean).square()).sum(0) / total
            if self.training and self.track_running_stats and self.running_mean is not None:
                self._keep(mean.detach(), variance.detach() * total / (total - 1))
            shape = (1, -1, *[1] * (input.ndim - 2))
            scale = (variance + self.eps).rsqrt()
            if self.weight is not None:
                scale = scale * self.weight
            normalised = (input - mean.view(shape)) * scale.view(shape)
            if self.bias is not None:
                normalised = normalised + self.bias.view(shape)
            return normalised.to(input.dtype)  # as the norm of one rank: the number of ranks decides no precision

    @torch.no_grad()
    def _keep(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked.to(mean) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)


class GlobalBatchNorm1d(_GlobalBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` whose batch is that of all ranks: W ranks of B/W rows compute what one computes of B.

    Ranks may hold different numbers of rows. The gradient goes through the statistics to the rows of every rank, as
    after `all_gather_with_grad`: DDP's mean over ranks is the gradient of the whole batch. Takes the arguments of
    `nn.BatchNorm1d`, and their `state_dict`s are each other's. On one process it is that class itself.

    Reference:
        Ioffe and Szegedy, 2015, "Batch Normalization", algorithm 1 (https://arxiv.org/abs/1502.03167).

    Example:
        >>> norm = GlobalBatchNorm1d(2)
        >>> norm(torch.tensor([[0.0, 1.0], [2.0, 5.0]])).round().tolist()
        [[-1.0, -1.0], [1.0, 1.0]]
    """


class GlobalBatchNorm2d(_GlobalBatchNorm, nn.BatchNorm2d):
    """The same for feature maps `[N, C, H, W]`: what `nn.SyncBatchNorm` is on GPUs, on any device."""


def make_batch_norm_global(module: nn.Module, group: dist.ProcessGroup | None = None) -> int:
    """Makes every BatchNorm inside `module` global, in place; parameters, buffers and names stay.

    Returns:
        How many were changed.
    """
    kinds: dict[type, type] = {nn.BatchNorm1d: GlobalBatchNorm1d, nn.BatchNorm2d: GlobalBatchNorm2d}
    changed = 0
    for norm in module.modules():
        if type(norm) in kinds:
            norm.__class__ = kinds[type(norm)]
            norm.group = group  # type: ignore[assignment]
            changed += 1
    return changed
