"""What the ranks of test_norm_dtype.py run."""

from __future__ import annotations

import torch

from mllm_vision.distributed import rank, world_size


def normalised(dtype: str) -> torch.Tensor:
    """This rank's maps through a convolution and the norm behind it, under autocast."""
    from mllm_vision.modules.batch_norm import GlobalBatchNorm2d

    torch.manual_seed(3)
    layer, norm = torch.nn.Conv2d(2, 6, 1), GlobalBatchNorm2d(6, momentum=None)
    maps = torch.randn(8, 2, 3, 3).chunk(world_size())[rank()]
    with torch.autocast("cpu", dtype=getattr(torch, dtype)):
        return norm(layer(maps)).detach()
