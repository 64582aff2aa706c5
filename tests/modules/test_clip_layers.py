"""CLIP's layers without the work that nobody reads, against the model's own forward: values and every gradient."""

from __future__ import annotations

import pytest
import torch
from pairs_for_tests import make_dual
from tiny import tiny_clip
from torch.utils.checkpoint import checkpoint
from transformers.activations import QuickGELUActivation

from mllm_vision.encoder.activations import QuickGelu, use_fast_activations
from mllm_vision.encoder.clip_layers import Packing, is_plain
from mllm_vision.encoder.features import extract_features
from mllm_vision.encoder.text.pooling import pool_text

LENGTHS = (4, 9, 32, 2, 9, 17)
ENDS = {3: 3, 2: 255}  # eos_token_id of the config -> the id that ends a text (2 is the legacy mark: the highest id)


def texts(end: int = 3, padding: int = 0, lengths: tuple[int, ...] = LENGTHS, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((len(lengths), width), padding)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(4, 250, (length,), generator=generator)
        ids[row, length - 1] = end
    return ids


def with_gradients(model, output: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradient of every parameter, for the same random gradient of the output."""
    model.zero_grad()
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=output.dtype))
    return [output.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], rtol: float = 1e-9) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol / 100)


@pytest.mark.parametrize("eos_token_id", [3, 2])
@pytest.mark.parametrize("padding", ["zeros", "end"])
def test_packed_texts_are_padded_texts(eos_token_id, padding):
    """In float64, at the tower's full length; padding with the end token is CLIP's own way."""
    model = tiny_clip(text={"eos_token_id": eos_token_id}).text_model.double()
    end = ENDS[eos_token_id]
    ids = texts(end, end if padding == "end" else 0)
    expected = with_gradients(model, model(input_ids=ids).pooler_output)
    assert_same(with_gradients(model, pool_text(model, ids)), expected)
    shorter = texts(end, end if padding == "end" else 0, lengths=(4, 9, 2, 7, 7, 9), width=9)
    padded = torch.nn.functional.pad(shorter, (0, 23), value=end if padding == "end" else 0)
    expected = with_gradients(model, model(input_ids=padded).pooler_output)
    assert_same(with_gradients(model, pool_text(model, shorter)), expected)


def test_a_text_does_not_see_its_neighbours():
    model = tiny_clip().text_model.double()
    ids = texts()
    with torch.no_grad():
        together = pool_text(model, ids)
        alone = torch.cat([pool_text(model, ids[row : row + 1, :length]) for row, length in enumerate(LENGTHS)])
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)
        order = torch.tensor([3, 0, 5, 2, 4, 1])
        torch.testing.assert_close(pool_text(model, ids[order]), together[order], rtol=1e-9, atol=1e-11)


def test_no_layer_works_on_padding_and_the_last_works_for_the_end_tokens_alone():
    model = tiny_clip().text_model
    rows = []
    hooks = [layer.layer_norm2.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape[:-1]))
             for layer in model.encoder.layers]  # fmt: skip
    pool_text(model, texts())
    assert rows == [(sum(LENGTHS),), (len(LENGTHS),)]
    vision, rows = tiny_clip().vision_model, []
    hooks += [layer.layer_norm2.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape[:-1]))
              for layer in vision.encoder.layers]  # fmt: skip
    extract_features(vision, torch.randn(3, 3, 32, 32), pooled=True, tokens=False)
    extract_features(vision, torch.randn(3, 3, 32, 32), pooled=True, select_layer=-1)  # its tokens are asked for
    extract_features(vision, torch.randn(3, 3, 32, 32), pooled=True, select_layer=-2)
    assert rows == [(3, 17), (3,), (3, 17), (3, 17), (3, 17), (3,)]
    for hook in hooks:
        hook.remove()


def test_packing_and_back():
    packing = Packing(torch.tensor([2, 4, 1]), 4)
    assert packing.width == 4 and packing.place.tolist() == [0, 1, 4, 5, 6, 7, 8] and packing.last.tolist() == [1, 5, 6]
    packed = torch.randn(7, 3)
    padded = packing.pad(packed)
    assert padded.shape == (3, 4, 3) and torch.equal(packing.pack(padded), packed)
    assert (padded[0, 2:] == 0).all() and (padded[2, 1:] == 0).all()


def test_the_pooled_vector_of_a_image_without_its_last_tokens():
    model = tiny_clip().vision_model.double()
    pixel_values = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    expected = with_gradients(model, model(pixel_values).pooler_output)
    for arguments in ({"tokens": False}, {"select_layer": -2}, {"select_layer": -1}):
        features = extract_features(model, pixel_values, pooled=True, **arguments)
        assert_same(with_gradients(model, features.pooled), expected)


def test_autocast():
    dual = make_dual("clip")
    ids, pixel_values = texts(lengths=(4, 9, 5), width=9), torch.randn(3, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        text, image = dual.text_features(ids), dual.image_features(pixel_values)
        native = dual.text_projection(dual.text(input_ids=ids).pooler_output)
    assert text.dtype == image.dtype == torch.bfloat16
    torch.testing.assert_close(text.float(), native.float(), rtol=0.05, atol=0.05)


def wrap(model, how: str) -> list:
    """Does to a tower what makes its layers' own forward necessary; returns what the hooks saw."""
    seen: list = []
    layers = model.encoder.layers
    if how == "hook":
        for layer in layers:
            layer.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    elif how == "attention hook":
        layers[-1].self_attn.register_forward_hook(lambda module, inputs, output: seen.append(output[0].shape))
    elif how == "checkpointing":
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        for layer in layers:
            layer._gradient_checkpointing_func = lambda *args: seen.append(1) or checkpoint(*args, use_reentrant=False)
    elif how == "another class":  # what FSDP2 does
        for layer in layers:
            layer.__class__ = type("FSDPCLIPEncoderLayer", (type(layer),), {})
    elif how == "eager attention":
        model.set_attn_implementation("eager")
    return seen


@pytest.mark.parametrize("how", ["hook", "attention hook", "checkpointing", "another class", "eager attention"])
def test_a_wrapped_layer_is_run_whole(how):
    model = tiny_clip()
    text, vision = model.text_model.double(), model.vision_model.double()
    ids, pixel_values = texts(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    expected = [
        with_gradients(text, text(input_ids=ids).pooler_output),
        with_gradients(vision, vision(pixel_values).pooler_output),
    ]
    seen = [wrap(text, how), wrap(vision, how)]
    assert not is_plain(text.encoder.layers[-1]) and not is_plain(vision.encoder.layers[-1])
    found = [
        with_gradients(text, pool_text(text, ids)),
        with_gradients(vision, extract_features(vision, pixel_values, pooled=True, tokens=False).pooled),
    ]
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other, rtol=1e-4 if how == "eager attention" else 1e-9)  # its softmax is in single precision
    if "hook" in how or how == "checkpointing":
        assert all(seen), "what was wrapped around a layer is called"


def test_attention_dropout_needs_the_whole_layer_in_training_alone():
    layer = tiny_clip(text={"attention_dropout": 0.1}).text_model.encoder.layers[0]
    assert is_plain(layer.eval()) and not is_plain(layer.train())


def test_quick_gelu_is_transformers_own():
    x = torch.linspace(-12, 12, 401, dtype=torch.float64, requires_grad=True)
    ours, theirs = QuickGelu()(x), QuickGELUActivation()(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    gradient = torch.randn(401, dtype=torch.float64)
    pair = [torch.autograd.grad(value, x, gradient)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(QuickGelu(), (torch.randn(5, dtype=torch.float64, requires_grad=True),))
    extreme = torch.tensor([-1e30, -1e4, 0.0, 1e30], requires_grad=True)
    QuickGelu()(extreme).sum().backward()
    assert extreme.grad.tolist() == [0, 0, 0.5, 1]
    single = torch.randn(1000)
    assert torch.equal(QuickGelu().eval()(single), QuickGELUActivation()(single)), "a loaded tower's to the last bit"


def test_activations_are_exchanged_without_a_trace_in_the_weights():
    model = tiny_clip(vision={"hidden_act": "quick_gelu"}, text={"hidden_act": "gelu"}).train()
    names, ids, pixel_values = list(model.state_dict()), texts(), torch.randn(6, 3, 32, 32)
    before = model(input_ids=ids, pixel_values=pixel_values).logits_per_text
    use_fast_activations(model)
    assert all(type(layer.mlp.activation_fn) is QuickGelu for layer in model.vision_model.encoder.layers)
    assert not any(type(layer.mlp.activation_fn) is QuickGelu for layer in model.text_model.encoder.layers)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(input_ids=ids, pixel_values=pixel_values).logits_per_text, before)
