"""Fixed sine-cosine positions of a grid of patches, in place of learned ones."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mllm_vision.encoder.families import _side, family_of


def sincos_positions(height: int, width: int, dim: int, *, prefix: int = 0, temperature: float = 10000.0) -> Tensor:
    """Positions of a grid of patches: sines and cosines of its row in the first half, of its column in the second.

    Patches are ordered row by row. MAE's official code puts columns first, MoCo v3's rows: on a square grid they are
    equivalent up to the order of the channels.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        dim: D, divisible by 4: sine and cosine of row and column.
        prefix: tokens before the patches (class token, registers), whose positions are zero.
        temperature: the longest wavelength divided by 2 pi.

    Returns:
        `[prefix + height * width, D]`, fp32.

    Raises:
        ValueError: D is not divisible by 4.

    Reference:
        Vaswani et al., 2017, section 3.5, for two dimensions as in Chen et al., 2021, "An Empirical Study of Training
        Self-Supervised Vision Transformers" (https://arxiv.org/abs/2104.02057), and He et al., 2022, "Masked
        Autoencoders Are Scalable Vision Learners" (https://arxiv.org/abs/2111.06377).

    Example:
        >>> sincos_positions(2, 3, 4)[3].round(decimals=4).tolist()  # row 1, column 0
        [0.8414999842643738, 0.5403000116348267, 0.0, 1.0]
    """
    if dim < 4 or dim % 4:
        near = [value for value in (dim // 4 * 4, (dim // 4 + 1) * 4) if value]
        raise ValueError(
            f"sine-cosine positions need a width divisible by 4, got {dim}; use {' or '.join(map(str, near))}"
        )
    waves = temperature ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows = torch.arange(height, dtype=torch.float64).repeat_interleave(width)[:, None] * waves
    columns = torch.arange(width, dtype=torch.float64).repeat(height)[:, None] * waves
    grid = torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], dim=1)
    return torch.cat([grid.new_zeros(prefix, dim), grid]).float()


@torch.no_grad()
def fix_positions(backbone: PreTrainedModel) -> bool:
    """Overwrites a backbone's learned positions by `sincos_positions` and freezes them, in place.

    They stay a parameter of the checkpoint, which remains an ordinary one.

    Returns:
        Whether the backbone has learned positions; otherwise it is unchanged.

    Raises:
        ValueError: a width that is not divisible by 4.
    """
    family = family_of(backbone)
    if family.positions is None:
        return False
    table = backbone.get_parameter(family.positions)
    side = _side(backbone.config.image_size) // _side(backbone.config.patch_size)
    rows = table.numel() // table.shape[-1]
    table.copy_(sincos_positions(side, side, table.shape[-1], prefix=rows - side * side).view_as(table))
    table.requires_grad_(False)
    return True
