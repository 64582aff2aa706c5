"""Heads have the layers of the papers; their BatchNorm on several batches at once is `nn.BatchNorm1d`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mllm_vision.modules.batch_norm import GlobalBatchNorm1d, GlobalBatchNorm2d, make_batch_norm_global
from mllm_vision.modules.heads import DINOHead, MLPHead, NormalizedLinear


def layers(head):
    """What the head is made of, in short: linear with or without bias, norm with what it learns."""
    told = []
    for module in head:
        if isinstance(module, nn.Linear):
            told.append(f"{module.in_features}-{module.out_features}" + "+b" * (module.bias is not None))
        elif isinstance(module, nn.BatchNorm1d):
            learns = [name for name, value in module.named_parameters() if value.requires_grad]
            told.append("bn(" + ",".join(learns) + ")")
        else:
            told.append(type(module).__name__.lower())
    return " ".join(told)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"layers": 1}, "4-3+b"),
        ({"layers": 2, "norm": None}, "4-8+b relu 8-3+b"),
        ({"layers": 2, "last_norm": "batch_no_bias"}, "4-8 bn(weight,bias) relu 8-3 bn(weight)"),
        ({"layers": 3, "last_norm": "batch_no_affine"}, "4-8 bn(weight,bias) relu 8-8 bn(weight,bias) relu 8-3 bn()"),
        ({"layers": 2, "bias": True, "last_bias": False}, "4-8+b bn(weight,bias) relu 8-3"),
        ({"layers": 2, "norm": None, "activation": "gelu"}, "4-8+b gelu 8-3+b"),
    ],
)
def test_layers_of_the_head(settings, wanted):
    head = MLPHead(4, 8, 3, **settings)
    assert layers(head) == wanted
    assert head(torch.randn(5, 4)).shape == (5, 3)
    assert (head.in_features, head.out_features) == (4, 3)


def test_views_are_one_batch():
    head = MLPHead(4, 8, 3, 2)
    rows = torch.randn(3, 2, 4)
    torch.testing.assert_close(head(rows).flatten(0, 1), head(rows.flatten(0, 1)))


def test_a_head_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"takes rows of width 4, got \[2, 5\]; build it with in_features=5"):
        MLPHead(4, 8, 3)(torch.randn(2, 5))
    with pytest.raises(ValueError, match="hidden=0 must be at least 1"):
        MLPHead(4, 0, 3)
    with pytest.raises(ValueError, match="norm='layer' must be one of"):
        MLPHead(4, 8, 3, norm="layer")
    with pytest.raises(ValueError, match="activation='tanh'"):
        MLPHead(4, 8, 3, activation="tanh")
    with pytest.raises(ValueError, match=r"width 4, got \[2, 5\]"):
        DINOHead(4, 8)(torch.randn(2, 5))


def test_dino_head():
    """Logits are cosines with the prototypes, whatever the scale of the features and the weights."""
    head = DINOHead(6, 10, hidden=12, bottleneck=5)
    assert layers(head.mlp) == "6-12+b gelu 12-12+b gelu 12-5+b"
    rows = torch.randn(4, 6)
    logits = head(rows)
    assert logits.abs().max() <= 1 + 1e-6
    with torch.no_grad():
        head.last_layer.weight *= 7
    torch.testing.assert_close(head(rows), logits)
    assert not head.last_layer.norm.requires_grad
    assert DINOHead(6, 10, hidden=12, bottleneck=5, learn_norm=True).last_layer.norm.requires_grad
    assert "bn" in layers(DINOHead(6, 10, hidden=12, bottleneck=5, norm="batch").mlp)


def test_prototypes_start_as_a_linear_layer_does():
    """As in the official codes: the length of a prototype's weight sets how far one step of the optimizer turns it."""
    rows = DINOHead(6, 400, hidden=12, bottleneck=25).last_layer.weight.detach()
    assert 0.19 < rows.abs().max() <= 0.2  # uniform up to 1 / sqrt(25)
    assert rows.norm(dim=1).mean().item() == pytest.approx(1 / 3**0.5, rel=0.02)
    assert DINOHead(6, 400, hidden=12, bottleneck=25).mlp[0].weight.abs().max() < 0.1  # the rest by 0.02


def test_normalized_linear_is_weight_norm():
    """Against torch's own parametrisation, value and gradient."""
    ours, theirs = NormalizedLinear(4, 3, learn_norm=True), nn.Linear(4, 3, bias=False)
    theirs = nn.utils.parametrizations.weight_norm(theirs)
    with torch.no_grad():
        ours.norm.copy_(torch.tensor([0.5, 1.0, 2.0]))
        theirs.parametrizations.weight.original0.copy_(ours.norm[:, None])
        theirs.parametrizations.weight.original1.copy_(ours.weight)
    rows, upstream = torch.randn(5, 4), torch.randn(5, 3)
    for module in (ours, theirs):
        module(rows).backward(upstream)
    torch.testing.assert_close(ours(rows), theirs(rows))
    torch.testing.assert_close(ours.weight.grad, theirs.parametrizations.weight.original1.grad)
    torch.testing.assert_close(ours.norm.grad, theirs.parametrizations.weight.original0.grad[:, 0])


def test_one_process_is_torch():
    ours, theirs = GlobalBatchNorm1d(4), nn.BatchNorm1d(4)
    rows = torch.randn(6, 4)
    assert torch.equal(ours(rows), theirs(rows))
    assert torch.equal(ours.eval()(rows), theirs.eval()(rows))
    theirs.load_state_dict(ours.state_dict())
    with pytest.raises(ValueError, match=r"more than one value a channel.*\[1, 4\].*batch of two"):
        GlobalBatchNorm1d(4)(rows[:1])


def test_conversion_keeps_names_and_values():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(4 * 36), nn.ReLU())
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert make_batch_norm_global(module) == 2 and make_batch_norm_global(module) == 0
    assert isinstance(module[1], GlobalBatchNorm2d) and isinstance(module[3], GlobalBatchNorm1d)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    module(torch.randn(2, 3, 8, 8))
