"""What `save_pretrained` leaves: the same tokens in a process without our package, and through our own loading."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from families import CONVOLUTIONAL, FAMILIES, TABLES, small
from safetensors.torch import load_file

from mllm_vision.encoder import VisionEncoder
from mllm_vision.encoder.sources import build_encoder
from mllm_vision.hub.card import model_card
from mllm_vision.hub.lineage import hash_weights, read_lineage, write_lineage

PLAIN = """
import json, pathlib, torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel
root = pathlib.Path({root!r})
errors = {{}}
for name, (layer, prefix) in json.loads((root / "cases.json").read_text()).items():
    model, processor = AutoModel.from_pretrained(root / name).eval(), AutoImageProcessor.from_pretrained(root / name)
    pixels = processor(images=[Image.open(root / "a.png"), Image.open(root / "b.png")], return_tensors="pt")
    with torch.no_grad():
        output = model(**pixels, output_hidden_states=True)
    states = output.hidden_states[layer]
    tokens = states.flatten(2).transpose(1, 2) if states.ndim == 4 else states[:, prefix:]
    wanted = load_file(root / (name + ".safetensors"))
    assert tokens.shape == wanted["tokens"].shape, (name, tokens.shape, wanted["tokens"].shape)
    errors[name] = [(tokens - wanted["tokens"]).abs().max().item(),
                    (output.pooler_output.flatten(1) - wanted["pooled"]).abs().max().item(),
                    wanted["tokens"].abs().max().item()]
