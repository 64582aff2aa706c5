"""Image-text retrieval, both ways, with any number of captions an image.

Source: Karpathy and Fei-Fei 2015 (the Flickr protocol): an image query counts as solved at K when any of its
captions is among the first K texts; a text query when its image is among the first K images.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from math import comb
from typing import Any

import torch
import torch.nn.functional as F

from mllm_vision.data.pairs import captions_of
from mllm_vision.data.records.sampling import BadRow, column_values
from mllm_vision.evaluation.base import Evaluation, Evaluator, dual_model, encode_rows, exact_arithmetic, refusal_counts
from mllm_vision.evaluation.images import check_columns, draw_rows, row_image
from mllm_vision.evaluation.loading import encode_images

logger = logging.getLogger(__name__)


def first_hit_ranks(scores: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """How many wrong candidates stand before (or level with) the best right one, for each query.

    Args:
        scores: ``[Q, K]`` similarities.
        positives: ``[Q, K]`` bool, at least one True a row.

    Returns:
        int64 ``[Q]``, 0 is best. Ties count against the query, so that constant embeddings score zero.
    """
    best = scores.masked_fill(~positives, -torch.inf).amax(dim=1, keepdim=True)
    return ((scores >= best) & ~positives).sum(dim=1)


def chance_recall(right: Iterable[int], candidates: int, k: int) -> float:
    """Expected recall at ``k`` of a random order: the mean of ``1 - C(n - p, k) / C(n, k)`` over queries."""
    values = []
    for p in right:
        k_here = min(k, candidates)
        values.append(1 - comb(candidates - p, k_here) / comb(candidates, k_here))
    return sum(values) / len(values)


def distinct_rows(records: Any, column: str, limit: int | None = None, captions_each: int | None = 1) -> list[int]:
    """Rows whose (first) captions share no text with an earlier chosen row; ``limit`` of them, drawn at random."""
    seen: set[str] = set()
    rows: list[int] = []
    for index, value in enumerate(column_values(records, column)):
        captions = captions_of(value)[:captions_each]
        if captions and not seen.intersection(captions):
            rows.append(index)
            seen.update(captions)
    return [rows[place] for place in draw_rows(len(rows), limit)]


class Retrieval(Evaluator):
    """Recall at K, image to text and text to image.

    Args:
        name: evaluator name.
        records: rows with an image and one caption or a list of captions.
        columns: roles ``image`` and ``caption`` to column names.
        ks: the K's of R@K.
        batch_size: images encoded at once.
        captions_each: use at most this many captions an image (None: all).
        distinct: leave out images whose captions repeat an earlier image's text.
        limit: at most this many images, drawn at random.

    The same text under two images is one and the same query to the model, so every image that carries it
    counts as right (and the reverse); on data without repeated captions this is the standard protocol.

    Metrics: ``r1``, ``r5``, ``r10`` (mean of both ways), ``image_to_text_r<k>``, ``text_to_image_r<k>``,
    ``image_to_text_median_rank``, ``text_to_image_median_rank`` (1 is best), ``images``, ``texts``; baseline
    ``chance``.

    Raises:
        ValueError: missing columns, fewer than two usable images.
    """

    primary_metric = "r1"
    models = ("dual",)

    @classmethod
    def from_flags(cls, name: str, records: Any, flags: Any, sources: Any) -> Retrieval:
        limit = min([each for each in (flags.max_images, flags.max_samples) if each is not None], default=None)
        options = {"captions_each": flags.captions_each, "distinct": flags.distinct, "limit": limit}
        columns = sources.columns(records, "image", "caption")
        return cls(name, records, columns, flags.ks, flags.batch_size, **options)

    def __init__(
        self,
        name: str,
        records: Any,
        columns: dict[str, str] | None = None,
        ks: Sequence[int] = (1, 5, 10),
        batch_size: int = 64,
        *,
        captions_each: int | None = None,
        distinct: bool = False,
        limit: int | None = None,
        matrix_size: int = 16,
    ) -> None:
        super().__init__(name)
        self.records, self.batch_size, self.matrix_size = records, batch_size, matrix_size
        self.columns = columns or {"image": "image", "caption": "captions"}
        check_columns(records, self.columns, ("image", "caption"), f"Retrieval {name!r}")
        self.ks = tuple(sorted(set(ks)))
        if not self.ks or self.ks[0] < 1:
            raise ValueError(f"ks={ks} must be positive whole numbers, such as (1, 5, 10)")
        self.primary_metric = f"r{self.ks[0]}"
        column = self.columns["caption"]
        captions = [captions_of(value)[:captions_each] for value in column_values(records, column)]
        empty = [row for row, texts in enumerate(captions) if not texts]
        self.refused |= dict.fromkeys(empty, BadRow("the caption is empty"))
        if empty:
            message = "%s: %d of %d rows have no caption with words in column %r and are left out, such as row %d"
            logger.warning(message, name, len(empty), len(records), column, empty[0])
        if distinct:
            self.rows = distinct_rows(records, column, limit, captions_each)
        else:
            rows = [row for row, texts in enumerate(captions) if texts]
            self.rows = [rows[place] for place in draw_rows(len(rows), limit)]
        self.captions = {row: captions[row] for row in self.rows}
        if len(self.rows) < 2:
            raise ValueError(f"Retrieval {name!r} needs two images or more; {len(self.rows)} left of {len(records)}")

    def evaluate(self, model: Any) -> Evaluation:
        dual = dual_model(model)
        images, kept = encode_images(
            dual, self.records, self.columns["image"], self.rows, self.batch_size, self.refused
        )
        pairs = [(place, text) for place, row in enumerate(kept) for text in self.captions[row]]
        distinct = list(dict.fromkeys(text for _, text in pairs))
        vector = dict(zip(distinct, F.normalize(encode_rows(distinct, dual.encode_texts, 256), dim=-1), strict=True))
        texts = torch.stack([vector[text] for _, text in pairs])
        with exact_arithmetic():
            result = retrieval_metrics(images, texts, pairs, self.ks)
        if self.refused:
            result.metrics["skipped"] = float(sum(refusal_counts(self.refused).values()))
        result.arrays.update(self._matrix(images, kept, vector))
        return result

    def _matrix(self, images: torch.Tensor, kept: Sequence[int], vector: dict[str, torch.Tensor]) -> dict[str, Any]:
        """A small similarity matrix with thumbnails and captions, for the report."""
        from mllm_vision.evaluation.images import data_uri

        size = min(self.matrix_size, len(kept))
        if size < 2:
            return {}
        places = torch.linspace(0, len(kept) - 1, size).long().tolist()
        captions = [self.captions[kept[place]][0] for place in places]
        scores = images[places] @ torch.stack([vector[text] for text in captions]).T
        return {
            "similarity": {
                "matrix": [[round(value, 4) for value in row] for row in scores.tolist()],
                "captions": captions,
                "images": [
                    data_uri(row_image(self.records, self.columns["image"], kept[place]), 64) for place in places
                ],
            }
        }


def retrieval_metrics(
    images: torch.Tensor,
    texts: torch.Tensor,
    pairs: Sequence[tuple[int, str]],
    ks: Sequence[int] = (1, 5, 10),
) -> Evaluation:
    """Recalls from embeddings.

    Args:
        images: ``[N, E]`` unit vectors.
        texts: ``[T, E]`` unit vectors, one a pair.
        pairs: for each text its image's place and the text itself.
        ks: the K's.
    """
    owner = torch.tensor([place for place, _ in pairs])
    number: dict[str, int] = {}
    text_id = torch.tensor([number.setdefault(text, len(number)) for _, text in pairs])
    has = torch.zeros(len(images), len(number), dtype=torch.bool)
    has[owner, text_id] = True  # image carries this text
    positives = has[:, text_id]  # [N, T]
    ranks: dict[str, list[torch.Tensor]] = {"image_to_text": [], "text_to_image": []}
    for start in range(0, len(images), 1024):  # blocks: 5k images x 25k captions need not fit at once
        block = slice(start, start + 1024)
        ranks["image_to_text"].append(first_hit_ranks(images[block] @ texts.T, positives[block]))
    for start in range(0, len(texts), 1024):
        block = slice(start, start + 1024)
        ranks["text_to_image"].append(first_hit_ranks(texts[block] @ images.T, positives.T[block]))
    right = {"image_to_text": positives.sum(1).tolist(), "text_to_image": positives.sum(0).tolist()}
    candidates = {"image_to_text": len(texts), "text_to_image": len(images)}
    metrics = dict.fromkeys((f"r{k}" for k in ks), 0.0)  # the means come first where the figures are listed
    chance: dict[str, float] = {}
    for way, parts in ranks.items():
        rank = torch.cat(parts)
        for k in ks:
            metrics[f"{way}_r{k}"] = (rank < k).float().mean().item()
            chance[f"{way}_r{k}"] = chance_recall(right[way], candidates[way], k)
        metrics[f"{way}_median_rank"] = rank.float().median().item() + 1
    for k in ks:
        for values in (metrics, chance):
            values[f"r{k}"] = (values[f"image_to_text_r{k}"] + values[f"text_to_image_r{k}"]) / 2
    metrics |= {"count": float(len(images)), "images": float(len(images)), "texts": float(len(texts))}
    return Evaluation(f"r{min(ks)}", metrics, {"chance": chance})
