"""How the embeddings of a set of images fill their space; a collapsed encoder shows here without any
label.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mllm_vision.data.pairs import captions_of
from mllm_vision.data.records.sampling import bytes_id, column_values, draw_key
from mllm_vision.evaluation.base import Evaluation, Evaluator, dual_model, encode_rows, image_model
from mllm_vision.evaluation.images import check_columns, draw_rows
from mllm_vision.evaluation.loading import encode_records
from mllm_vision.functional import geometry

logger = logging.getLogger(__name__)

LEAST_STD = 0.1  # of geometry_of's std; the mean cosine of two images is then above 0.99
LEAST_RANK_SHARE = 0.02  # of the rank that is possible
VIEW_SCALE = (0.2, 1.0)  # share of the image that a crop keeps, for alignment
SPECTRUM_LENGTH = 2048  # eigenvalues kept for the report, the largest ones
DEVIATIONS_LENGTH = 512  # dimensions kept for it; beyond it every n-th is taken
POWER_LAW = (4, 100)  # indices that alpha-ReQ is fitted to, as its authors' code does: few rows bend the tail down


def geometry_of(features: torch.Tensor) -> dict[str, float]:
    """Figures of one cloud of features ``[N, D]``, N >= 2.

    ``effective_rank`` (of the centred features), ``rankme``, ``alpha_req`` (of eigenvalues 4 to 100; left out where
    the spectrum has fewer than five), ``uniformity``, ``std`` (mean standard deviation a dimension of the unit
    vectors, times sqrt(D): 1 when spread evenly over the sphere, 0 when collapsed), ``dead_dimensions`` (share of
    dimensions that do not vary).
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
    with suppress(ValueError):  # too few directions are left: effective_rank already says so
        figures["alpha_req"] = geometry.alpha_req(features, first=POWER_LAW[0], last=POWER_LAW[1]).item()
    return figures


def warnings_of(figures: Mapping[str, float]) -> list[str]:
    """What the figures of `geometry_of` say of collapse, in words; nothing where they are sound.

    Complete collapse (all features equal), dimensional collapse (few directions used: Jing et al. 2021,
    https://arxiv.org/abs/2110.09348), and dimensions that do not vary at all.
    """
    warnings = []
    possible = min(figures["count"] - 1, figures["dimensions"])
    if figures["std"] < LEAST_STD:
        warnings.append(
            f"collapse: the features of all images are nearly equal (std {figures['std']:.2g}; 1 is evenly spread)"
        )
    elif figures["effective_rank"] < max(1.5, LEAST_RANK_SHARE * possible):
        warnings.append(
            f"dimensional collapse: an effective rank of {figures['effective_rank']:.3g} where {possible:g} is possible"
        )
    if figures["dead_dimensions"] > 0.5:
        warnings.append(f"{figures['dead_dimensions']:.0%} of the dimensions do not vary")
    return warnings


