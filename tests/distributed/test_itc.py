"""ITC on several ranks is ITC on one: the loss and its gradients, the queue, training, training in chunks."""

from __future__ import annotations

import itc_work
import numpy as np
import pytest
import torch
from oracles import momentum as oracle


@pytest.mark.parametrize("sizes", [[4, 4], [1, 5, 2]])
def test_the_loss_over_ranks_is_the_oracles_of_the_whole_batch(gloo, sizes):
    rng = np.random.default_rng(4)
    rows = {name: rng.normal(size=(8, 5)) for name in ("image", "text", "image_momentum", "text_momentum")}
    queues = {name: oracle.unit(rng.normal(size=(7, 5))) for name in ("image_queue", "text_queue")}
    ids, queue_ids, scale = rng.integers(-1, 6, size=(8, 2)), rng.integers(-1, 6, size=(7, 2)), 14.3
    expected = oracle.itc(
        rows["image"], rows["text"], rows["image_momentum"], rows["text_momentum"], scale, 0.4,
        list(queues["image_queue"]), list(queues["text_queue"]), oracle.positives(ids.tolist(), queue_ids.tolist()),
    )  # fmt: skip
    given = [{name: torch.tensor(value) for name, value in part.items()} for part in (rows, queues)]
    results = gloo.run(
        len(sizes), itc_work.loss_and_gradients, *given, torch.tensor(ids), torch.tensor(queue_ids), sizes, scale, 2
    )
    for loss, image, text, by_scale in results:
        assert loss == pytest.approx(expected["loss"], rel=1e-10)
        np.testing.assert_allclose(image, expected["image"], rtol=1e-8, atol=1e-11)
        np.testing.assert_allclose(text, expected["text"], rtol=1e-8, atol=1e-11)
        assert by_scale == pytest.approx(expected["scale"], rel=1e-9)


@pytest.mark.parametrize(("sizes", "size"), [([3, 3], 10), ([1, 4, 2], 5)])
def test_every_rank_holds_the_queue_of_one(gloo, sizes, size):
    total = 3 * sum(sizes)
    for rows, ids, written in gloo.run(len(sizes), itc_work.queue_rows, sizes, size):
        assert sorted(rows.flatten().tolist()) == list(range(total - size, total)) and written == total
        assert torch.equal(ids.flatten(), rows.flatten().long() + 5)


@pytest.mark.parametrize(("world", "chunk"), [(1, 3), (2, None), (2, 3)], ids=["chunks", "ranks", "ranks and chunks"])
def test_training_is_that_of_one_rank_with_the_whole_batch(gloo, world, chunk):
    """Weights, momentum weights, queue, ids and the ramp after four steps."""
    expected, state = itc_work.trained(1)
    results = [itc_work.trained(1, chunk)] if world == 1 else gloo.run(world, itc_work.trained, world, chunk)
    for losses, found in results:
        assert losses == pytest.approx(expected, rel=1e-5)
        assert found.keys() == state.keys()
        for name, value in state.items():
            if value.is_floating_point():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
            else:
                assert torch.equal(found[name], value), name


def test_ddp_does_not_send_the_queue_with_every_forward_pass(gloo):
    for sent, queued in gloo.run(2, itc_work.bytes_sent_in_forward):
        assert sent < 200 < queued
