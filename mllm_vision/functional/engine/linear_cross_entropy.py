"""Output layer and cross-entropy chunk by chunk: the loss of language models with large vocabularies.

Logits of `[S, V]` and what autograd keeps of them are often the largest tensors of a training step. A row's gradient
depends only on its own logits, so the forward pass computes value and gradients of one chunk of rows at once, with
the three matrix products of the plain formula, and holds the logits of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_vision.functional.engine.softmax import refuse_double_backward

CHUNK = 256  # rows: the fastest measured at 32k words (scripts/benchmark/linear_cross_entropy.py)
IGNORED = -100  # the target of a row without loss, as in F.cross_entropy


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Sum over rows of w_s CE(z_s, t_s), with z_s = W h_s + b, holding the logits of one chunk of rows.

    Up to `chunk` rows take `F.linear` and `F.cross_entropy` and give their values and gradients bit for bit. More rows
    give the same up to rounding; gradients are computed for the inputs that require them only, so that a frozen output
    layer costs no weight gradient. Under autocast the products run in autocast's type; softmax and sums are fp32 (fp64
    inputs stay fp64).

    Args:
        hidden: `[S, D]` last hidden states, one row for each predicted token.
        weight: `[V, D]` of the output layer.
        targets: `[S]` ids; rows of -100 have no loss and no gradient.
        token_weights: `[S]` factors of the rows' losses, without gradient; default 1.
        label_smoothing: share of the target spread evenly over the vocabulary, as in `F.cross_entropy`.
        softcap: logits become softcap * tanh(z / softcap) (Gemma 2, https://arxiv.org/abs/2408.00118, section 2).
        bias: `[V]` of the output layer.
        chunk: rows whose logits are held at once.

    Returns:
        0-d sum; divide by the number of tokens for the mean.

    Raises:
        ValueError: shapes that do not fit, or values outside of their range.
        RuntimeError: a second derivative of more than one chunk is requested.
    """
    _check(hidden, weight, targets, token_weights, label_smoothing, softcap, bias, chunk)
    if len(hidden) <= chunk:
        logits = _wide(_capped(F.linear(hidden, weight, bias), softcap))
        if token_weights is None:
            return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
        return (losses * token_weights).sum()
    options = (label_smoothing, softcap, chunk, torch.is_grad_enabled())
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, token_weights, *options)
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        token_weights: Tensor | None,
        smoothing: float,
        softcap: float | None,
        chunk: int,
        recorded: bool,
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        needed = [recorded and wanted for wanted in ctx.needs_input_grad[:3]]
        with torch.autocast(device, enabled=False):
            factors = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            rows = _Rows(*factors, needed, smoothing, softcap, min(chunk, len(hidden)))
            weights = rows.factor(targets, token_weights)
            losses = [rows.add(slice(start, start + chunk), targets, weights) for start in range(0, len(hidden), chunk)]
        inputs = hidden, weight, bias
        ctx.save_for_backward(
            *(
                None if gradient is None or like is None else gradient.to(like.dtype)
                for gradient, like in zip(rows.gradients, inputs, strict=True)
            )
        )
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("linear_cross_entropy of more than one chunk has")
        found = [None if gradient is None else gradient * upstream.to(gradient.dtype) for gradient in ctx.saved_tensors]
        return (*found, *[None] * 6)


class _Rows:
    """Losses and gradients of chunks of rows, in buffers that all chunks share."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needed: list[bool],
        smoothing: float,
        softcap: float | None,
        chunk: int,
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.smoothing, self.softcap = smoothing, softcap
        self._logits = hidden.new_empty(chunk, len(weight))
        self._exact = _wide(hidden[:0]).dtype  # of softmax and sums
        same = self._exact == hidden.dtype
        self._soft = self._logits if same and softcap is None else torch.empty_like(self._logits, dtype=self._exact)
        for_hidden, for_weight, for_bias = needed
        self.gradients = [
            torch.empty_like(hidden) if for_hidden else None,
            torch.zeros_like(weight, dtype=self._exact) if for_weight else None,
            torch.zeros_like(bias, dtype=self._exact) if for_bias and bias is not None else None,
        ]

    def factor(self, targets: Tensor, token_weights: Tensor | None) -> Tensor:
        """`[S]` factors of the losses: 0 for ignored rows."""
        counted = (targets != IGNORED).to(self._exact)
        return counted if token_weights is None else counted * token_weights.to(self._exact)

    def add(self, rows: slice, targets: Tensor, weights: Tensor) -> Tensor:
        """The sum of the losses of `rows`; their gradients are added."""
        hidden, factor = self.hidden[rows], weights[rows]
        target = targets[rows]
        target = target.masked_fill(target == IGNORED, 0)[:, None]  # any word will do, as the row's factor is 0
        logits, soft = self._logits[: len(hidden)], self._soft[: len(hidden)]
        if self.bias is None:
            torch.mm(hidden, self.weight.T, out=logits)
        else:
            torch.addmm(self.bias, hidden, self.weight.T, out=logits)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        if soft is not logits:
            soft.copy_(logits)
        true, highest = soft.gather(1, target)[:, 0], soft.amax(1)
        mean = soft.mean(1) if self.smoothing else 0.0
        torch.softmax(soft, 1, out=soft)
        # the largest probability is at least 1/V, so its logarithm is exact where that of the target's may not be
        total = highest - soft.amax(1).log()
        losses = total - (1 - self.smoothing) * true - self.smoothing * mean
        if any(gradient is not None for gradient in self.gradients):
            soft.scatter_add_(1, target, soft.new_full((), self.smoothing - 1).expand_as(target))
            if self.smoothing:
                soft -= self.smoothing / len(self.weight)
            if self.softcap is not None:
                soft *= 1 - (logits.to(self._exact) / self.softcap) ** 2
            self._add_gradients(rows, soft if soft is logits else logits.copy_(soft), factor)
        return (losses * factor).sum()

    def _add_gradients(self, rows: slice, by_logit: Tensor, factor: Tensor) -> None:
        """Adds the gradients of a chunk; the rows' factors are applied to `[rows, D]`, which is smaller."""
        hidden, factor = self.hidden[rows], factor.to(by_logit.dtype)
        for_hidden, for_weight, for_bias = self.gradients
        if for_hidden is not None:
            torch.mm(by_logit, self.weight, out=for_hidden[rows]).mul_(factor[:, None])
        if for_weight is not None:
            scaled = hidden * factor[:, None]
            if for_weight.dtype == scaled.dtype:
                for_weight.addmm_(by_logit.T, scaled)
            else:
                for_weight += by_logit.T @ scaled
        if for_bias is not None:
            for_bias += (by_logit * factor[:, None]).sum(0, dtype=for_bias.dtype)


def _wide(logits: Tensor) -> Tensor:
    """Half-precision logits in fp32, others unchanged."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    label_smoothing: float,
    softcap: float | None,
    bias: Tensor | None,
    chunk: int,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [S, D] and [V, D]")
    for name, value in {"targets": targets, "token_weights": token_weights}.items():
        if value is not None and value.shape != hidden.shape[:1]:
            raise ValueError(f"{name} {list(value.shape)} must be [{len(hidden)}], one for each row of hidden")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {list(bias.shape)} must be [{len(weight)}], one for each row of weight")
    if token_weights is not None and token_weights.requires_grad:
        raise ValueError("token_weights requires a gradient, which is not computed; pass token_weights.detach()")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing} must be between 0 and 1")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be positive, or None for none")
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
