"""An encoder that can be worked out by hand, and tiny ones of every kind, for the tests of methods from images."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import tiny
import torch
from torch import nn


class LinearEncoder(nn.Module):
    """What a method asks of a `VisionEncoder`: images `[B, C, H, W]` to `pooled` by one matrix."""

    def __init__(self, pixels: int, width: int, model_type: str = "resnet") -> None:
        super().__init__()
        self.backbone = nn.Linear(pixels, width, bias=False)
        self.backbone.config = SimpleNamespace(model_type=model_type)
        self.pooled_size = width

    def forward(self, pixel_values, tokens=True):
        return SimpleNamespace(pooled=self.backbone(pixel_values.flatten(1)))


def tiny_encoder(kind: str = "vit", seed: int = 0) -> Any:
    """A `VisionEncoder` with random weights: vit, clip, siglip, dinov2, or resnet (two stages, BatchNorm)."""
    from mllm_vision.encoder import VisionEncoder
    from mllm_vision.encoder.build import build_backbone

    if kind == "resnet":
        sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return VisionEncoder.from_backbone(*build_backbone("resnet", image_size=32, **sizes))
    makers = {"vit": tiny.tiny_vit, "clip": tiny.tiny_clip_vision, "siglip": tiny.tiny_siglip_vision}
    makers["dinov2"] = tiny.tiny_dinov2
    return VisionEncoder.from_backbone(makers[kind](seed), tiny.tiny_image_processor(kind))


def make_method(name: str, encoder: Any = None, **config: Any) -> Any:
    """A method by name around an encoder (default: a tiny ViT), with small heads where it has such flags."""
    from mllm_vision.objectives import load_objective

    method = load_objective(name)
    small = {"head_hidden": 24, "head_out": 12, "predictor_hidden": 6, "dim": 12, "queue_size": 10}
    known = method.Config.__dataclass_fields__
    config = {key: value for key, value in small.items() if key in known} | config
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return method(tiny_encoder() if encoder is None else encoder, method.Config(**config))


def view_batch(rows: int, seed: int = 0, size: int = 32) -> dict[str, torch.Tensor]:
    """The columns `views` `[B, 2, 3, H, W]` (the second a noisy copy of the first) and `seeds` `[B]`."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(rows, 1, 3, size, size, generator=generator)
    noise = torch.randn(rows, 1, 3, size, size, generator=generator)
    seeds = torch.randint(0, 2**40, (rows,), generator=generator)
    return {"views": torch.cat([first, first + 0.3 * noise], dim=1), "seeds": seeds}


def sgd_steps(objective: Any, batches: list[dict[str, torch.Tensor]], rate: float = 0.1) -> list[float]:
    """Trains by plain SGD, `after_step` included; the loss of every step."""
    optimizer = torch.optim.SGD([value for value in objective.parameters() if value.requires_grad], lr=rate)
    losses = []
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = objective(**batch).loss
        loss.backward()
        optimizer.step()
        objective.after_step((step + 1) / len(batches))
        losses.append(loss.item())
    return losses


def layout(head: nn.Module) -> list[Any]:
    """What a head is made of, in words: linear layers with their widths and bias, norms with their affine part."""
    found: list[Any] = []
    for part in head:
        if isinstance(part, nn.Linear):
            found.append((part.in_features, part.out_features, part.bias is not None))
        elif isinstance(part, nn.modules.batchnorm._BatchNorm):
            found.append("norm" if part.affine else "norm without affine")
    return found
