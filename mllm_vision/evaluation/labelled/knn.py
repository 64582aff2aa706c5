"""k nearest neighbours: what a representation is worth without training anything on it.

Source: Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4
    (https://arxiv.org/abs/1805.01978); k = 20 and temperature 0.07 as in DINO, k = 200 and 0.1 as in MoCo's notebook.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_vision.distributed import all_gather, all_reduce, row_counts, world_size
from mllm_vision.evaluation.base import Evaluation
from mllm_vision.evaluation.labelled.images import (
    Labelled,
    LabelledEvaluator,
    LabelledImages,
    guessing,
    predictions_summary,
)


def nearest(queries: Tensor, bank: Tensor, k: int, *, chunk: int = 65536) -> tuple[Tensor, Tensor]:
    """The k rows of the bank with the largest inner product, largest first, one chunk of the bank at a time.

    Args:
        queries: `[Q, D]`.
        bank: `[N, D]`.
        k: neighbours; fewer where the bank has fewer rows.
        chunk: rows of the bank that meet the queries at once.

    Returns:
        (products `[Q, min(k, N)]`, their rows `[Q, min(k, N)]` int64).
    """
    values = queries.new_empty(len(queries), 0)
    places = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), chunk):
        products = queries @ bank[start : start + chunk].T
        found, rows = products.topk(min(k, products.shape[1]), dim=1)
        values, places = torch.cat([values, found], dim=1), torch.cat([places, rows + start], dim=1)
        if values.shape[1] > k:
            values, best = values.topk(k, dim=1)
            places = places.gather(1, best)
    return values, places


def votes(similarities: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Sum of exp(similarity / temperature) of the neighbours, by class: `[Q, classes]`, up to a factor a row.

    Args:
        similarities: `[Q, k]` cosines of the neighbours.
        labels: `[Q, k]` their classes.
    """
    top = similarities.max(dim=1, keepdim=True).values  # a common factor changes no vote, and keeps exp finite
    weights = torch.exp((similarities - top) / temperature)
    return torch.zeros(len(labels), classes, device=labels.device).scatter_add_(1, labels, weights)


def knn_predict(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
    query_chunk: int = 512,
) -> Tensor:
    """Class of each query by the weighted vote of its k nearest rows of the bank, cosine similarity.

    Args:
        queries: `[Q, D]`, any length; normalised here.
        bank: `[N, D]`.
        bank_labels: `[N]` int64 in `[0, classes)`.
        classes: number of classes.
        k: neighbours that vote.
        temperature: a neighbour's vote weighs exp(cosine / temperature).
        query_chunk: queries at once.

    Returns:
        `[Q]` int64.

    Raises:
        ValueError: k outside 1..N, a temperature that is not positive, an empty bank.
    """
    _check(k, temperature, len(bank))
    queries, bank = F.normalize(queries.float(), dim=1), F.normalize(bank.float(), dim=1)
    guesses = [torch.empty(0, dtype=torch.int64, device=queries.device)]
    for part in queries.split(query_chunk):
        similarities, rows = nearest(part, bank, k)
        guesses.append(votes(similarities, bank_labels[rows], classes, temperature).argmax(dim=1))
    return torch.cat(guesses)


