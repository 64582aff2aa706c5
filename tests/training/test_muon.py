"""Muon: the direction against a singular value decomposition, a step worked out by hand, and who gets it."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

from mllm_vision.training.optim.muon import MuonAdamW, orthogonalize
from mllm_vision.training.optim.optimizers import parameter_groups


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6), (3, 5, 9)])
def test_orthogonalize_keeps_directions_and_evens_out_lengths(shape) -> None:
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    found = orthogonalize(matrices)
    assert found.shape == matrices.shape
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ found @ vh.mT  # diagonal if singular vectors are kept
    diagonal = torch.diagonal(inner, dim1=-2, dim2=-1)
    torch.testing.assert_close(inner, torch.diag_embed(diagonal), atol=2e-4, rtol=0)
    assert (diagonal[s > 0.05 * s.amax()] > 0.5).all() and (diagonal < 1.3).all()


def test_two_steps_by_hand() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.nn.Parameter(torch.randn(4, 6, generator=generator))
    expected, momentum = weight.detach().clone(), torch.zeros(4, 6)
    optimizer = MuonAdamW([{"params": [weight], "muon": True, "lr": 0.1, "weight_decay": 0.5}])
    for _ in range(2):
        weight.grad = torch.randn(4, 6, generator=generator)
        momentum = 0.95 * momentum + 0.05 * weight.grad
        direction = 0.05 * weight.grad + 0.95 * momentum
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 6**0.5 * orthogonalize(direction)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected)


def test_the_rest_is_plain_adamw_and_state_survives_saving() -> None:
    torch.manual_seed(0)
    model, twin = tiny.tiny_clip_vision(), tiny.tiny_clip_vision()
    twin.load_state_dict(model.state_dict())
    pixels = torch.randn(2, 3, 32, 32)

    def make(module):
        groups = parameter_groups(module, weight_decay=0.1, learning_rate=1e-2, muon_learning_rate=1e-2)
        return groups, MuonAdamW(groups, lr=1e-2)

    groups, optimizer = make(model)
    chosen = {id(p) for group in groups if group["muon"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in chosen}
    assert names == {n for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2}
    rest = [p for name, p in twin.named_parameters() if name not in names]
    for module in (model, twin):
        module(pixels).pooler_output.square().sum().backward()
    optimizer.step()
    decay = [p for p in rest if p.ndim > 1 and p is not twin.embeddings.position_embedding.weight]
    decayed = {id(p) for p in decay}
    free = [p for p in rest if id(p) not in decayed]
    torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}], lr=1e-2).step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if name not in names:
            torch.testing.assert_close(p, q, msg=name)

    twin.load_state_dict(model.state_dict())
    _, other = make(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the tensors it is given
    for module, chosen_optimizer in ((model, optimizer), (twin, other)):
        module.zero_grad()
        module(pixels).pooler_output.square().sum().backward()
        chosen_optimizer.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[3\]"):
        MuonAdamW([{"params": [torch.nn.Parameter(torch.zeros(3))], "muon": True}])
