"""Geometry of features whose rank is known, and occlusion and attention maps that must find a planted object."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from datasets import Dataset
from pairs_for_tests import make_objective
from PIL import Image

from mllm_vision.data import load_records
from mllm_vision.encoder import VisionEncoder
from mllm_vision.encoder.sources import build_encoder
from mllm_vision.evaluation import Geometry, Maps
from mllm_vision.evaluation.base import Evaluation, evaluation_mode
from mllm_vision.evaluation.geometry import deviations_of, geometry_of, spectrum_of
from mllm_vision.evaluation.images import displayed
from mllm_vision.evaluation.maps.attention import attention_map
from mllm_vision.evaluation.maps.maps import occluded, occlusion_map
from mllm_vision.evaluation.models import reinitialise
from mllm_vision.functional import geometry


def test_geometry_of_known_clouds() -> None:
    """Plus and minus each axis: four equal eigenvalues, so rank four; one axis only: rank one."""
    axes = torch.cat([torch.eye(4), -torch.eye(4)])
    figures = geometry_of(axes)
    assert figures["effective_rank"] == pytest.approx(4, abs=1e-4)
    assert figures["std"] == pytest.approx(1, abs=1e-5)
    assert figures["dead_dimensions"] == 0
    assert spectrum_of(axes) == pytest.approx([0.25] * 4, abs=1e-4)
    line = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]] * 3)
    figures = geometry_of(line)
    assert figures["effective_rank"] == pytest.approx(1, abs=1e-4) and "alpha_req" not in figures
    assert figures["dead_dimensions"] == 0.75
    collapsed = geometry_of(torch.ones(5, 4))
    assert collapsed["effective_rank"] == 0 and collapsed["std"] == pytest.approx(0, abs=1e-6)
    assert collapsed["uniformity"] == pytest.approx(0, abs=1e-6)
    assert all(math.isfinite(value) for value in collapsed.values())


def test_every_figure_is_its_definition() -> None:
    """Written out on one cloud: RankMe of what is not centred, uniformity over all pairs."""
    features = torch.randn(60, 12, dtype=torch.float64) * torch.linspace(1, 3, 12) + 2.0
    figures = geometry_of(features)
    shares = torch.linalg.svdvals(features)
    shares = shares / shares.sum() + 1e-7
    assert figures["rankme"] == pytest.approx(torch.exp(-(shares * shares.log()).sum()).item(), rel=1e-6)
    unit = features / features.norm(dim=1, keepdim=True)
    potentials = [(-2 * (unit[i] - unit[j]).square().sum()).exp() for i in range(60) for j in range(i)]
    assert figures["uniformity"] == pytest.approx(torch.stack(potentials).mean().log().item(), rel=1e-6)
    assert figures["std"] == pytest.approx((unit.std(0, unbiased=False).mean() * 12**0.5).item(), rel=1e-5)


def test_alpha_of_a_power_law() -> None:
    """Also with hardly more images than dimensions, where the tail of the spectrum says nothing of the features."""
    for exponent in (0.8, 1.0, 1.5):
        features = torch.randn(1000, 768) * torch.arange(1, 769).pow(-exponent / 2)
        assert geometry_of(features)["alpha_req"] == pytest.approx(exponent, abs=0.12)
    assert geometry.alpha_req(torch.randn(1000, 768) * torch.arange(1, 769).pow(-0.5)) > 1.4  # all of it: misleading


def test_the_spectrum_is_as_long_as_the_features_are_wide() -> None:
    """The place of a value is its index, which the images draw it over."""
    features = torch.randn(900, 768)
    values = torch.linalg.eigvalsh(torch.cov(features.double().T, correction=0)).flip(0)
    found = spectrum_of(features)
    assert len(found) == 768 and found[599] == pytest.approx((values[599] / values.sum()).item(), rel=1e-3)
    assert len(deviations_of(features)) == 384


def test_images_are_drawn_from_all_of_the_data() -> None:
    """Rows come sorted by class, or class by class in turn: neither the first ones nor every n-th will do."""
    for classes in ([row // 100 for row in range(1000)], [row % 10 for row in range(1000)]):
        records = [{"image": None, "label": label} for label in classes]
        rows = Geometry("g", records, limit=100).rows
        counts = torch.bincount(torch.tensor([classes[row] for row in rows]), minlength=10)
        assert len(set(rows)) == 100 and rows == sorted(rows) and counts.min() >= 3 and counts.max() <= 20
    assert Geometry("g", records, limit=None).rows == Geometry("g", records, limit=2000).rows == list(range(1000))


def test_alignment_and_gap_of_a_pair(tmp_path) -> None:
    dual = make_objective("clip").dual.eval()
    records = load_records(str(tiny.write_pairs_parquet(tmp_path / "pairs.parquet", n=7)))
    columns = {"image": "image", "caption": "captions"}
    with torch.no_grad():
        images = dual.encode_images([records[row]["image"] for row in range(7)])
        texts = dual.encode_texts([records[row]["captions"][0] for row in range(7)])
    images, texts = (rows / rows.norm(dim=1, keepdim=True) for rows in (images, texts))
    for feature in ("pooled", "embedding"):
        found = Geometry("g", records, columns, feature=feature)(dual)
        assert found["alignment"] == pytest.approx((images - texts).square().sum(1).mean().item(), rel=1e-4)
        assert found["modality_gap"] == pytest.approx((images.mean(0) - texts.mean(0)).norm().item(), rel=1e-4)


@pytest.mark.parametrize("build", [tiny.tiny_clip_vision, tiny.tiny_siglip_vision, tiny.tiny_dinov2])
def test_geometry_and_attention_of_an_encoder(build, tmp_path) -> None:
    kind = {"tiny_clip_vision": "clip", "tiny_siglip_vision": "siglip", "tiny_dinov2": "dinov2"}[build.__name__]
    encoder = VisionEncoder.from_backbone(build(), tiny.tiny_image_processor(kind))
    records = load_records(str(tiny.write_pairs_parquet(tmp_path / "pairs.parquet", n=6)))
    evaluator = Geometry("geometry", records, {"image": "image", "caption": "captions"}, batch_size=4)
    metrics = evaluator(encoder, 0)
    features = encoder.encode([records[row]["image"] for row in range(6)], feature="pooled")
    values = torch.linalg.svdvals((features - features.mean(0)).double())
    shares = values / values.sum()
    assert metrics["effective_rank"] == pytest.approx(torch.exp(-(shares * shares.log()).sum()).item(), rel=1e-5)
    assert "alignment" not in metrics  # an encoder alone has no texts
    before = encoder.backbone.config._attn_implementation
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        looking = attention_map(encoder, pixels)
    assert looking.shape == (2, 4, 4) and (looking >= 0).all() and (looking.sum(dim=(1, 2)) <= 1 + 1e-5).all()
    assert encoder.backbone.config._attn_implementation == before
    if kind == "siglip":
        assert torch.allclose(looking.sum(dim=(1, 2)), torch.ones(2), atol=1e-5)


def test_tokens_feature_is_the_mean_of_the_tokens(tmp_path) -> None:
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
    records = load_records(str(tiny.write_pairs_parquet(tmp_path / "pairs.parquet", n=5)))
    evaluator = Geometry("g", records, {"image": "image"}, feature="tokens")
    rank = evaluator(encoder, 0)["effective_rank"]
    features = encoder.encode([records[row]["image"] for row in range(5)], feature="tokens").mean(dim=1)
    assert rank == pytest.approx(geometry_of(features)["effective_rank"], rel=1e-4)


def test_occlusion_finds_the_object() -> None:
    image = torch.zeros(3, 32, 32)
    image[0, 20:28, 4:12] = 1.0  # a red object in the third row, first column of a 4 x 4 grid

    def redness(pixels: torch.Tensor) -> torch.Tensor:
        return torch.stack([pixels[:, 0].sum(dim=(1, 2)), pixels[:, 1].sum(dim=(1, 2))], dim=1)

    red, green = occlusion_map(image, redness, grid=4)
    assert red.flatten().argmax().item() in (8, 9, 12, 13) and red[0].abs().max() == 0
    assert red[2, 0] > 20 and green.abs().max() == 0
    copies = occluded(image, grid=4, stretch=1.0)
    assert copies.shape == (16, 3, 32, 32)
    assert torch.equal(copies[0], image)  # painted in the ground's own colour: nothing to see
    assert copies[8].sum() < image.sum()


def test_displayed_is_what_the_model_sees() -> None:
    from mllm_vision.data import ImageTransform

    processor = tiny.tiny_image_processor("clip")
    image = tiny.random_image(3, 32)
    shown = displayed(ImageTransform(processor, train=False)([image])[0], processor)
    difference = torch.tensor(list(shown.tobytes())).int() - torch.tensor(list(image.tobytes())).int()
    assert difference.abs().max() <= 1


def test_bad_input() -> None:
    records = Dataset.from_dict({"image": [{"bytes": tiny.image_bytes(Image.new("RGB", (8, 8))), "path": None}]})
    with pytest.raises(ValueError, match="needs a column for 'image'"):
        Maps("m", records, {"caption": "x"})
    with pytest.raises(ValueError, match="two images or more"):
        Geometry("g", records, {"image": "image"})
    with pytest.raises(ValueError, match="none of 'pooled'"):
        Geometry("g", records, {"image": "image"}, feature="cls")


def test_modes_come_back_module_by_module() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    model.train()
    model[1].eval()  # a frozen part
    with evaluation_mode(model):
        assert not model.training and not model[0].training
    assert model.training and model[0].training and not model[1].training


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_reinitialise_keeps_what_was_changed_after_building(kind) -> None:
    """A ViT without its pooler, a ResNet with the stem for small images."""
    sizes = {
        "vit": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
                "patch_size": 8},
        "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
                   "stem": "cifar"},
    }  # fmt: skip
    encoder = build_encoder(kind, image_size=32, overrides=sizes[kind])
    if kind == "vit":
        encoder.backbone.pooler = None
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    reinitialise(encoder, seed=1)
    assert encoder.state_dict().keys() == before.keys()
    assert any(not torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert encoder(torch.zeros(1, 3, 32, 32)).pooled.shape == (1, encoder.pooled_size)


def test_reinitialise_forgets_and_keeps_the_random_state() -> None:
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    reinitialise(encoder, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    weight = "backbone.encoder.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(encoder.state_dict()[weight], before[weight])
    once = encoder.state_dict()[weight].clone()
    assert torch.equal(reinitialise(encoder, seed=1).state_dict()[weight], once)


def test_store_replaces_and_baselines_are_added() -> None:
    record: dict = {}
    for accuracy in (0.5, 0.7):
        result = Evaluation("accuracy", {"accuracy": accuracy, "count": 4.0}, {"chance": {"accuracy": 0.1}})
        result.samples, result.arrays = [{"correct": True}], {"spectrum": {"values": [1.0]}}
        other = Evaluation("accuracy", {"accuracy": 0.2, "count": 4.0}, arrays={"spectrum": {"values": [0.5]}})
        result.add_baseline("untrained", other)
        result.store(record, "zs")
    assert record["evaluations"]["zs"]["accuracy"] == 0.7
    assert record["evaluations"]["zs"]["baselines"] == {"chance": 0.1, "untrained": 0.2}
    assert record["samples"] == [{"evaluation": "zs", "correct": True}]
    assert record["arrays"] == {"zs/spectrum": {"values": [1.0], "untrained": [0.5]}}
