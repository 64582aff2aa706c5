"""Momentum teachers: a slow copy of a module that follows it by an exponential moving average."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def cosine_momentum(start: float, progress: float, end: float = 1.0) -> float:
    """Momentum that rises from `start` to `end` along half a cosine, as the training goes on.

    m = end - (end - start) (1 + cos(pi progress)) / 2, with the paper's end of 1.

    Args:
        start: m at the beginning, in [0, 1].
        progress: share of the training that is done; outside of [0, 1] the nearer end holds.
        end: m at the end.

    Reference:
        Grill et al., 2020, "Bootstrap Your Own Latent", section 3.2 (https://arxiv.org/abs/2006.07733); MoCo v3, DINO
        and DINOv2 do the same from other starts.

    Example:
        >>> [round(cosine_momentum(0.99, share), 4) for share in (0.0, 0.5, 1.0)]
        [0.99, 0.995, 1.0]
    """
    return end - (end - start) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


class MomentumTeacher(nn.Module):
    """A copy of `student` whose weights follow as teacher = m teacher + (1 - m) student.

    The copy never trains and stays in evaluation mode (no dropout, stored norm statistics), so that its outputs
    depend on the rows alone: the same in chunks as at once, on two ranks as on one. Its weights belong to the
    `state_dict` of whoever owns it, which makes a resumed run exact. Buffers (norm statistics) are copied.

    With `batch_statistics` the BatchNorms of the copy train and rest with their owner: in training they normalise by
    the batch that the teacher sees and keep running statistics of their own, as in BYOL and MoCo. Rows then depend on
    one another, so such a teacher runs in `loss`, or where the batch is not cut in chunks.

    Args:
        student: any module; it is not kept, and `update` names it again. Several: an `nn.ModuleDict` of them.
        momentum: m, in [0, 1].
        batch_statistics: see above.

    Attributes:
        module: the copy. Call its methods under `torch.no_grad()`.

    Raises:
        ValueError: a momentum out of range, or weights in half precision, where an update of 1 - m is rounded away.

    Reference:
        He et al., 2020, "Momentum Contrast for Unsupervised Visual Representation Learning", equation 2
        (https://arxiv.org/abs/1911.05722).

    Example:
        >>> student = nn.Linear(2, 2)
        >>> teacher = MomentumTeacher(student, momentum=0.5)
        >>> before = student.weight.detach().clone()
        >>> _ = student.weight.data.zero_()
        >>> teacher.update(student)
        >>> bool(torch.equal(teacher.module.weight, before / 2))
        True
    """

    def __init__(self, student: nn.Module, momentum: float, *, batch_statistics: bool = False) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum} is not between 0 and 1; the papers use 0.99 to 0.9995")
        self.momentum, self.batch_statistics = float(momentum), batch_statistics
        self.module: Any = copy.deepcopy(student).eval().requires_grad_(False)
        low = {value.dtype for value in self.module.parameters() if value.is_floating_point() and value.itemsize < 4}
        if low:
            raise ValueError(
                f"a momentum teacher of {', '.join(sorted(map(str, low)))} weights would round its updates of "
                f"{1 - momentum:.3g} away; keep the weights in float32 and compute in half precision (--bf16)"
            )
        self.train(student.training)

    def train(self, mode: bool = True) -> MomentumTeacher:
        """The teacher stays in evaluation mode whatever its owner does, but for BatchNorms with `batch_statistics`."""
        super().train(False)
        if self.batch_statistics:
            for norm in self._norms().values():
                norm.train(mode)
        return self

    def _norms(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self.module.named_modules() if isinstance(module, _BatchNorm)}

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float | None = None) -> None:
        """One step towards `student`, after the optimizer's.

        Args:
            student: the module that was copied, with its weights of now.
            momentum: of this step, for those who raise it over the training.

        Raises:
            ValueError: `student` has other parameters than the copy.
        """
        share = 1 - (self.momentum if momentum is None else momentum)
        mine, theirs = dict(self.module.named_parameters()), dict(student.named_parameters())
        if mine.keys() != theirs.keys():
            differing = ", ".join(sorted(mine.keys() ^ theirs.keys())[:3])
            raise ValueError(f"this is not the module that was copied: only one of the two has {differing}")
        if mine:
            torch._foreach_lerp_(list(mine.values()), [theirs[name].detach() for name in mine], share)
        sources, norms = dict(student.named_buffers()), self._norms() if self.batch_statistics else {}
        for name, buffer in self.module.named_buffers():
            if name.rpartition(".")[0] not in norms:  # those have statistics of their own
                buffer.copy_(sources[name])
