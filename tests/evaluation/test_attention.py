"""Attention by head and patch components: against the layer's own arithmetic, for every kind of tower."""

from __future__ import annotations

import pytest
import tiny
import torch
from matplotlib.axes import Axes
from PIL import Image

from mllm_vision.data import load_records
from mllm_vision.encoder import VisionEncoder
from mllm_vision.encoder.build import build_backbone
from mllm_vision.evaluation import Attention, Board, Geometry
from mllm_vision.evaluation.geometry import geometry_of, warnings_of
from mllm_vision.evaluation.maps.attention import attention_heads, attention_map, head_figures, patch_components
from mllm_vision.evaluation.maps.drawing import draw_board, draw_heads

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWERS = {
    "vit": {"patch_size": 8, "intermediate_size": 64},
    "clip": {"patch_size": 8, "intermediate_size": 64},
    "siglip": {"patch_size": 8, "intermediate_size": 64},
    "dinov2": {"patch_size": 8, "mlp_ratio": 2},
    "dinov2_with_registers": {"patch_size": 8, "mlp_ratio": 2, "num_register_tokens": 4},
    "dinov3_vit": {"patch_size": 8, "intermediate_size": 64, "num_register_tokens": 4},
}


def build(kind: str) -> VisionEncoder:
    return VisionEncoder.from_backbone(*build_backbone(kind, image_size=32, **WIDTHS, **TOWERS[kind])).eval()


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_every_head_of_every_tower(kind):
    encoder = build(kind)
    pixels = torch.randn(3, 3, 32, 32)
    before = encoder.backbone.config._attn_implementation
    heads = attention_heads(encoder, pixels)
    assert heads.shape == (3, 4, 4, 4) and (heads >= 0).all()
    assert not torch.allclose(heads[:, 0], heads[:, 1])
    mass = heads.sum(dim=(2, 3))
    if kind == "siglip":  # the pooling head looks at patches alone
        torch.testing.assert_close(mass, torch.ones(3, 4))
    else:  # the class token also looks at itself and at the registers
        registers = getattr(encoder.config, "num_register_tokens", 0)
        expected = 16 / (17 + registers)  # untrained: nearly even
        torch.testing.assert_close(mass, torch.full((3, 4), expected), atol=0.1, rtol=0)
        assert (mass < 1).all()
    torch.testing.assert_close(attention_map(encoder, pixels), heads.mean(dim=1))
    assert encoder.backbone.config._attn_implementation == before


@torch.no_grad()
def test_the_heads_of_a_vit_are_its_softmax():
    encoder = build("vit")
    pixels = torch.randn(2, 3, 32, 32)
    hidden = []
    last = encoder.backbone.layers[-1]
    hook = last.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
    heads = attention_heads(encoder, pixels)
    hook.remove()
    normed = last.layernorm_before(hidden[0])
    attention = next(module for name, module in last.named_modules() if name.endswith("attention"))
    projections = {name.rpartition(".")[2]: module for name, module in attention.named_modules()}
    query = projections.get("query", projections.get("q_proj"))(normed)[:, 0].view(2, 4, 1, 8)
    key = projections.get("key", projections.get("k_proj"))(normed).view(2, 17, 4, 8).transpose(1, 2)
    weights = (query @ key.transpose(2, 3) / 8**0.5).softmax(dim=-1)
    torch.testing.assert_close(heads, weights[:, :, 0, 1:].view(2, 4, 4, 4))


@pytest.mark.parametrize("kind", ["dinov2_with_registers", "dinov3_vit"])
@torch.no_grad()
def test_registers_are_left_out(kind):
    """Class token, registers and patches come in this order: what is left of the softmax is on the first five."""
    encoder = build(kind)
    pixels = torch.randn(2, 3, 32, 32)
    heads = attention_heads(encoder, pixels)
    encoder.backbone.set_attn_implementation("eager")
    weights = encoder.backbone(pixels, output_attentions=True).attentions[-1][:, :, 0]
    assert weights.shape[-1] == 5 + 16
    torch.testing.assert_close(heads.flatten(2), weights[:, :, 5:])
    torch.testing.assert_close(heads.sum(dim=(2, 3)) + weights[:, :, :5].sum(dim=2), torch.ones(2, 4))


