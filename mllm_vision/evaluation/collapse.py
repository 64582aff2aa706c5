"""How the embeddings of a set of pictures fill their space; a collapsed encoder shows here without any
label.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F

from mllm_vision.evaluation.base import Evaluation, Evaluator, dual_model, encode_rows, image_model
from mllm_vision.evaluation.images import as_list, check_columns
from mllm_vision.evaluation.loading import encode_records
from mllm_vision.functional import geometry

SPECTRUM_LENGTH = 512  # eigenvalues kept for the report; beyond it every n-th is taken


def geometry_of(features: torch.Tensor) -> dict[str, float]:
    """Figures of one cloud of features ``[N, D]``, N >= 2.

    ``effective_rank`` (of the centred features), ``rankme``, ``alpha_req`` (left out where the spectrum has
    too few values), ``uniformity``, ``std`` (mean standard deviation a dimension of the unit vectors, times
    sqrt(D): 1 when spread evenly over the sphere, 0 when collapsed), ``dead_dimensions`` (share of dimensions that
    do not vary).
    """
    unit = F.normalize(features.float(), dim=-1)
    deviation = unit.std(dim=0, unbiased=False)
    figures = {
        "effective_rank": geometry.effective_rank(features).item(),
        "rankme": geometry.rankme(features).item(),
        "uniformity": geometry.uniformity(features).item(),
        "std": deviation.mean().item() * features.shape[1] ** 0.5,
        "dead_dimensions": (features.float().std(dim=0, unbiased=False) < 1e-5).float().mean().item(),
        "dimensions": float(features.shape[1]),
        "count": float(len(features)),
    }
    with suppress(ValueError):  # fewer than two directions are left: effective_rank already says so
        figures["alpha_req"] = geometry.alpha_req(features).item()
    return figures


def spectrum_of(features: torch.Tensor) -> list[float]:
    """Covariance eigenvalues in descending order as shares of their sum, thinned to SPECTRUM_LENGTH."""
    values = geometry.spectrum(features)
    values = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    step = -(-len(values) // SPECTRUM_LENGTH)
    return [float(f"{value:.4g}") for value in values[::step].tolist()]


class Geometry(Evaluator):
    """Rank, spectrum, alignment and uniformity of an encoder's pooled features.

    Args:
        name: evaluator name.
        records: rows with an image (and captions, for an image-text model).
        columns: role ``image`` and, optionally, ``caption``.
        batch_size: pictures encoded at once.
        limit: at most this many pictures (figures of rank depend on it: compare equal numbers only).
        feature: "pooled" (the encoder's own vector), "tokens" (mean of the selected tokens), or "embedding"
            (the projected unit vector of an image-text model).

    Metrics: see :func:`geometry_of`; with captions and an image-text model also ``alignment`` (mean squared
    distance of a picture and its first caption) and ``modality_gap`` (distance of the two means).

    Raises:
        ValueError: missing columns, an unknown feature, fewer than two pictures.
    """

    primary_metric = "effective_rank"

    def __init__(
        self,
        name: str,
        records: Any,
        columns: dict[str, str] | None = None,
        batch_size: int = 64,
        *,
        limit: int | None = 1000,
        feature: str = "pooled",
    ) -> None:
        super().__init__(name)
        if feature not in ("pooled", "tokens", "embedding"):
            raise ValueError(f"feature={feature!r} is none of 'pooled', 'tokens', 'embedding'")
        self.records, self.batch_size, self.feature = records, batch_size, feature
        self.columns = columns or {"image": "image"}
        check_columns(records, self.columns, ("image",), f"Geometry {name!r}")
        self.rows = list(range(len(records)))[:limit]
        if len(self.rows) < 2:
            raise ValueError(f"Geometry {name!r} needs two pictures or more; got {len(self.rows)}")

    def evaluate(self, model: Any) -> Evaluation:
        features, kept = self._features(model)
        result = Evaluation(self.primary_metric, geometry_of(features))
        result.arrays["spectrum"] = {
            "values": spectrum_of(features),
            "dimensions": features.shape[1],
            "count": len(features),
        }
        caption = self.columns.get("caption")
        if caption:
            result.metrics |= self._against_text(model, features, kept, caption)
        return result

    def _features(self, model: Any) -> tuple[torch.Tensor, list[int]]:
        if self.feature == "embedding":
            encode = dual_model(model).encode_images
        else:
            encoder = image_model(model)

            def encode(pictures: Sequence[Any]) -> torch.Tensor:
                features = encoder.encode(pictures, batch_size=self.batch_size, feature=self.feature)
                return features.mean(dim=1) if features.ndim == 3 else features

        return encode_records(encode, self.records, self.columns["image"], self.rows, self.batch_size)

    def _against_text(self, model: Any, features: torch.Tensor, kept: Sequence[int], column: str) -> dict[str, float]:
        try:
            dual = dual_model(model)
        except ValueError:
            return {}  # an encoder alone has no text side
        if self.feature != "embedding":
            features, kept = encode_records(
                dual.encode_images, self.records, self.columns["image"], self.rows, self.batch_size
            )
        captions = self.records[column]
        texts = encode_rows([as_list(captions[row])[0] for row in kept], dual.encode_texts, 256)
        images, texts = F.normalize(features, dim=-1), F.normalize(texts, dim=-1)
        return {
            "alignment": geometry.alignment(images, texts).item(),
            "modality_gap": (images.mean(dim=0) - texts.mean(dim=0)).norm().item(),
        }
