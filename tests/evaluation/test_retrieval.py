"""Recall at K against figures worked out by hand and against an independent loop."""

from __future__ import annotations

import itertools

import pytest
import torch
from datasets import Dataset
from tiny import image_bytes, random_image

from mllm_vision.evaluation import Retrieval
from mllm_vision.evaluation.retrieval import chance_recall, distinct_rows, first_hit_ranks, retrieval_metrics


def unit(rows: list[list[float]]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


def test_by_hand_with_two_captions_an_image() -> None:
    """Similarities [image, text], texts 0-1 belong to image 0, 2-3 to image 1, 4-5 to image 2:

    image 0: .9 .1 .5 .2 .3 .0 -> its text 0 first: rank 0
    image 1: .8 .7 .6 .1 .2 .3 -> best own .6, before it .8 and .7: rank 2
    image 2: .4 .5 .6 .7 .3 .2 -> best own .3, four before it: rank 4
    text 0: image 0 (.9 of .9 .8 .4) rank 0; text 1: .1 of .1 .7 .5 rank 2; text 2: .6 of .5 .6 .6, a tie: rank 1;
    text 3: .1 of .2 .1 .7 rank 2; text 4: .3 of .3 .2 .3, a tie: rank 1; text 5: .2 of .0 .3 .2 rank 1
    """
    scores = torch.tensor(
        [[0.9, 0.1, 0.5, 0.2, 0.3, 0.0], [0.8, 0.7, 0.6, 0.1, 0.2, 0.3], [0.4, 0.5, 0.6, 0.7, 0.3, 0.2]]
    )
    pairs = [(0, "a"), (0, "b"), (1, "c"), (1, "d"), (2, "e"), (2, "f")]
    # Embeddings whose inner products are exactly these scores: texts are the columns, images the unit basis.
    result = retrieval_metrics(torch.eye(3), scores.T.contiguous(), pairs, ks=(1, 2, 5))
    metrics = result.metrics
    assert metrics["image_to_text_r1"] == pytest.approx(1 / 3)
    assert metrics["image_to_text_r2"] == pytest.approx(1 / 3)
    assert metrics["image_to_text_r5"] == pytest.approx(1.0)
    assert metrics["text_to_image_r1"] == pytest.approx(1 / 6)
    assert metrics["text_to_image_r2"] == pytest.approx(4 / 6)
    assert metrics["image_to_text_median_rank"] == 3
    assert metrics["r1"] == pytest.approx((1 / 3 + 1 / 6) / 2)
    chance = result.baselines["chance"]
    assert chance["text_to_image_r1"] == pytest.approx(1 / 3)
    assert chance["image_to_text_r1"] == pytest.approx(2 / 6)
    assert chance["image_to_text_r2"] == pytest.approx(1 - (4 / 6) * (3 / 5))


def test_against_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    owners = [0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 4, 5]
    images = torch.nn.functional.normalize(torch.randn(6, 5, generator=generator), dim=-1)
    texts = torch.nn.functional.normalize(torch.randn(12, 5, generator=generator), dim=-1)
    metrics = retrieval_metrics(images, texts, [(o, str(i)) for i, o in enumerate(owners)], ks=(1, 3)).metrics
    for k in (1, 3):
        hits = [
            any(owners[t] == i for t in (texts @ images[i]).argsort(descending=True)[:k].tolist()) for i in range(6)
        ]
        assert metrics[f"image_to_text_r{k}"] == pytest.approx(sum(hits) / 6)
        hits = [owners[t] in (images @ texts[t]).argsort(descending=True)[:k].tolist() for t in range(12)]
        assert metrics[f"text_to_image_r{k}"] == pytest.approx(sum(hits) / 12)


def test_the_same_text_under_two_images_is_right_for_both() -> None:
    images = unit([[1, 0], [0.9, 0.1], [0, 1]])
    texts = unit([[1, 0], [1, 0], [0, 1]])
    metrics = retrieval_metrics(images, texts, [(0, "a cat"), (1, "a cat"), (2, "a dog")], ks=(1,)).metrics
    assert metrics["text_to_image_r1"] == 1.0  # the second "a cat" finds image 0 first, which carries it too
    assert metrics["image_to_text_r1"] == 1.0


def test_collapsed_embeddings_score_nothing() -> None:
    same = unit([[1, 0]] * 10)
    metrics = retrieval_metrics(same, same, [(i, str(i)) for i in range(10)], ks=(1, 5)).metrics
    assert metrics["r1"] == metrics["r5"] == 0.0


def test_chance_by_enumeration() -> None:
    """All orders of 5 candidates of which 2 are right: the share with a right one among the first k."""
    orders = list(itertools.permutations(range(5)))
    for k in (1, 2, 4):
        share = sum(any(c < 2 for c in order[:k]) for order in orders) / len(orders)
        assert chance_recall([2], 5, k) == pytest.approx(share)
    assert chance_recall([1, 3], 3, 10) == 1.0


def test_ranks_count_ties_against_the_query() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.1]])
    assert first_hit_ranks(scores, torch.tensor([[True, False, False]])).tolist() == [1]


