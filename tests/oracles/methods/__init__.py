"""The methods once more, from papers and official codes, as plain loops in torch: ten steps from equal weights.

Each file has `train(start, batches, given)`: the losses of the steps, and after the last one every weight by the name
that the method's `state_dict` gives it. Nothing here imports the package but `draws` of random numbers, which are
input. `start` (a `Start`) holds the network before any head and the state to begin with, `given` the settings.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Start:
    """`backbone`: a transformers model of the encoder, a copy. `state`: the method's `state_dict`, a copy."""

    backbone: nn.Module
    state: dict[str, Tensor]

    def load(self, module: nn.Module, prefix: str) -> nn.Module:
        """`module`, in training mode, with the weights of `prefix`."""
        own = {key.removeprefix(prefix): value for key, value in self.state.items() if key.startswith(prefix)}
        module.double().load_state_dict(own)
        return module.train()


def vectors(backbone: nn.Module, pixels: Tensor) -> Tensor:
    """The image vector: a ResNet's pooled map, a ViT's class token behind the last norm."""
    found = backbone(pixels)
    return found.pooler_output.flatten(1) if backbone.config.model_type == "resnet" else found.last_hidden_state[:, 0]


def mlp(
    *widths: int, biases: tuple[bool, ...], norm: bool = True, last_norm: dict[str, Any] | None = None
) -> nn.Module:
    """Linear layers with BatchNorm and ReLU between them."""
    parts: list[nn.Module] = []
    for number, bias in enumerate(biases):
        parts.append(nn.Linear(widths[number], widths[number + 1], bias=bias))
        if number < len(biases) - 1:
            parts += [nn.BatchNorm1d(widths[number + 1])] * norm + [nn.ReLU()]
    if last_norm is not None:
        parts.append(nn.BatchNorm1d(widths[-1], **last_norm))
    return nn.Sequential(*parts)


def slow_copy(module: nn.Module) -> nn.Module:
    """A momentum network: in training mode, as in BYOL and MoCo, without gradient."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """slow = m slow + (1 - m) fast."""
    for mine, theirs in zip(slow.parameters(), fast.parameters(), strict=True):
        mine.copy_(momentum * mine + (1 - momentum) * theirs)


def cosine(start: float, end: float, share: float) -> float:
    """From `start` to `end` along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def warm_cosine(step: int, steps: int, warmup: int, peak: float, end: float = 0.0) -> float:
    """Linear from zero over `warmup` steps, then a cosine: the schedule of SimCLR, BYOL, Barlow Twins, MoCo v3, MAE."""
    return peak * step / warmup if step < warmup else cosine(peak, end, (step - warmup) / (steps - warmup))


def inclusive_cosine(step: int, steps: int, warmup: int, peak: float, end: float = 0.0) -> float:
    """DINO's `cosine_scheduler`: `np.linspace(0, peak, warmup)`, whose last step has the peak, then a cosine."""
    return peak * step / (warmup - 1) if step < warmup else cosine(peak, end, (step - warmup) / (steps - warmup))


class Lars:
    """The LARS of Barlow Twins, VICReg, MoCo v3 and BYOL; one-dimensional weights are neither decayed nor adapted."""

    def __init__(self, weights: list[Tensor], decay: float, momentum: float = 0.9, trust: float = 0.001) -> None:
        self.weights, self.decay, self.momentum, self.trust = weights, decay, momentum, trust
        self.buffers = [torch.zeros_like(weight) for weight in weights]

    @torch.no_grad()
    def step(self, rate: float, bias_rate: float | None = None) -> None:
        for weight, buffer in zip(self.weights, self.buffers, strict=True):
            update = weight.grad
            if weight.ndim > 1:
                update = update + self.decay * weight
                if weight.norm() > 0 and update.norm() > 0:
                    update = self.trust * weight.norm() / update.norm() * update
            buffer.mul_(self.momentum).add_(update)
            weight.sub_((rate if weight.ndim > 1 or bias_rate is None else bias_rate) * buffer)
            weight.grad = None


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of every group, times the group's own `scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


def named(**parts: nn.Module) -> dict[str, Tensor]:
    """State of the parts by name; `teacher__module__head` stands for `teacher.module.head`."""
    return {
        f"{name.replace('__', '.')}.{key}": value
        for name, part in parts.items()
        for key, value in part.state_dict().items()
    }


def unit(rows: Tensor) -> Tensor:
    """Rows of unit length."""
    return F.normalize(rows, dim=-1)


def labelled_loop(start: Start, batches: list[Any], given: dict[str, Any], batch_loss: Any) -> tuple[list[float], Any]:
    """SGD with momentum on the head's rows of both views: the training of the methods that learn from labels.

    `batch_loss(z, labels, given)` receives `[2 N, D]`, all first views before all second ones.
    """
    encoder = start.load(start.backbone, "encoder.backbone.")
    widths = given["width"], given["head_hidden"], given["head_out"]
    head = start.load(mlp(*widths, biases=(True, True), norm=False), "head.")
    weights = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(weights, given["rate"], momentum=0.9, weight_decay=given["weight_decay"])
    losses = []
    for step, batch in enumerate(batches):
        set_rate(optimizer, warm_cosine(step, len(batches), given["warmup"], given["rate"], 0.001 * given["rate"]))
        z = head(vectors(encoder, torch.cat(batch["views"].unbind(1))))
        loss = batch_loss(z, batch["labels"], given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, named(encoder__backbone=encoder, head=head)
