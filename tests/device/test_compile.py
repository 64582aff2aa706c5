"""torch.compile traces `embed` and `loss` of every method whole: with `fullgraph` a break is an error.

DINOv2's `embed` is the one exception: it puts mask tokens in by a hook on the library's patch embedding, which dynamo
does not trace; the towers can be compiled by themselves there. The backend is eager: tracing is what is tested, and
compiling for a CPU takes minutes.
"""

from __future__ import annotations

import methods_for_tests as methods
import pairs_for_tests as pairs
import pytest
import torch

PAIRS = ("clip", "siglip", "itc")
QUICK = {("simclr", "loss"), ("vicreg", "loss"), ("clip", "loss"), ("moco_v2", "embed")}
WHOLE = [
    pytest.param(name, part, marks=[] if (name, part) in QUICK else pytest.mark.slow)
    for name in (*methods.IMAGE_METHODS, *PAIRS)
    for part in ("embed", "loss")
    if (name, part) != ("dinov2", "embed")
]


@pytest.mark.parametrize(("name", "part"), WHOLE)
def test_there_is_no_graph_break_and_the_numbers_stay(name, part):
    if name in PAIRS:
        made, (batch,) = pairs.make_objective(name).train(), pairs.pair_batches(1, 8)
    else:
        made = methods.objective(name)
        methods.tell_features(made)
        (batch,) = methods.batches(made, 1)
    torch.manual_seed(0)
    embeddings = made.embed(**batch)
    torch._dynamo.reset()
    if part == "embed":
        torch.manual_seed(0)
        found = torch.compile(lambda columns: made.embed(**columns), backend="eager", fullgraph=True)(batch)
        assert found.keys() == embeddings.keys()
        for key, value in embeddings.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
        return
    taken = {key: value.detach().requires_grad_(value.is_floating_point()) for key, value in embeddings.items()}
    plain = made.loss(taken).loss
    found = torch.compile(lambda given: made.loss(given).loss, backend="eager", fullgraph=True)(taken)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    inputs = [value for value in taken.values() if value.requires_grad]
    gradients = [torch.autograd.grad(loss, inputs, allow_unused=True) for loss in (found, plain)]
    for one, two in zip(*gradients, strict=True):
        if two is not None:
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
