"""What is moved, kept and hashed: once, and no more than was asked for."""

from __future__ import annotations

import collections
import sys
from pathlib import Path

import methods_for_tests as methods
import pytest
import torch

from mllm_vision.training.trainer.gradient_cache import cached_backward

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cases


def test_a_chunk_is_moved_once_and_prepared_for_each_pass():
    made = methods.objective("simclr")
    (batch,) = methods.batches(made, 1)
    counts: collections.Counter[str] = collections.Counter()

    def note(what):
        def do(chunk):
            counts[what] += 1
            return dict(chunk)

        return do

    cached_backward(made, batch, 3, move=note("moved"), prepare=note("prepared"))
    assert counts == {"moved": 3, "prepared": 5}  # chunks of 3, 3 and 2; the last has one pass


@pytest.mark.parametrize(("room", "decoded"), [(4.0, 0), (0.0, 6), (3 * 2 * 32 * 32 * 3 / 2**30, 3)])
def test_decoded_images_are_kept_up_to_the_flag(room, decoded, monkeypatch):
    """Of batches of two, three fit where there is room for three: the second pass decodes the others anew."""
    from mllm_vision.evaluation import LabelledImages
    from mllm_vision.evaluation.labelled import images as labelled

    rows = methods.records(12)
    data = LabelledImages(rows, rows[:2], batch_size=2, cache_gb=room)
    read: list[int] = []
    plain = labelled.usable_images

    def usable_images(records, *more):
        read.append(len(records))
        return plain(records, *more)

    monkeypatch.setattr(labelled, "usable_images", usable_images)
    encoder = methods.encoder()
    first, _ = data.features(encoder)
    assert read.count(12) == 6
    read.clear()
    data.forget()
    second, _ = data.features(encoder)
    assert read.count(12) == decoded and torch.equal(first.features, second.features)


def test_the_freeze_audit_hashes_what_is_frozen_once_each_time_and_samples_what_trains(monkeypatch):
    from mllm_vision.hub import lineage
    from mllm_vision.modules import audit as auditing
    from mllm_vision.vlm import FreezeProof, audit, freeze

    model, _ = cases._language_model()
    freeze(model, ("language_model",))
    monkeypatch.setattr(auditing, "SAMPLE", 50)
    hashed: list[int] = []
    plain = lineage._tensor_bytes

    def tensor_bytes(tensor):
        hashed.append(tensor.numel())
        return plain(tensor)

    monkeypatch.setattr(lineage, "_tensor_bytes", tensor_bytes)
    proof = FreezeProof(model, audit(model, 1e-3))
    tensors = {id(value): value for value in model.state_dict(keep_vars=True).values()}.values()
    frozen = sum(value.numel() for value in tensors if not value.requires_grad)
    trains = [value for value in tensors if value.requires_grad]
    assert frozen <= sum(hashed) <= frozen + 51 * len(trains) < sum(value.numel() for value in tensors)

    with torch.no_grad():
        for value in trains:
            value.mul_(1.5).add_(1e-3)
    assert [row["group"] for row in proof.close(model) if row["moved"]] == ["language_model"] and not proof.problems
    with torch.no_grad():  # one byte of what is frozen
        next(iter(model.model.model.vision_tower.parameters())).view(-1)[-1] += 1e-3
    proof.close(model)
    assert "encoder: frozen weights moved" in proof.problems[0]

    monkeypatch.setattr(auditing, "rank", lambda: 1)
    hashed.clear()
    assert FreezeProof(model, audit(model, 1e-3)).close(model) and not hashed  # the first process does it for all


def test_rows_of_features_come_in_the_order_of_their_indices():
    from mllm_vision.evaluation.base import gather_rows

    rows, indices = gather_rows([torch.tensor([[3.0], [1.0]]), torch.tensor([[2.0]])], [3, 1, 2])
    assert rows.tolist() == [[1.0], [2.0], [3.0]] and indices == [1, 2, 3]
    assert gather_rows([], [])[1] == []