@torch.no_grad()
def test_the_heads_of_siglip_are_those_of_its_probe():
    encoder = build("siglip")
    pixels = torch.randn(2, 3, 32, 32)
    heads, pooling = attention_heads(encoder, pixels), encoder.backbone.head
    tokens = encoder.backbone(pixels).last_hidden_state
    weight, bias = pooling.attention.in_proj_weight, pooling.attention.in_proj_bias
    query = (pooling.probe[0] @ weight[:32].T + bias[:32]).view(1, 1, 4, 8).transpose(1, 2)
    key = (tokens @ weight[32:64].T + bias[32:64]).view(2, 16, 4, 8).transpose(1, 2)
    expected = (query @ key.transpose(2, 3) / 8**0.5).softmax(dim=-1)
    torch.testing.assert_close(heads, expected[:, :, 0].view(2, 4, 4, 4))


@torch.no_grad()
def test_layers_and_what_has_no_attention(caplog):
    encoder = build("dinov2")
    pixels = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(attention_heads(encoder, pixels, 0), attention_heads(encoder, pixels))
    torch.testing.assert_close(attention_heads(encoder, pixels, 1), attention_heads(encoder, pixels, -1))
    with pytest.raises(ValueError, match="layer=2 does not exist; this encoder has 2: use 0..1"):
        attention_heads(encoder, pixels, 2)
    backbone, processor = build_backbone("resnet", image_size=32, hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8)
    resnet = VisionEncoder.from_backbone(backbone, processor).eval()
    assert attention_heads(resnet, pixels) is None
    assert patch_components(resnet, torch.randn(3, 3, 32, 32)).shape[0] == 3
    Attention("looks", [{"image": tiny.random_image(place)} for place in range(3)])(resnet)
    assert "resnet has no class token or pooling head whose attention" in caplog.text


@torch.no_grad()
def test_components_tell_the_halves_of_a_image_apart(monkeypatch):
    """Patch features that differ between left and right, and a little between top and bottom: the first two axes."""
    encoder = build("vit")
    tokens = torch.zeros(2, 4, 4, 32)
    tokens[:, :, 2:, 5] = 8.0
    tokens[:, 1:2, :, 9] = 2.0
    tokens += 0.01 * torch.randn(tokens.shape)
    given = type("Features", (), {"tokens": tokens.view(2, 16, 32)})
    monkeypatch.setattr("mllm_vision.encoder.features.extract_features", lambda *a, **k: given)
    found = patch_components(encoder, torch.zeros(2, 3, 32, 32))
    assert found.shape == (2, 4, 4, 3) and found.min() >= 0 and found.max() <= 1
    left, right = found[:, :, :2, 0], found[:, :, 2:, 0]
    assert (right - left.max() > 0.9).all() or (left - right.max() > 0.9).all()
    assert (found[:, 1, :, 1] > 0.9).all() and (found[:, 0, :, 1] < 0.1).all()  # the rare side is the bright one
    with pytest.raises(ValueError, match="3 patches are too few"):
        given.tokens = tokens.view(2, 16, 32)[:1, :3]
        patch_components(encoder, torch.zeros(1, 3, 32, 32))


def test_figures_of_the_heads():
    even, one = torch.full((1, 1, 4, 4), 1 / 16), torch.zeros(1, 1, 4, 4)
    one[..., 2, 3] = 0.5
    assert head_figures(even)["entropy"] == pytest.approx(1.0) and head_figures(even)["on_patches"] == pytest.approx(1)
    found = head_figures(torch.cat([one, one], dim=1))
    assert found["entropy"] == pytest.approx(0.0) and found["on_patches"] == pytest.approx(0.5)
    assert found["head_similarity"] == pytest.approx(1.0)
    other = torch.zeros(1, 1, 4, 4)
    other[..., 0, 0] = 1.0
    assert head_figures(torch.cat([one, other], dim=1))["head_similarity"] == pytest.approx(-1 / 15)


def test_images_are_drawn(tmp_path):
    records = load_records(str(tiny.write_pairs_parquet(tmp_path / "pairs.parquet", n=8)))
    encoder = build("dinov2_with_registers")
    evaluator = Attention("looks/at", records, count=3)
    result = evaluator.examine(encoder)
    assert result.metrics["count"] == 3 and 0 < result.metrics["entropy"] <= 1
    items = result.arrays["maps"][0]["items"]
    assert [item["text"] for item in items] == ["mean of the heads", "head 1", "head 2", "head 3", "head 4"]
    patches, heads = evaluator.draw(result, tmp_path / "new")
    assert (patches.name, heads.name) == ("looks_at_patches.png", "looks_at_heads.png")
    sheet = Image.open(heads)
    assert sheet.width > 5 * 128 and sheet.height > 3 * 128
    assert Image.open(patches).width < 300


