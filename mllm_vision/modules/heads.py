"""Projection heads and predictors of the methods that learn from images alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm_vision.modules.batch_norm import GlobalBatchNorm1d

NORMS = (None, "batch", "batch_no_bias", "batch_no_affine")
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


def _norm(kind: str | None, width: int) -> list[nn.Module]:
    if kind not in NORMS:
        raise ValueError(f"norm={kind!r} must be one of {', '.join(map(repr, NORMS))}")
    if kind is None:
        return []
    norm = GlobalBatchNorm1d(width, affine=kind != "batch_no_affine")
    if kind == "batch_no_bias":
        norm.bias.requires_grad_(False)  # stays at the zero that it starts at
    return [norm]


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


class MLPHead(nn.Sequential):
    """Linear layers with a norm and an activation between them.

    Args:
        in_features, hidden, out: widths; `hidden` of every layer but the last.
        layers: how many linear layers; 1 is a linear head without hidden ones.
        norm: after every hidden layer: None, `"batch"`, `"batch_no_bias"` (a scale alone) or `"batch_no_affine"`.
            BatchNorm is that of all ranks (`GlobalBatchNorm1d`).
        last_norm: after the last layer, of the same kinds.
        bias: of the hidden linear layers; default where no norm follows them.
        last_bias: of the last linear layer; default where no norm follows it.
        activation: `"relu"` or `"gelu"`.

    Attributes:
        in_features, out_features: widths.

    Raises:
        ValueError: a size below one, an unknown norm or activation; calling it with rows of another width.

    Reference:
        Chen et al., 2020, "A Simple Framework for Contrastive Learning of Visual Representations", section 4.2
        (https://arxiv.org/abs/2002.05709).

    Example:
        >>> MLPHead(8, 16, 4, 2, last_norm="batch_no_affine")(torch.randn(3, 8)).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out: int,
        layers: int = 2,
        *,
        norm: str | None = "batch",
        last_norm: str | None = None,
        bias: bool | None = None,
        last_bias: bool | None = None,
        activation: str = "relu",
    ) -> None:
        _check_sizes(in_features=in_features, hidden=hidden, out=out, layers=layers)
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation={activation!r} must be one of {', '.join(map(repr, _ACTIVATIONS))}")
        parts: list[nn.Module] = []
        width = in_features
        for _ in range(layers - 1):
            parts += [nn.Linear(width, hidden, bias=norm is None if bias is None else bias), *_norm(norm, hidden)]
            parts += [_ACTIVATIONS[activation]()]
            width = hidden
        parts += [nn.Linear(width, out, bias=last_norm is None if last_bias is None else last_bias)]
        super().__init__(*parts, *_norm(last_norm, out))
        self.in_features, self.out_features = in_features, out

    def forward(self, input: Tensor) -> Tensor:
        """`[N, in_features]` to `[N, out_features]`; of `[B, V, in_features]` all B V rows are one batch."""
        _check_width(input, self.in_features)
        if input.ndim == 2:
            return super().forward(input)
        return super().forward(input.flatten(0, -2)).unflatten(0, input.shape[:-1])


class NormalizedLinear(nn.Module):
    """Weight-normalised linear layer without bias: row i of the weight is g_i v_i / |v_i|.

    v starts as the weight of `nn.Linear` does, as in the official codes of DINO and DINOv2: only its direction counts,
    but its length sets how far a step of the optimizer turns it.

    Args:
        in_features, out_features: widths.
        learn_norm: train g; otherwise it stays one, which keeps the logits of prototypes cosines.

    Reference:
        Salimans and Kingma, 2016, "Weight Normalization", equation 2 (https://arxiv.org/abs/1602.07868).
    """

    def __init__(self, in_features: int, out_features: int, *, learn_norm: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.norm = nn.Parameter(torch.ones(out_features), requires_grad=learn_norm)
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return F.linear(input, F.normalize(self.weight, dim=1) * self.norm[:, None])


class DINOHead(nn.Module):
    """DINO's head: an MLP with GELU to a bottleneck, unit length, then weight-normalised prototypes.

    Args:
        in_features: width of the encoder's vector.
        out: number of prototypes (65536; 1024 for data under 20,000 images).
        hidden, bottleneck: widths; layers: of the MLP, the bottleneck's included.
        norm: None as for ViTs, or `"batch"` as the paper's for convolutional networks.
        learn_norm: train the length of the prototypes too (the official code fixes it for large ViTs).

    Attributes:
        mlp: to the bottleneck. last_layer: the prototypes; DINO freezes it for the first epoch.
        in_features, out_features: widths.

    Raises:
        ValueError: a size below one, an unknown norm; calling it with rows of another width.

    Reference:
        Caron et al., 2021, "Emerging Properties in Self-Supervised Vision Transformers", section 3.1 and appendix C
        (https://arxiv.org/abs/2104.14294).

    Example:
        >>> DINOHead(8, 32, hidden=16, bottleneck=4)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        in_features: int,
        out: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        *,
        norm: str | None = None,
        learn_norm: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(out=out)
        self.mlp = MLPHead(in_features, hidden, bottleneck, layers, norm=norm, bias=True, activation="gelu")
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = NormalizedLinear(bottleneck, out, learn_norm=learn_norm)
        self.in_features, self.out_features = in_features, out

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to logits `[..., out_features]`, before any temperature."""
        return self.last_layer(F.normalize(self.mlp(input), dim=-1, eps=1e-6))


def _check_width(rows: Tensor, width: int) -> None:
    if rows.shape[-1] != width:
        raise ValueError(
            f"the head takes rows of width {width}, got {list(rows.shape)}; build it with in_features={rows.shape[-1]} "
            "(encoder.pooled_size)"
        )