class KnnAccuracy(LabelledEvaluator):
    """Accuracy of a weighted k-nearest-neighbour vote among the training images.

    Every rank keeps the part of the bank that it encoded: queries travel, the bank does not.

    Args:
        name: evaluator name.
        data: the labelled images; share one with `LinearProbe` and each model encodes them once.
        k: neighbours, or several numbers of them: the first is ``accuracy``, each further one ``accuracy_k<k>``.
        temperature: a neighbour's vote weighs exp(cosine / temperature).
        raw_pixels: also the accuracy of the pixels themselves, as baseline ``raw_pixels`` (computed once).
        query_chunk: queries at once.

    Metrics: ``accuracy``, ``mean_class_accuracy``, ``accuracy_k<k>``, ``count``; ``skipped`` where test images were
    left out. Baselines ``chance`` and ``most_frequent_class``; ``tables["class"]``.

    Raises:
        ValueError: k beyond the training images, a temperature that is not positive.
    """

    @classmethod
    def of_images(cls, name: str, data: LabelledImages, flags: Any) -> KnnAccuracy:
        return cls(name, data, k=flags.knn_k, temperature=flags.knn_temperature, raw_pixels=flags.raw_pixels)

    def __init__(
        self,
        name: str,
        data: LabelledImages,
        *,
        k: int | Sequence[int] = 20,
        temperature: float = 0.07,
        raw_pixels: bool = False,
        query_chunk: int = 512,
    ) -> None:
        super().__init__(name, data, raw_pixels=raw_pixels)
        self.ks = [k] if isinstance(k, int) else list(k)
        if not self.ks:
            raise ValueError("k=[] names no number of neighbours; use e.g. 20 (DINO) or 200 (MoCo)")
        for each in self.ks:
            _check(each, temperature, data.count()[0])
        self.temperature, self.query_chunk = temperature, query_chunk

    def measure(self, train: Labelled, test: Labelled) -> Evaluation:
        names = self.data.class_names
        guesses: list[list[Tensor]] = [[] for _ in self.ks]
        for similarities, labels in self._neighbours(train, test):
            for place, k in enumerate(self.ks):
                vote = votes(similarities[:, :k], labels[:, :k], len(names), self.temperature)
                guesses[place].append(vote.argmax(dim=1))
        found = [predictions_summary(torch.cat(guess), test.labels, names) for guess in guesses]
        accuracy, by_class, table = found[0]
        count = sum(int(row["count"]) for row in table)
        metrics = {"accuracy": accuracy, "mean_class_accuracy": by_class, "count": float(count)}
        metrics |= {f"accuracy_k{k}": figure for k, (figure, _, _) in zip(self.ks[1:], found[1:], strict=True)}
        if skipped := self.data.skipped(count):
            metrics["skipped"] = skipped
        result = Evaluation(self.primary_metric, metrics, guessing(table, len(names)))
        result.tables["class"] = table
        return result

    def _neighbours(self, train: Labelled, test: Labelled) -> Iterator[tuple[Tensor, Tensor]]:
        """(cosines, labels) `[q, k]` of the neighbours of this rank's queries, chunk by chunk, in their order."""
        k = max(self.ks)
        bank = F.normalize(train.features, dim=1)
        queries = F.normalize(test.features, dim=1)
        if world_size() == 1:
            for part in queries.split(self.query_chunk):
                similarities, rows = nearest(part, bank, k)
                yield similarities, train.labels[rows]
            return
        rounds = all_reduce(torch.tensor([-(-len(queries) // self.query_chunk)], device=bank.device), op="max")
        for index in range(int(rounds)):
            own = queries[index * self.query_chunk : (index + 1) * self.query_chunk]
            sizes = row_counts(own)
            similarities, labels = self._from_all_ranks(all_gather(own, sizes=sizes), bank, train.labels, k)
            start = sum(sizes[: torch.distributed.get_rank()])
            if len(own):
                yield similarities[start : start + len(own)], labels[start : start + len(own)]

    @staticmethod
    def _from_all_ranks(queries: Tensor, bank: Tensor, bank_labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest over the parts of the bank of all ranks: `[Q, k]` each."""
        similarities, rows = nearest(queries, bank, k)
        labels = bank_labels[rows]
        short = k - similarities.shape[1]  # a rank with fewer rows than k fills up with what is never chosen
        similarities = F.pad(similarities, (0, short), value=-torch.inf)
        labels = F.pad(labels, (0, short))
        ranks = world_size()
        similarities = torch.cat(list(all_gather(similarities).chunk(ranks)), dim=1)
        labels = torch.cat(list(all_gather(labels).chunk(ranks)), dim=1)
        best, places = similarities.topk(k, dim=1)
        return best, labels.gather(1, places)


def _check(k: int, temperature: float, rows: int) -> None:
    if not 1 <= k <= rows:
        raise ValueError(f"k={k} neighbours among {rows} training images; use 1 to {rows}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive; DINO uses 0.07, MoCo 0.1")
