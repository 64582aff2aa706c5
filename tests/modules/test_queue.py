"""The feature queue against a plain list: any batch size, any queue size, ids, saved and loaded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_vision.modules.queue import FeatureQueue


def as_list(queue: FeatureQueue) -> list[tuple[float, list[int]]]:
    """Oldest first, which the ring itself does not keep in order."""
    rows, ids = queue.rows[:, 0].tolist(), queue.ids.tolist()
    return sorted(zip(rows, ids, strict=True))  # the test's rows count upwards


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 12), batches=st.lists(st.integers(1, 30), max_size=6))
def test_it_keeps_the_last_rows_whatever_divides_what(size, batches):
    queue, plain, count = FeatureQueue(size, 1, id_columns=2), [], 0
    for batch in batches:
        values = torch.arange(count, count + batch, dtype=torch.float32)
        ids = torch.stack([values.long() + 7, values.long() % 3], dim=1)
        queue.enqueue(values[:, None], ids)
        plain = (plain + list(zip(values.tolist(), ids.tolist(), strict=True)))[-size:]
        count += batch
        assert as_list(queue) == plain and len(queue) == len(plain)
    assert queue.size == size


def test_rows_without_ids_are_unknown_also_where_known_ones_were():
    queue = FeatureQueue(2, 1, id_columns=1)
    queue.enqueue(torch.ones(2, 1), torch.tensor([[4], [5]]))
    queue.enqueue(torch.ones(1, 1))
    assert sorted(queue.ids.flatten().tolist()) == [-1, 5]
    assert FeatureQueue(2, 1).ids is None


def test_saved_and_loaded_it_goes_on_as_if_nothing_had_happened():
    one, batches = FeatureQueue(5, 2, id_columns=1), [torch.randn(3, 2) for _ in range(4)]
    ids = [torch.full((3, 1), step) for step in range(4)]
    for step in range(2):
        one.enqueue(batches[step], ids[step])
    other = FeatureQueue(5, 2, id_columns=1)
    other.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
    for step in (2, 3):
        one.enqueue(batches[step], ids[step])
        other.enqueue(batches[step], ids[step])
    assert torch.equal(one.rows, other.rows) and torch.equal(one.ids, other.ids)
    assert int(other.written) == 12


def test_it_stores_fp32_without_gradient():
    queue = FeatureQueue(4, 2)
    queue.enqueue(torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True))
    assert queue.rows.dtype == torch.float32 and not queue.rows.requires_grad


def test_what_it_refuses():
    with pytest.raises(ValueError, match="size=0 and width=3 must be at least 1"):
        FeatureQueue(0, 3)
    queue = FeatureQueue(2, 3, id_columns=2)
    with pytest.raises(ValueError, match=r"rows must be \[N, 3\], got \[2, 2\]"):
        queue.enqueue(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"ids must be \[2, 2\], got \[2, 1\]"):
        queue.enqueue(torch.ones(2, 3), torch.ones(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ids must be \[2, 0\]"):
        FeatureQueue(2, 3).enqueue(torch.ones(2, 3), torch.ones(2, 1, dtype=torch.int64))
