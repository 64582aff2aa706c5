"""Cross-entropy without all logits: the plain formula, torch's own, and what autograd must not lose."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mllm_vision.functional.engine.linear_cross_entropy import CHUNK, linear_cross_entropy


def problem(rows=23, words=17, width=5, seed=0, dtype=torch.float64, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(words, width, generator=generator, dtype=dtype).requires_grad_()
    bias = torch.randn(words, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(words, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = -100
    return hidden, weight, bias, targets, torch.rand(rows, generator=generator, dtype=dtype)


def formula(hidden, weight, bias, targets, token_weights, smoothing=0.0, softcap=None):
    """Word by word, from the definition."""
    logits = torch.einsum("sd,vd->sv", hidden, weight) + (0 if bias is None else bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    total = 0.0
    for row, target in enumerate(targets.tolist()):
        if target != -100:
            logs = logits[row] - logits[row].exp().sum().log()
            loss = -(1 - smoothing) * logs[target] - smoothing * logs.mean()
            total = total + loss * (1 if token_weights is None else token_weights[row])
    return total


def gradients(value, *inputs):
    return torch.autograd.grad(value, inputs)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(2, 19), words=st.integers(2, 23), chunk=st.integers(1, 20), seed=st.integers(0, 99),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]), softcap=st.sampled_from([None, 0.7, 30.0]),
    weighted=st.booleans(), biased=st.booleans(),
)  # fmt: skip
def test_any_chunk_is_the_formula(rows, words, chunk, seed, smoothing, softcap, weighted, biased):
    hidden, weight, bias, targets, weights = problem(rows, words, seed=seed)
    bias, weights = bias if biased else None, weights if weighted else None
    inputs = [hidden, weight, *([bias] if biased else [])]
    expected = formula(hidden, weight, bias, targets, weights, smoothing, softcap) + 0.0 * sum(p.sum() for p in inputs)
    options = {"token_weights": weights, "label_smoothing": smoothing, "softcap": softcap, "bias": bias}
    found = linear_cross_entropy(hidden, weight, targets, chunk=chunk, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(gradients(3 * found, *inputs), gradients(3 * expected, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_one_chunk_is_the_native_loss_bit_for_bit():
    hidden, weight, _, targets, _ = problem(CHUNK, 50, 16, dtype=torch.float32)
    native = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    ours = linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(ours, native)
    for found, expected in zip(gradients(ours, hidden, weight), gradients(native, hidden, weight), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has it from 2.13 on")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_torch_has_the_same(smoothing):
    hidden, weight, bias, targets, _ = problem()
    options = {"reduction": "sum", "linear_bias": bias, "label_smoothing": smoothing}
    expected = F.linear_cross_entropy(hidden, weight, targets, **options)
    found = linear_cross_entropy(hidden, weight, targets, bias=bias, chunk=4, label_smoothing=smoothing)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    inputs = hidden, weight, bias
    for ours, theirs in zip(gradients(found, *inputs), gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    hidden, weight, bias, targets, weights = problem(7, 6, 3)

    def loss(hidden, weight, bias):
        options = {"token_weights": weights, "label_smoothing": 0.1, "softcap": softcap}
        return linear_cross_entropy(hidden, weight, targets, bias=bias, chunk=3, **options)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_only_what_trains_has_a_gradient():
    for trained in ("hidden", "weight", "bias"):
        hidden, weight, bias, targets, _ = problem()
        tensors = {"hidden": hidden, "weight": weight, "bias": bias}
        for name, tensor in tensors.items():
            tensor.requires_grad_(name == trained)
        linear_cross_entropy(hidden, weight, targets, bias=bias, chunk=4).backward()
        assert {name for name, tensor in tensors.items() if tensor.grad is not None} == {trained}
    assert not linear_cross_entropy(hidden.detach(), weight.detach(), targets, chunk=4).requires_grad
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets, chunk=4).requires_grad


def test_a_backward_pass_may_be_repeated_and_rows_without_targets_are_zero():
    hidden, weight, _, targets, _ = problem()
    loss = linear_cross_entropy(hidden, weight, targets, chunk=4)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, hidden)[0])
    assert not first[targets == -100].any() and first[targets != -100].all()
    nothing = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), chunk=4)
    assert nothing == 0 and not torch.autograd.grad(nothing, weight)[0].any()
    empty = linear_cross_entropy(hidden[:0], weight, targets[:0])
    assert empty == 0 and empty.requires_grad


def test_large_logits_stay_finite():
    hidden, weight, _, targets, _ = problem(dtype=torch.float32)
    loss = linear_cross_entropy(1e4 * hidden, 1e4 * weight, targets, chunk=4)
    expected = F.cross_entropy(1e8 * (hidden.double() @ weight.double().T), targets, reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert all(found.isfinite().all() for found in gradients(loss, hidden, weight))


@pytest.mark.parametrize("where", ["autocast", "parameters"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_half_precision_products_with_a_full_softmax(where, softcap):
    """The loss of bf16 logits, softmax in fp32: as near to the exact loss as the plain formula is."""
    hidden, weight, _, targets, _ = problem(300, 40, 16, dtype=torch.float32)
    exact = linear_cross_entropy(hidden.double(), weight.double(), targets, softcap=softcap)
    inputs = [hidden, weight]
    if where == "parameters":
        inputs = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "autocast"):
        plain, ours = (linear_cross_entropy(*inputs, targets, chunk=chunk, softcap=softcap) for chunk in (300, 32))
    assert ours.dtype == plain.dtype == torch.float32
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    wanted = [gradient.float() for gradient in gradients(exact, hidden, weight)]
    for by_chunk, whole, true in zip(gradients(ours, *inputs), gradients(plain, *inputs), wanted, strict=True):
        assert by_chunk.dtype == whole.dtype
        assert (by_chunk - true).norm() < 1.2 * (whole - true).norm() + 1e-3 * true.norm()


def test_no_tensor_is_larger_than_a_chunk_of_logits():
    hidden, weight, _, targets, weights = problem(64, 101, 5)

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.elements = max([self.elements, *sizes])
            return result

    with Largest() as largest:
        options = {"token_weights": weights, "label_smoothing": 0.1, "softcap": 5.0}
        linear_cross_entropy(hidden, weight, targets, chunk=8, **options).backward()
    assert largest.elements == 8 * 101


def test_a_second_derivative_is_refused():
    hidden, weight, _, targets, _ = problem()
    loss = linear_cross_entropy(hidden, weight, targets, chunk=4)
    with pytest.raises(RuntimeError, match="linear_cross_entropy .* has no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(17, 4)}, r"hidden \[23, 5\] and weight \[17, 4\] must be \[S, D\] and \[V, D\]"),
        ({"targets": torch.zeros(22, dtype=torch.long)}, r"targets \[22\] must be \[23\]"),
        ({"token_weights": torch.ones(23, requires_grad=True)}, "token_weights requires a gradient"),
        ({"bias": torch.zeros(16)}, r"bias \[16\] must be \[17\]"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5 must be between 0 and 1"),
        ({"softcap": 0.0}, "softcap=0.0 must be positive"),
        ({"chunk": 0}, "chunk=0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    hidden, weight, _, targets, _ = problem(dtype=torch.float32)
    given = {"hidden": hidden, "weight": weight, "targets": targets, **change}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**given)


@pytest.mark.parametrize("target", [17, -1])
def test_a_target_outside_of_the_vocabulary_is_an_error(target):
    hidden, weight, _, targets, _ = problem()
    targets[-1] = target
    for chunk in (4, 100):
        with pytest.raises((IndexError, RuntimeError)):
            linear_cross_entropy(hidden, weight, targets, chunk=chunk)