print("RESULT", json.dumps(errors))
"""


@pytest.fixture(scope="module")
def plain_errors(tmp_path_factory, run_python):
    """Name of a saved encoder -> how far plain transformers is from what our encoder gave."""
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("plain")
    images = [tiny.random_image(1, (50, 40)), tiny.random_image(2, (32, 61))]
    for name, image in zip("ab", images, strict=True):
        image.save(root / f"{name}.png")
    cases = {}
    for model_type in FAMILIES:
        encoder = small(model_type)
        for name, size in ((model_type, None), (f"{model_type}-48", 48)):
            if size is not None:
                encoder.save_pretrained(root / "again")
                encoder = VisionEncoder.from_pretrained(root / "again", image_size=size)
            encoder.save_pretrained(root / name)
            features = {feature: encoder.encode(images, feature=feature) for feature in ("tokens", "pooled")}
            save_file({key: value.contiguous() for key, value in features.items()}, root / f"{name}.safetensors")
            cases[name] = (encoder.select_layer, encoder.num_prefix_tokens)
    (root / "cases.json").write_text(json.dumps(cases))
    printed = run_python(PLAIN.format(root=str(root)), block_package=True)
    return json.loads(printed.split("RESULT ")[1])


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("size", ["", "-48"])
def test_plain_transformers_gives_the_same_tokens(plain_errors, model_type, size):
    tokens, pooled, largest = plain_errors[model_type + size]
    assert largest > 1e-3
    assert tokens <= 1e-6 * max(1, largest)
    assert pooled <= 1e-6 * max(1, largest)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_our_own_round_trip_keeps_everything(tmp_path, model_type):
    encoder = small(model_type, select_layer=1)
    encoder.save_pretrained(tmp_path / "encoder")
    back = VisionEncoder.from_pretrained(tmp_path / "encoder")
    image = tiny.random_image(4, 40)
    assert torch.equal(back.encode([image]), encoder.encode([image]))
    for name in (
        "select_layer",
        "select_feature",
        "hidden_size",
        "num_tokens",
        "image_size",
        "patch_size",
        "pooled_size",
    ):
        assert getattr(back, name) == getattr(encoder, name), name
    assert type(back.processor) is type(encoder.processor)
    names = sorted(path.name for path in (tmp_path / "encoder").iterdir())
    assert names == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


@pytest.mark.parametrize("feature", ["patch", "pooled"])
def test_the_card_of_a_vit_without_a_pooler(tmp_path, feature):
    """Plain transformers would draw a random pooler: the card's lines keep it from that, and say why."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    encoder = build_encoder("vit", image_size=32, overrides=sizes | {"patch_size": 8}, pooler=False)
    encoder.select_feature = feature
    encoder.save_pretrained(tmp_path / "without")
    card = model_card(tmp_path / "without")
    assert "This ViT has no pooler" in card and "means nothing" in card
    scope = {}
    exec(compile(card.split("```python\n")[1].split("```")[0], "<card>", "exec"), scope)
    wanted = encoder.encode([scope["image"]], feature="pooled")
    torch.testing.assert_close(scope["vector"], wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(scope["tokens"], encoder.encode([scope["image"]]), rtol=0, atol=1e-6)
    for name, other in (("with", small("vit")), ("clip", small("clip_vision_model"))):
        other.save_pretrained(tmp_path / name)
        assert "pooler" not in model_card(tmp_path / name)


def test_lineage_goes_along_while_the_weights_are_the_same(tmp_path):
    small("clip_vision_model").save_pretrained(tmp_path / "made")
    write_lineage(tmp_path / "made", {"weights_sha256": hash_weights(tmp_path / "made"), "kind": "encoder"})
    (tmp_path / "made" / "recipe.yaml").write_text("seed: 1\n")
    encoder = VisionEncoder.from_pretrained(tmp_path / "made")
    encoder.save_pretrained(tmp_path / "copy")
    assert read_lineage(tmp_path / "copy") == read_lineage(tmp_path / "made")
    assert (tmp_path / "copy" / "recipe.yaml").is_file()
    with torch.no_grad():
        encoder.backbone.post_layernorm.bias.add_(1)
    encoder.save_pretrained(tmp_path / "copy")  # over the one that had a lineage
    assert read_lineage(tmp_path / "copy") is None
    assert not (tmp_path / "copy" / "recipe.yaml").exists()
    VisionEncoder.from_pretrained(tmp_path / "copy")


def test_weights_that_are_not_the_lineages_are_refused_with_both_hashes(tmp_path):
    small("clip_vision_model").save_pretrained(tmp_path)
    found = hash_weights(tmp_path)
    write_lineage(tmp_path, {"weights_sha256": "0" * 64})
    with pytest.raises(ValueError, match=f"(?s){'0' * 64}.*{found}"):
        VisionEncoder.from_pretrained(tmp_path)


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch):
    target = tmp_path / "encoder"
    small("clip_vision_model").save_pretrained(target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    other = small("clip_vision_model", select_layer=-1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(other.processor), "save_pretrained", full)
    with pytest.raises(OSError, match=r"No space left"):
        other.save_pretrained(target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_saving_onto_a_file_is_refused(tmp_path):
    (tmp_path / "encoder").write_text("mine")
    with pytest.raises(FileExistsError, match=r"is a file"):
        small("vit").save_pretrained(tmp_path / "encoder")
    assert (tmp_path / "encoder").read_text() == "mine"


# -- sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", TABLES)
def test_resized_at_load_equals_interpolated_at_every_step(tmp_path, model_type):
    """The native interpolation of transformers is the second path."""
    encoder = small(model_type)
    encoder.save_pretrained(tmp_path)
    resized = VisionEncoder.from_pretrained(tmp_path, image_size=48)
    pixel_values = torch.randn(2, 3, 48, 48)
    flag = {} if model_type.startswith("dinov2") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        wanted = encoder.backbone(pixel_values, output_hidden_states=True, **flag).hidden_states[encoder.select_layer]
        wanted = wanted[:, encoder.num_prefix_tokens :]
        torch.testing.assert_close(resized(pixel_values).tokens, wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(encoder(pixel_values).tokens, wanted, rtol=0, atol=1e-5)  # without any reload
    assert (resized.image_size, resized.num_tokens, resized.config.image_size) == (48, 36, 48)
    assert resized.encode([tiny.random_image(0, 64)]).shape == (1, 36, 32)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_same_size_is_the_identity(tmp_path, model_type):
    encoder = small(model_type)
    encoder.save_pretrained(tmp_path)
    same = VisionEncoder.from_pretrained(tmp_path, image_size=32)
    before, after = encoder.backbone.state_dict(), same.backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert same.processor.to_dict() == encoder.processor.to_dict()


def test_only_the_position_table_changes_with_the_size(tmp_path):
    encoder = small("clip_vision_model")
    encoder.save_pretrained(tmp_path / "small")
    VisionEncoder.from_pretrained(tmp_path / "small", image_size=64).save_pretrained(tmp_path / "large")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "large"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        next(name for name in before if "position_embedding" in name)
    }


@pytest.mark.parametrize("model_type", TABLES)
def test_a_size_the_patches_do_not_divide_is_said(tmp_path, model_type):
    encoder = small(model_type)
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"image_size=45 is not divisible by patch_size=8; use 40 or 48"):
        VisionEncoder.from_pretrained(tmp_path, image_size=45)
    with pytest.raises(ValueError, match=r"image_size=45 is not divisible by patch_size=8; use 40 or 48"):
        encoder(torch.randn(1, 3, 48, 45))
    with pytest.raises(ValueError, match=r"image_size=5 is not divisible by patch_size=8; use 8$"):
        VisionEncoder.from_pretrained(tmp_path, image_size=5)


@pytest.mark.parametrize("model_type", CONVOLUTIONAL)
def test_convolutional_networks_take_any_size(tmp_path, model_type):
    encoder = small(model_type)
    encoder.save_pretrained(tmp_path)
    other = VisionEncoder.from_pretrained(tmp_path, image_size=75)
    assert other.encode([tiny.random_image(0, 90)]).shape == (1, other.num_tokens, other.hidden_size)
    assert other.image_size == 75
    with pytest.raises(ValueError, match=r"image_size=-1 is not a size"):
        VisionEncoder.from_pretrained(tmp_path, image_size=-1)


def test_rectangular_images_run_when_the_patches_divide_them():
    for model_type in FAMILIES:
        encoder = small(model_type)
        if model_type not in CONVOLUTIONAL:
            assert encoder(torch.randn(1, 3, 16, 40)).tokens.shape == (1, 10, 32)


def test_dinov2_runs_at_the_size_of_its_processor(tmp_path):
    """DINOv2's checkpoints say 518 in the config and are used at the 224 of the processor."""
    backbone = tiny.tiny_dinov2(image_size=56)
    encoder = VisionEncoder.from_backbone(backbone, tiny.tiny_image_processor("dinov2", size=32))
    image = tiny.random_image(0, 50)
    assert (encoder.image_size, encoder.num_tokens) == (32, 16)
    tokens = encoder.encode([image])
    encoder.save_pretrained(tmp_path)
    fixed = VisionEncoder.from_pretrained(tmp_path, image_size=32)  # the table itself at the smaller size
    torch.testing.assert_close(fixed.encode([image]), tokens)
    assert fixed.config.image_size == 32


def test_patches_that_do_not_fill_a_native_image_are_accepted():
    """SigLIP so400m: 384 pixels, patches of 14, 27 x 27 tokens."""
    backbone = tiny.tiny_siglip_vision(image_size=38, patch_size=8)
    encoder = VisionEncoder.from_backbone(backbone, tiny.tiny_image_processor("siglip", size=38))
    assert encoder.num_tokens == 16
    assert encoder.encode([tiny.random_image(0)]).shape == (1, 16, 32)


def test_a_processor_of_another_size_is_refused_with_the_remedy(tmp_path):
    processor = tiny.tiny_image_processor("clip", size=48)
    with pytest.raises(
        ValueError, match=r"makes images of 48.*takes image_size=32; pass image_size=32 or image_size=48"
    ):
        VisionEncoder.from_backbone(tiny.tiny_clip_vision(), processor)
    assert VisionEncoder.from_backbone(tiny.tiny_clip_vision(), processor, image_size=48).num_tokens == 36
    with pytest.raises(ValueError, match=r"does not make square images of one size"):
        processor.do_center_crop = False
        VisionEncoder.from_backbone(tiny.tiny_clip_vision(), processor)


def test_a_resized_processor_sees_the_same_part_of_the_image():
    from transformers import BitImageProcessor

    from mllm_vision.encoder.sizes import processor_size, resize_processor

    processor = BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    other = resize_processor(processor, 112)
    assert (other.size["shortest_edge"], other.crop_size["height"], processor_size(other)) == (128, 112, 112)
    assert processor_size(processor) == 224


def test_an_array_is_one_image_and_a_stack_of_arrays_is_several() -> None:
    encoder = VisionEncoder.from_backbone(tiny.tiny_vit(), tiny.tiny_image_processor("vit"))
    for shape, count in (((20, 24), 1), ((20, 24, 3), 1), ((20, 24, 1), 1), ((20, 24, 4), 1), ((2, 20, 24, 3), 2)):
        assert encoder.encode(np.full(shape, 90, np.uint8), feature="pooled").shape[0] == count
    one = encoder.encode(np.full((20, 24, 3), 0.5, np.float32))
    assert torch.equal(one, encoder.encode([np.full((20, 24, 3), 0.5, np.float32)]))
    with pytest.raises(ValueError, match=r"shape \[3, 20, 24\] is not an image"):
        encoder.encode(np.zeros((3, 20, 24), np.uint8))


def test_saving_over_shards_leaves_none_of_them(tmp_path) -> None:
    """In either direction: what is there afterwards is the new model alone, and other files of the user."""
    tiny.tiny_vit().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    (tmp_path / "notes.safetensors").write_bytes(b"mine")
    VisionEncoder.from_backbone(tiny.tiny_vit(), tiny.tiny_image_processor("vit")).save_pretrained(tmp_path)
    names = {file.name for file in tmp_path.glob("*.safetensors*")}
    assert names == {"model.safetensors", "notes.safetensors"}