def deviations_of(features: torch.Tensor) -> list[float]:
    """Standard deviation of each dimension of the unit vectors times sqrt(D), descending, thinned to
    DEVIATIONS_LENGTH; 1 for all of them when the vectors are spread evenly.
    """
    unit = F.normalize(features.float(), dim=-1)
    values = (unit.std(dim=0, unbiased=False) * features.shape[1] ** 0.5).sort(descending=True).values
    step = -(-len(values) // DEVIATIONS_LENGTH)
    return [float(f"{value:.4g}") for value in values[::step].tolist()]


def spectrum_of(features: torch.Tensor) -> list[float]:
    """The largest SPECTRUM_LENGTH eigenvalues of the covariance in descending order, as shares of the sum of all."""
    values = geometry.spectrum(features)
    values = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return [float(f"{value:.4g}") for value in values[:SPECTRUM_LENGTH].tolist()]


class Geometry(Evaluator):
    """The collapse board: rank, spectrum, deviations, alignment and uniformity of an encoder's pooled features.

    Args:
        name: evaluator name.
        records: rows with an image (and captions, for an image-text model).
        columns: role ``image`` and, optionally, ``caption``.
        batch_size: images encoded at once.
        limit: at most this many images, drawn at random by ``seed``, since rows often come sorted by class (figures
            of rank depend on their number: compare equal ones only).
        feature: "pooled" (the encoder's own vector), "tokens" (mean of the selected tokens), or "embedding"
            (the projected unit vector of an image-text model).
        views: also ``view_alignment``: mean squared distance of the unit vectors of two random crops of an image.
        seed: of these crops, and of the images where there are more than ``limit``.

    Metrics: see :func:`geometry_of`; with captions and an image-text model also ``alignment`` (mean squared
    distance of an image and its first caption) and ``modality_gap`` (distance of the two means). ``arrays`` has the
    ``spectrum`` and the ``deviations`` by dimension, ``tables["warnings"]`` what :func:`warnings_of` says; `draw`
    writes them as an image.

    Raises:
        ValueError: missing columns, an unknown feature, fewer than two images.
    """

    primary_metric = "effective_rank"
    of_encoder = True

    @classmethod
    def from_flags(cls, name: str, records: Any, flags: Any, sources: Any) -> Geometry:
        columns = sources.columns(records, "image", "caption?")
        return cls(name, records, columns, flags.batch_size, feature=flags.feature, limit=flags.max_samples)

    def __init__(
        self,
        name: str,
        records: Any,
        columns: dict[str, str] | None = None,
        batch_size: int = 64,
        *,
        limit: int | None = 1000,
        feature: str = "pooled",
        views: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(name)
        if feature not in ("pooled", "tokens", "embedding"):
            raise ValueError(f"feature={feature!r} is none of 'pooled', 'tokens', 'embedding'")
        if views and feature == "embedding":
            raise ValueError("views=True measures an encoder: use feature='pooled' or 'tokens'")
        self.records, self.batch_size, self.feature = records, batch_size, feature
        self.views, self.seed = views, seed
        self.columns = columns or {"image": "image"}
        check_columns(records, self.columns, ("image",), f"Geometry {name!r}")
        self.rows = draw_rows(len(records), limit, seed)
        if len(self.rows) < 2:
            raise ValueError(f"Geometry {name!r} needs two images or more; got {len(self.rows)}")

    def evaluate(self, model: Any) -> Evaluation:
        features, kept = self._features(model)
        result = Evaluation(self.primary_metric, geometry_of(features))
        result.arrays["spectrum"] = {
            "values": spectrum_of(features),
            "dimensions": features.shape[1],
            "count": len(features),
        }
        result.arrays["deviations"] = {"values": deviations_of(features)}
        result.tables["warnings"] = [{"message": message} for message in warnings_of(result.metrics)]
        for row in result.tables["warnings"]:
            logger.warning("%s: %s", self.name, row["message"])
        if self.views:
            result.metrics["view_alignment"] = self._view_alignment(image_model(model))
        caption = self.columns.get("caption")
        if caption:
            result.metrics |= self._against_text(model, features, kept, caption)
        return result

    def _view_alignment(self, encoder: Any) -> float:
        """Of two crops an image; which ones, the seed and the image itself decide."""
        from mllm_vision.data.images.transforms import ImageTransform

        crop = ImageTransform(encoder.processor, train=True, scale=VIEW_SCALE)
        device = next(encoder.parameters()).device
        pooled = self.feature == "pooled"

        def encode(images: Sequence[Any]) -> torch.Tensor:
            own = [bytes_id(image.tobytes()) for image in images]
            views = []
            for view in range(2):
                pixels = crop(images, keys=[draw_key(self.seed, view, key) for key in own])
                found = encoder(pixels.to(device, encoder.dtype), pooled=pooled, tokens=not pooled)
                views.append(found.pooled if pooled else found.tokens.mean(dim=1))
            return torch.stack(views, dim=1)

        both, _ = encode_records(encode, self.records, self.columns["image"], self.rows, self.batch_size, self.refused)
        return geometry.alignment(both[:, 0], both[:, 1]).item()

    def _features(self, model: Any) -> tuple[torch.Tensor, list[int]]:
        if self.feature == "embedding":
            encode = dual_model(model).encode_images
        else:
            encoder = image_model(model)

            def encode(images: Sequence[Any]) -> torch.Tensor:
                features = encoder.encode(images, batch_size=self.batch_size, feature=self.feature)
                return features.mean(dim=1) if features.ndim == 3 else features

        return encode_records(encode, self.records, self.columns["image"], self.rows, self.batch_size, self.refused)

    def _against_text(self, model: Any, features: torch.Tensor, kept: Sequence[int], column: str) -> dict[str, float]:
        try:
            dual = dual_model(model)
        except ValueError:
            return {}  # an encoder alone has no text side
        if self.feature != "embedding":
            features, kept = encode_records(
                dual.encode_images, self.records, self.columns["image"], self.rows, self.batch_size, self.refused
            )
        captions = column_values(self.records, column)
        first = {place: found[0] for place, row in enumerate(kept) if (found := captions_of(captions[row]))}
        if not first:
            return {}  # no caption has words
        features = features[list(first)]
        texts = encode_rows(list(first.values()), dual.encode_texts, 256)
        images, texts = F.normalize(features, dim=-1), F.normalize(texts, dim=-1)
        return {
            "alignment": geometry.alignment(images, texts).item(),
            "modality_gap": (images.mean(dim=0) - texts.mean(dim=0)).norm().item(),
        }


class Board(Geometry):
    """`Geometry` of an encoder, with the alignment of two crops of an image, drawn as one image."""

    @classmethod
    def from_flags(cls, name: str, records: Any, flags: Any, sources: Any) -> Board:
        settings = {"feature": flags.feature, "limit": flags.max_samples, "views": True, "seed": flags.seed}
        return cls(name, records, sources.columns(records, "image"), flags.batch_size, **settings)

    def draw(self, result: Evaluation, folder: str | Path) -> list[Path]:
        """Write ``<name>_board.png`` (of ``board``, ``board.png``): the encoder of `result` beside its baselines."""
        from mllm_vision.evaluation.maps.drawing import draw_board

        def curves(name: str) -> dict[str, list[float]]:
            array = {key: value for key, value in result.arrays[name].items() if isinstance(value, list)}
            return {"this model" if key == "values" else key: value for key, value in array.items()}

        base = self.name.replace("/", "_")
        path = Path(folder) / (f"{base}.png" if base.endswith("board") else f"{base}_board.png")
        return [draw_board(curves("spectrum"), curves("deviations"), result.metrics, path)]