class FakeDual:
    """Images and texts both become their number; encode_images reads it from the image's red channel."""

    def __init__(self) -> None:
        self.images = 0

    def encode_images(self, images):
        self.images += len(images)
        return torch.nn.functional.one_hot(torch.tensor([im.getpixel((0, 0))[0] for im in images]), 16).float()

    def encode_texts(self, texts):
        return torch.nn.functional.one_hot(torch.tensor([int(text.split()[0]) for text in texts]), 16).float()


def numbered(number: int):
    image = random_image(0, 8)
    image.putpixel((0, 0), (number, 0, 0))
    return image


def test_evaluator_reads_rows_skips_bad_images_and_keeps_a_matrix() -> None:
    images = [{"bytes": image_bytes(numbered(i)), "path": None} for i in range(6)]
    images[4] = {"bytes": b"no image", "path": None}
    records = Dataset.from_dict({"image": images, "captions": [[f"{i} first", f"{i} second"] for i in range(6)]})
    evaluator = Retrieval("retrieval", records, {"image": "image", "caption": "captions"}, batch_size=4)
    result = evaluator.examine(FakeDual())
    metrics = result.metrics
    assert metrics["r1"] == 1.0 and metrics["images"] == 5 and metrics["texts"] == 10 and metrics["skipped"] == 1
    matrix = result.arrays["similarity"]
    assert len(matrix["matrix"]) == len(matrix["images"]) == 5 and matrix["captions"][4] == "5 first"
    assert result.record()["baselines"]["chance"] == pytest.approx(0.2, abs=0.03)

    records = Dataset.from_dict({"image": ["x"] * 4, "captions": [["a"], ["b"], ["a"], ["c"]]})
    assert distinct_rows(records, "captions") == [0, 1, 3]
    assert distinct_rows(records, "captions", limit=2) == [0, 3]  # drawn at random, not the first ones


def test_bad_input() -> None:
    records = Dataset.from_dict({"image": ["x", "y"], "captions": [["a"], []]})
    with pytest.raises(ValueError, match="two images or more; 1 left of 2"):  # the other has no caption
        Retrieval("r", records, {"image": "image", "caption": "captions"})
    with pytest.raises(ValueError, match="'text' .* is not in the data; found"):
        Retrieval("r", records, {"image": "image", "caption": "text"})
    with pytest.raises(ValueError, match="no rows"):
        Retrieval("r", records.select([]), {"image": "image", "caption": "captions"})
    with pytest.raises(ValueError, match="positive whole numbers"):
        Retrieval("r", records, {"image": "image", "caption": "captions"}, ks=(0,))
    with pytest.raises(ValueError, match="two images or more"):
        Retrieval("r", records, {"image": "image", "caption": "captions"}, limit=1)
    with pytest.raises(ValueError, match="encode_images"):
        Retrieval("r", records.select([0, 0]), {"image": "image", "caption": "captions"})(torch.nn.Linear(1, 1))
