"""The planning table: its arithmetic against counted bytes and measured memory, its towers against real ones."""

from __future__ import annotations

import re
from pathlib import Path

import plan_work
import pytest
import torch

from mllm_vision.encoder.activations import use_fast_activations
from mllm_vision.training.preflight import plan
from mllm_vision.training.preflight.memory import PeakCounter
from mllm_vision.training.preflight.plan import PlanArguments, Towers

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_sent_are_those_planned(gloo, kind, exchange, ranks):
    rows, dimension = 40, 64
    planned = plan.feature_bytes_sent(kind, exchange, rows, ranks, dimension)
    for counted in gloo.run(ranks, plan_work.sent, kind, exchange, rows, dimension):
        assert planned <= counted <= planned + 300  # a few scalars more, that no table needs


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_memory_of_the_loss_is_about_that_planned(gloo, kind, exchange):
    rows, dimension, tile = 1024, 1024, 128
    planned = plan.loss_memory(exchange, rows, 2, dimension, tile)
    measured = max(gloo.run(2, plan_work.peak, kind, exchange, rows, dimension, tile))
    assert 0.5 * planned < measured < 1.6 * planned, f"{measured / 2**20:.1f} MiB of {planned / 2**20:.1f} planned"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A small CLIP pair with weights, and the same one made of fake tensors from its config."""
    from transformers import CLIPModel

    config = plan.clip_config(2, 64, 56, 2, 64, 32)
    config.text_config.vocab_size = 100
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    return CLIPModel.from_pretrained(folder), Towers(str(folder))


def test_the_towers_are_those_of_the_model(pair):
    model, towers = pair
    assert towers.parameter_count == sum(value.numel() for value in model.parameters()) and towers.dimension == 32
    units = [sum(p.numel() for p in layer.parameters()) for layer in model.vision_model.encoder.layers]
    units += [sum(p.numel() for p in layer.parameters()) for layer in model.text_model.encoder.layers]
    assert towers.largest_unit == max(*units, towers.parameter_count - sum(units))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_activations_are_those_that_real_towers_allocate(pair, precision, dtype):
    """By the difference of two numbers of rows, against the count on real tensors."""
    model, towers = pair
    use_fast_activations(model.train())

    def peak(rows):
        pixels, words = torch.randn(rows, 3, 224, 224), torch.full((rows, 77), 5)
        with PeakCounter() as count:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                image = model.get_image_features(pixel_values=pixels).pooler_output
                text = model.get_text_features(input_ids=words).pooler_output
            torch.autograd.backward([image, text], [torch.ones_like(image), torch.ones_like(text)])
        return count.most

    peak(1)  # gradients are there from here on
    each, fixed = towers.activations(precision, 8)
    assert each == pytest.approx((peak(16) - peak(8)) / 8, rel=0.02)
    assert fixed + 8 * each == pytest.approx(peak(8), rel=0.02)


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ({"objective": "itc"}, "not one of clip, siglip"),
        ({"ranks": [3]}, "4096 is not divisible by --ranks 3"),
        ({"chunk": 0}, "must be positive"),
    ],
)
def test_what_cannot_be_planned_is_refused(flag, complaint):
    with pytest.raises(ValueError, match=complaint):
        PlanArguments(**flag)


def test_a_model_that_is_no_pair_is_refused(tmp_path):
    import tiny

    with pytest.raises(ValueError, match=r"unknown --model 'ViT-X'"):
        Towers("ViT-X")
    tiny.tiny_vit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'vit' model; give a CLIP or SigLIP pair"):
        Towers(str(tmp_path))


def test_the_page_shows_what_the_script_prints():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- plan_scale -->\n(.*?)\n<!-- end -->", page, re.S)
    assert shown is not None and shown.group(1) == plan.plan(PlanArguments())
