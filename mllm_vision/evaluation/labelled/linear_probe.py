"""A linear classifier on frozen features: what a representation makes linearly separable.

Multinomial logistic regression with an L2 penalty, fitted to the whole training set at once by L-BFGS, as Radford et
al. 2021 (CLIP, section 3.2 and appendix A.3, https://arxiv.org/abs/2103.00020) and Kornblith et al. 2019 do; the
penalty is chosen on rows held out of the training set, never on the test set.

The work is done in the coordinates of the features' principal axes, each scaled by Boehning's bound on the Hessian of
the loss (Boehning 1992, "Multinomial logistic regression algorithm", equation 2.7: at most half the covariance). That
changes no minimum, and makes some dozen iterations enough where strongly correlated features would need thousands.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_vision.distributed import all_gather, all_reduce, rank, world_size
from mllm_vision.evaluation.base import Evaluation
from mllm_vision.evaluation.labelled.images import (
    Labelled,
    LabelledEvaluator,
    LabelledImages,
    guessing,
    predictions_summary,
)
from mllm_vision.functional.precision import wide_dtype

logger = logging.getLogger(__name__)

SWEEP = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
TOLERANCE = 1e-4  # largest entry of the gradient; the same as scikit-learn's LogisticRegression


class Axes(NamedTuple):
    """Standardisation and principal axes: ``apply(features [N, D])`` gives ``[N, R]``, R <= D directions that vary."""

    mean: Tensor
    scale: Tensor
    vectors: Tensor
    variances: Tensor

    def apply(self, features: Tensor) -> Tensor:
        return ((features - self.mean) * self.scale) @ self.vectors


class LinearFit(NamedTuple):
    """A fitted classifier in the coordinates of `Axes`, and how well the fit converged."""

    weight: Tensor  # [C, R]
    bias: Tensor  # [C]
    loss: float  # mean cross-entropy and penalty, at the end
    gradient: float  # largest entry of the gradient, at the end
    iterations: int
    converged: bool

    def predict(self, rotated: Tensor) -> Tensor:
        return (rotated @ self.weight.T + self.bias).argmax(dim=1)


def principal_axes(features: Tensor) -> Axes:
    """Mean, 1 / standard deviation and principal axes of the rows of all ranks.

    Args:
        features: `[n, D]`, this rank's rows.
    """
    total = _total(features)
    mean = all_reduce(features.sum(dim=0)) / total
    variance = all_reduce((features - mean).square().sum(dim=0)) / total
    deviation = variance.sqrt()
    moving = deviation > 1e-6 * (deviation.max() + mean.abs())  # less is rounding
    scale = torch.where(moving, deviation.clamp_min(torch.finfo(features.dtype).tiny).reciprocal(), 0.0)
    standard = (features - mean) * scale
    if total < features.shape[1]:  # fewer rows than dimensions: the same axes from the smaller matrix of the rows
        rows = all_gather(standard)
        variances, vectors = torch.linalg.eigh(rows @ rows.T / total)
        kept = variances > 1e-6 * variances.max().clamp_min(torch.finfo(features.dtype).tiny)
        vectors = rows.T @ (vectors[:, kept] / (total * variances[kept]).sqrt())
    else:
        variances, vectors = torch.linalg.eigh(all_reduce(standard.T @ standard) / total)
        kept = variances > 1e-6 * variances.max().clamp_min(torch.finfo(features.dtype).tiny)
        vectors = vectors[:, kept]
    # From one rank: where two variances are equal, or hardware differs, each rank would turn the axes its own way.
    return Axes(mean, scale, from_first(vectors), from_first(variances[kept]))


def fit_linear(
    rotated: Tensor,
    labels: Tensor,
    classes: int,
    regularisation: float,
    variances: Tensor,
    *,
    start: LinearFit | None = None,
    max_iterations: int = 300,
    tolerance: float = TOLERANCE,
) -> LinearFit:
    """Minimum of mean cross-entropy + regularisation / 2 * |weight|^2 (the bias goes free), over the rows of all ranks.

    Args:
        rotated: `[n, R]`, this rank's rows in the coordinates of `Axes`.
        labels: `[n]` int64.
        classes: C.
        regularisation: weight of the penalty, positive; on standardised features.
        variances: `[R]`, of `Axes`; they only set the pace.
        start: where to begin; zero otherwise.
        max_iterations: of L-BFGS.
        tolerance: largest entry of the gradient at which the fit counts as converged.

    Single precision leaves a gradient of the size of its rounding, which grows with the features (a standardised
    image of 3,072 values: 1e-4). Where the loss falls no further before `tolerance` is met, the fit goes on from
    there in double, so that rounding does not decide what converged.
    """
    stop = (max_iterations, tolerance)
    fit = _descend(rotated, labels, classes, regularisation, variances, start, *stop)
    left = max_iterations - fit.iterations
    if fit.converged or left < 1 or rotated.dtype == wide_dtype(rotated):
        return fit
    finer = _descend(rotated.double(), labels, classes, regularisation, variances.double(), fit, left, tolerance)
    weight, bias = finer.weight.to(rotated.dtype), finer.bias.to(rotated.dtype)
    return finer._replace(weight=weight, bias=bias, iterations=fit.iterations + finer.iterations)


def _descend(
    rotated: Tensor,
    labels: Tensor,
    classes: int,
    regularisation: float,
    variances: Tensor,
    start: LinearFit | None,
    max_iterations: int,
    tolerance: float,
) -> LinearFit:
    """`fit_linear` in the precision of `rotated`, until converged or as near as that precision comes."""
    total, wide = _total(rotated), wide_dtype(rotated)
    pace = torch.cat([(variances / 2 + regularisation).rsqrt(), variances.new_full((1,), 2**0.5)])  # last: the bias
    scaled = rotated.new_zeros(classes, len(pace))
    if start is not None:
        scaled = torch.cat([start.weight, start.bias[:, None]], dim=1).to(pace) / pace
    scaled.requires_grad_(True)
    every = 5  # iterations between two looks at the gradient in the features' own coordinates
    optimizer = torch.optim.LBFGS(
        [scaled], max_iter=every, max_eval=4 * every, history_size=20, line_search_fn="strong_wolfe",
        tolerance_grad=0.0, tolerance_change=0.0,
    )  # fmt: skip

    @torch.enable_grad()
    def closure() -> Tensor:
        optimizer.zero_grad()
        weight = scaled * pace
        losses = F.cross_entropy(rotated @ weight[:, :-1].T + weight[:, -1], labels, reduction="none")
        # in double: near the end the line search compares losses that differ by less than a float can say
        own = losses.sum(dtype=wide) / total
        penalty = regularisation / 2 * weight[:, :-1].square().sum(dtype=wide) / world_size()
        (own + penalty).backward()
        assert scaled.grad is not None
        all_reduce(scaled.grad)  # in place
        return all_reduce((own + penalty).detach())

    iterations, converged, before = 0, False, float("inf")
    while iterations < max_iterations:
        optimizer.step(closure)
        iterations = int(optimizer.state[scaled]["n_iter"])
        loss = float(closure())  # the line search ends with a look at another place
        assert scaled.grad is not None
        gradient = float((scaled.grad / pace).abs().max())
        converged = gradient <= tolerance
        # a fall smaller than rounding is all that the precision gives
        if converged or not before - loss > torch.finfo(rotated.dtype).eps * abs(loss):
            break
        before = loss
    weight = scaled.detach() * pace
    return LinearFit(weight[:, :-1], weight[:, -1], loss, gradient, iterations, converged)


class LinearProbe(LabelledEvaluator):
    """Test accuracy of logistic regression on frozen, standardised features; the penalty is chosen by a sweep.

    Each penalty is fitted to the training rows but for a share held out, from the strongest to the weakest; the one
    with the best accuracy on that share (the stronger of equals) is fitted again to all training rows. Over several
    ranks each keeps its rows and the sums are reduced.

    Args:
        name: evaluator name.
        data: the labelled images; share one with `KnnAccuracy` and each model encodes them once.
        regularisation: penalties to try; a single one is fitted without holding anything out.
        validation: share of the training rows that chooses the penalty.
        max_iterations: of L-BFGS, a fit.
        tolerance: largest entry of the gradient at which a fit counts as converged.
        raw_pixels: also the accuracy on the pixels themselves, as baseline ``raw_pixels`` (computed once).
        seed: of the rows held out.

    Metrics: ``accuracy``, ``mean_class_accuracy``, ``train_accuracy``, ``validation_accuracy`` (with a sweep),
    ``regularisation`` (the one chosen), ``converged`` (1 or 0, of the last fit), ``gradient`` and ``iterations`` of
    it, ``count``; ``tables["sweep"]``, ``tables["class"]``; baselines ``chance`` and ``most_frequent_class``. It warns
    where the last fit did not converge, and where the best penalty is at an end of the sweep.

    Raises:
        ValueError: penalties that are not positive, a share outside (0, 1), too few rows to hold any out.
    """

    @classmethod
    def of_images(cls, name: str, data: LabelledImages, flags: Any) -> LinearProbe:
        sweep = getattr(flags, "probe_regularisation", None) or SWEEP
        return cls(name, data, regularisation=sweep, raw_pixels=flags.raw_pixels, seed=getattr(flags, "seed", 0))

    def __init__(
        self,
        name: str,
        data: LabelledImages,
        *,
        regularisation: Sequence[float] | float = SWEEP,
        validation: float = 0.1,
        max_iterations: int = 300,
        tolerance: float = TOLERANCE,
        raw_pixels: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(name, data, raw_pixels=raw_pixels)
        given = [regularisation] if isinstance(regularisation, (int, float)) else list(regularisation)
        if not given or not all(each > 0 for each in given):
            raise ValueError(f"regularisation={given} must be one positive number or more; e.g. 1e-6 to 1")
        if not 0 < validation < 1:
            raise ValueError(f"validation={validation} must lie in (0, 1); 0.1 holds out a tenth of the training rows")
        self.sweep = sorted(set(given), reverse=True)
        rows = data.count()[0]
        self._held = round(rows * validation)
        if len(self.sweep) > 1 and not 0 < self._held < rows:
            raise ValueError(
                f"validation={validation} of {rows} training rows holds out {self._held}; give one regularisation "
                "alone, or more rows"
            )
        self.max_iterations, self.tolerance, self.seed = max_iterations, tolerance, seed

    def measure(self, train: Labelled, test: Labelled) -> Evaluation:
        names = self.data.class_names
        axes = principal_axes(train.features)
        rotated = axes.apply(train.features)
        chosen, start, table = self._choose(rotated, train, axes.variances)
        fit = self._fit(rotated, train.labels, chosen, axes.variances, start)
        accuracy, by_class, classes = predictions_summary(fit.predict(axes.apply(test.features)), test.labels, names)
        count = sum(int(row["count"]) for row in classes)
        metrics = {"accuracy": accuracy, "mean_class_accuracy": by_class, "count": float(count)}
        metrics["train_accuracy"] = predictions_summary(fit.predict(rotated), train.labels, names)[0]
        if table:
            metrics["validation_accuracy"] = max(row["accuracy"] for row in table)
        metrics |= {"regularisation": chosen, "converged": float(fit.converged)}
        metrics |= {"gradient": fit.gradient, "iterations": float(fit.iterations)}
        if skipped := self.data.skipped(count):
            metrics["skipped"] = skipped
        self._warn(fit, chosen)
        result = Evaluation(self.primary_metric, metrics, guessing(classes, len(names)))
        result.tables = {"class": classes, "sweep": table}
        return result

    def _fit(
        self, rotated: Tensor, labels: Tensor, penalty: float, variances: Tensor, start: LinearFit | None
    ) -> LinearFit:
        stop: dict[str, Any] = {"max_iterations": self.max_iterations, "tolerance": self.tolerance}
        return fit_linear(rotated, labels, self.data.classes, penalty, variances, start=start, **stop)

    def _choose(
        self, rotated: Tensor, train: Labelled, variances: Tensor
    ) -> tuple[float, LinearFit | None, list[dict[str, Any]]]:
        """(the best penalty, its fit, what each one reached on the rows held out)."""
        if len(self.sweep) == 1:
            return self.sweep[0], None, []
        order = torch.randperm(len(self.data.train_labels), generator=torch.Generator().manual_seed(self.seed))
        used = set(self.data.train_rows())
        held = set([row for row in order.tolist() if row in used][: self._held])
        out = torch.tensor([row in held for row in train.rows], device=rotated.device, dtype=torch.bool)
        inside, inner_labels = rotated[~out], train.labels[~out]
        outside, outer_labels = rotated[out], train.labels[out]
        fit: LinearFit | None = None
        best: tuple[float, float, LinearFit | None] = (-1.0, self.sweep[0], None)
        table = []
        for penalty in self.sweep:
            fit = self._fit(inside, inner_labels, penalty, variances, fit)
            right = predictions_summary(fit.predict(outside), outer_labels, self.data.class_names)[0]
            table.append(
                {"name": f"{penalty:g}", "accuracy": right, "iterations": fit.iterations, "converged": fit.converged}
            )
            if right > best[0]:
                best = (right, penalty, fit)
        return best[1], best[2], table

    def _warn(self, fit: LinearFit, chosen: float) -> None:
        if not fit.converged:
            logger.warning(
                "%s: logistic regression stopped after %d iterations with a gradient of %.2g (converged at %.2g); "
                "raise max_iterations", self.name, fit.iterations, fit.gradient, self.tolerance,
            )  # fmt: skip
        if len(self.sweep) > 2 and chosen in (self.sweep[0], self.sweep[-1]):
            logger.warning(
                "%s: the best regularisation, %g, is at an end of the sweep; widen it", self.name, chosen
            )  # fmt: skip


def from_first(value: Tensor) -> Tensor:
    """The tensor of the first rank, on every rank; shapes may differ."""
    if world_size() == 1:
        return value
    shape = torch.tensor(value.shape, device=value.device)
    torch.distributed.broadcast(shape, src=0)
    given = value.contiguous() if rank() == 0 else value.new_empty(shape.tolist())
    torch.distributed.broadcast(given, src=0)
    return given


def _total(rows: Tensor) -> int:
    return int(all_reduce(torch.tensor([len(rows)], device=rows.device)))
