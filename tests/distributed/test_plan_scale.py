"""The planning table: its formulas against counted bytes, counted parameters, kept activations and measured memory."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import plan_work
import pytest
import torch

from scripts import plan_scale
from scripts.plan_scale import MODELS, PlanArguments, Tower

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_sent_are_those_planned(gloo, kind, exchange, ranks):
    rows, dimension = 40, 64
    planned = plan_scale.feature_bytes_sent(kind, exchange, rows, ranks, dimension)
    planned += plan_scale.sum_bytes_sent(kind, rows, ranks)
    for counted in gloo.run(ranks, plan_work.sent, kind, exchange, rows, dimension):
        assert planned <= counted <= planned + 300  # a few scalars more, that no table needs


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_memory_of_the_loss_is_about_that_planned(gloo, kind, exchange):
    rows, dimension, tile = 1024, 1024, 128
    planned = plan_scale.loss_memory(exchange, rows, 2, dimension, tile)
    measured = max(gloo.run(2, plan_work.peak, kind, exchange, rows, dimension, tile))
    assert 0.5 * planned < measured < 1.6 * planned, f"{measured / 2**20:.1f} MiB of {planned / 2**20:.1f} planned"


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_model(name):
    from transformers import CLIPConfig, CLIPModel

    pair = MODELS[name]
    vision, text = pair.vision, pair.text
    config = CLIPConfig(
        vision_config={
            "hidden_size": vision.width, "intermediate_size": 4 * vision.width, "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.width // 64, "patch_size": pair.patch, "image_size": 224,
        },
        text_config={
            "hidden_size": text.width, "intermediate_size": 4 * text.width, "num_hidden_layers": text.layers,
            "num_attention_heads": text.width // 64, "vocab_size": pair.vocabulary,
        },
        projection_dim=pair.dimension,
    )  # fmt: skip
    with torch.device("meta"):
        model = CLIPModel(config)
    assert pair.parameters == sum(value.numel() for value in model.parameters())
    assert vision.tokens == (224 // pair.patch) ** 2 + 1
    layer = sum(value.numel() for value in model.vision_model.encoder.layers.parameters())
    assert vision.layer_parameters == layer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_a_layer_are_those_autograd_keeps(precision):
    """By the difference of two depths and of two numbers of rows: what is not a layer's or not a row's drops out."""
    import tiny
    from transformers import CLIPVisionModel

    width, tokens = 64, 17

    def kept(layers: int, rows: int) -> int:
        model: CLIPVisionModel = tiny.tiny_clip_vision(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, hidden_act="gelu"
        )
        known = {value.untyped_storage().data_ptr() for value in model.parameters()}
        seen: dict[int, torch.Tensor] = {}
        context = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()

        def pack(value: torch.Tensor) -> torch.Tensor:
            seen.setdefault(value.untyped_storage().data_ptr(), value)  # held, so that no address is used twice
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value), context:
            model(torch.randn(rows, 3, 32, 32))
        return sum(value.untyped_storage().nbytes() for key, value in seen.items() if key not in known)

    found = [(kept(3, rows) - kept(1, rows)) for rows in (2, 6)]
    counted = (found[1] - found[0]) / 4
    assert Tower(2, width, tokens).activations(precision) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ({"model": "ViT-X"}, "none of ViT-S/16"),
        ({"objective": "itc"}, "none of clip, siglip"),
        ({"ranks": [3]}, "4096 is not divisible by --ranks 3"),
        ({"chunk": 0}, "must be positive"),
    ],
)
def test_what_cannot_be_planned_is_refused(flag, complaint):
    with pytest.raises(ValueError, match=complaint):
        PlanArguments(**flag)


def test_the_page_shows_what_the_script_prints():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- plan_scale -->\n(.*?)\n<!-- end -->", page, re.S)
    assert shown is not None and shown.group(1) == plan_scale.report(PlanArguments())