def test_a_tile_is_bright_where_the_map_is(tmp_path):
    heads = torch.rand(3, 4, 4, 4)
    sheet = Image.open(draw_heads([tiny.random_image(seed) for seed in range(3)], heads, tmp_path / "heads.png"))
    tile = sheet.crop((3 * 132, 16 + 132, 3 * 132 + 128, 16 + 132 + 128))
    brightness = torch.tensor(list(tile.convert("L").resize((4, 4), Image.BOX).tobytes()))
    assert torch.equal(brightness.argsort(), heads[1, 1].flatten().argsort())


def test_a_large_image_is_smoothed_where_it_shrinks(tmp_path):
    """Lines of single pixels become grey, not whichever line is hit; and words say what bright means."""
    lines = Image.new("RGB", (256, 256))
    lines.paste("white", (0, 0, 256, 128))
    for row in range(0, 128, 2):
        lines.paste("black", (0, row, 256, row + 1))
    sheet = Image.open(draw_heads([lines], torch.rand(1, 2, 4, 4), tmp_path / "heads.png"))
    tile = torch.tensor(list(sheet.crop((0, 16, 128, 16 + 64)).convert("L").tobytes()))
    assert tile.min() > 100 and tile.max() < 155
    note = torch.tensor(list(sheet.crop((0, 16 + 132, sheet.width, sheet.height)).convert("L").tobytes()))
    assert sheet.height == 16 + 132 + 2 * 16 and note.min() < 120


def test_the_words_of_the_board(tmp_path, monkeypatch):
    """Counts as they are, and in place of an empty spectrum what is the matter."""
    told, text = [], Axes.text
    monkeypatch.setattr(
        Axes, "text", lambda self, x, y, words, **how: told.append(words) or text(self, x, y, words, **how)
    )
    draw_board(
        {"this model": [0.7, 0.3]}, {"this model": [1.0, 0.5]}, {"count": 12345.0, "std": 0.1234}, tmp_path / "a.png"
    )
    assert told[0].split() == ["count", "12345", "std", "0.123"]
    draw_board({"this model": [0.0, 0.0]}, {"this model": [0.0, 0.0]}, {"std": 0.0}, tmp_path / "b.png")
    assert "no variance at all" in told[1:]


def test_the_board(tmp_path, caplog):
    records = load_records(str(tiny.write_pairs_parquet(tmp_path / "pairs.parquet", n=12)))
    board = Board("board", records, views=True)
    encoder = build("vit")
    result = board.examine(encoder)
    metrics = result.metrics
    assert 0 < metrics["view_alignment"] < 4
    assert metrics["view_alignment"] == board(encoder, 0)["view_alignment"]
    assert metrics["view_alignment"] != Geometry("board", records, views=True, seed=1)(encoder, 0)["view_alignment"]
    deviations = result.arrays["deviations"]["values"]
    assert len(deviations) == 32 and deviations == sorted(deviations, reverse=True)
    assert sum(deviations) / 32 == pytest.approx(metrics["std"], rel=1e-2)
    with torch.no_grad():  # a collapsed one: every image the same class token
        encoder.backbone.layernorm.weight.zero_()
    collapsed = board.examine(encoder)
    assert "collapse: the features of all images are nearly equal" in caplog.text
    assert collapsed.metrics["view_alignment"] == pytest.approx(0.0, abs=1e-9)
    result.add_baseline("collapsed", collapsed)
    assert len(result.arrays["deviations"]["collapsed"]) == 32
    (path,) = board.draw(result, tmp_path)
    assert Image.open(path).size[0] > 800
    with pytest.raises(ValueError, match="views=True measures an encoder"):
        Geometry("g", records, feature="embedding", views=True)


def test_warnings_name_the_kind_of_collapse():
    spread = torch.randn(400, 64)
    assert warnings_of(geometry_of(spread)) == []
    alike = torch.ones(400, 64) + 1e-3 * spread
    assert [text.partition(":")[0] for text in warnings_of(geometry_of(alike))] == ["collapse"]
    line = torch.randn(400, 1) * torch.randn(1, 64)
    assert [text.partition(":")[0] for text in warnings_of(geometry_of(line))] == ["dimensional collapse"]
    dead = torch.cat([spread[:, :16], torch.zeros(400, 48)], dim=1)
    assert warnings_of(geometry_of(dead)) == ["75% of the dimensions do not vary"]
