"""Everything `from_pretrained` accepts, and what it says about everything else."""

from __future__ import annotations

import json
import logging

import pytest
import tiny
import torch
import transformers
from families import FAMILIES, small
from safetensors.torch import load_file, save_file

from mllm_vision.encoder import VisionEncoder, build_backbone
from mllm_vision.encoder.sources import build_encoder, is_model_type

IMAGE = tiny.random_image(5, (45, 36))


def same_weights(backbone, other) -> bool:
    mine, theirs = backbone.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def processor_of(kind: str, path) -> None:
    tiny.tiny_image_processor(kind).save_pretrained(path)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_image_tower_of_a_dual_model(tmp_path, kind):
    model = tiny.tiny_clip() if kind == "clip" else tiny.tiny_siglip()
    model.save_pretrained(tmp_path)
    processor_of(kind, tmp_path)
    encoder = VisionEncoder.from_pretrained(tmp_path)
    assert same_weights(encoder.backbone, model.vision_model)
    assert (encoder.select_layer, encoder.select_feature) == (-2, "patch")
    pixel_values = encoder.processor(images=IMAGE, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = model.vision_model(pixel_values, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(encoder.encode([IMAGE]), wanted[:, 1:] if kind == "clip" else wanted)


def test_the_image_tower_of_a_generic_pair(tmp_path):
    model = transformers.VisionTextDualEncoderModel(
        vision_model=tiny.tiny_vit(),
        text_model=transformers.BertModel(
            transformers.BertConfig(
                vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
            )
        ),
    )
    model.save_pretrained(tmp_path)
    processor_of("vit", tmp_path)
    assert same_weights(VisionEncoder.from_pretrained(tmp_path).backbone, model.vision_model)


def llava(tower, path, kind, **settings):
    tokenizer = tiny.tiny_tokenizer(path / "words")
    config = transformers.LlavaConfig(
        vision_config=tower.config, text_config=tiny.tiny_llama(len(tokenizer)).config, image_token_index=4, **settings
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    with torch.no_grad():  # as tuned with the language model: not the weights it started from
        for parameter in model.model.vision_tower.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(path)
    transformers.LlavaProcessor(
        image_processor=tiny.tiny_image_processor(kind), tokenizer=tokenizer, patch_size=8
    ).save_pretrained(path)
    return model


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit", "dinov2"])
def test_the_tuned_tower_of_a_llava(tmp_path, kind):
    tower = {"clip": tiny.tiny_clip_vision, "siglip": tiny.tiny_siglip_vision}.get(kind) or getattr(
        tiny, f"tiny_{kind}"
    )
    strategy = "full" if kind == "siglip" else "default"
    model = llava(tower(seed=3), tmp_path, kind, vision_feature_select_strategy=strategy, vision_feature_layer=-1)
    encoder = VisionEncoder.from_pretrained(tmp_path)
    assert same_weights(encoder.backbone, model.model.vision_tower)
    assert (encoder.select_layer, encoder.select_feature) == (-1, "patch")
    pixel_values = encoder.processor(images=IMAGE, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-1]
        seen = model.model.multi_modal_projector(states[:, 1:] if strategy == "default" else states)
        theirs = model.model.get_image_features(pixel_values).pooler_output[0]
        ours = model.model.multi_modal_projector(encoder(pixel_values).tokens)[0]
    torch.testing.assert_close(theirs, seen[0])
    torch.testing.assert_close(ours, theirs)


def test_a_llavas_full_strategy_keeps_the_class_token(tmp_path):
    llava(tiny.tiny_clip_vision(), tmp_path, "clip", vision_feature_select_strategy="full", vision_feature_layer=-2)
    assert VisionEncoder.from_pretrained(tmp_path).select_feature == "cls_patch"
    chosen = VisionEncoder.from_pretrained(tmp_path, select_feature="pooled", select_layer=1)
    assert (chosen.select_layer, chosen.select_feature, chosen.num_tokens) == (1, "pooled", 1)


def test_a_llava_of_the_older_layout(tmp_path):
    """Files of transformers 4: `vision_tower.vision_model.` in front of every weight of the tower."""
    model = llava(tiny.tiny_clip_vision(seed=3), tmp_path, "clip")
    state = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("vision_tower.", "vision_tower.vision_model."): value
        for name, value in state.items()
        if name.startswith("vision_tower.")
    }
    assert old
    rest = {name: value for name, value in state.items() if not name.startswith("vision_tower.")}
    save_file(old, tmp_path / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(rest, tmp_path / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    places = dict.fromkeys(old, "model-00001-of-00002.safetensors") | dict.fromkeys(
        rest, "model-00002-of-00002.safetensors"
    )
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()  # the language model is not read
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"torch_dtype": "float16", "transformers_version": "4.36.0"}
    config["text_config"] |= {"_name_or_path": "somebody/words", "torch_dtype": "float16"}
    for name in ("num_channels", "attention_dropout", "layer_norm_eps"):  # older files name only what differs
        config["vision_config"].pop(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert same_weights(VisionEncoder.from_pretrained(tmp_path).backbone, model.model.vision_tower)


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("CLIPForImageClassification", "clip"),
        ("CLIPVisionModelWithProjection", "clip_vision_model"),
        ("SiglipForImageClassification", "siglip"),
        ("ViTForImageClassification", "vit"),
        ("Dinov2ForImageClassification", "dinov2"),
        ("Dinov2WithRegistersForImageClassification", "dinov2_with_registers"),
        ("ResNetForImageClassification", "resnet"),
        ("EfficientNetForImageClassification", "efficientnet"),
    ],
)
def test_the_body_of_a_classifier(tmp_path, name, model_type):
    if model_type in ("clip", "siglip"):
        config = (tiny.tiny_clip() if model_type == "clip" else tiny.tiny_siglip()).config
        body = "vision_model"
    else:
        config, body = small(model_type).config, {"clip_vision_model": "vision_model"}.get(model_type, model_type)
    model = getattr(transformers, name)(config).eval()
    model.save_pretrained(tmp_path)
    kind = model_type if model_type in ("clip", "siglip") else None
    processor = tiny.tiny_image_processor(kind) if kind else small(model_type).processor
    encoder = VisionEncoder.from_pretrained(tmp_path, processor=processor, select_layer=-1)
    pixel_values = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        inner = getattr(model, body)
        output = inner(pixel_values, output_hidden_states=True)
        features = encoder(pixel_values)
    states = output.hidden_states[-1]
    states = states.flatten(2).transpose(1, 2) if states.ndim == 4 else states[:, encoder.num_prefix_tokens :]
    torch.testing.assert_close(features.tokens, states, rtol=0, atol=1e-6)
    if model_type == "vit":  # it has no pooler of its own, and a random one must not stand in
        assert encoder.backbone.pooler is None
        assert torch.equal(features.pooled, output.last_hidden_state[:, 0])


@pytest.fixture
def reports(caplog):
    """What transformers says; it keeps its records from pytest."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("size", ["5GB", "20KB"])
@pytest.mark.parametrize("kind", ["vit", "classifier", "siglip"])
def test_weights_that_were_never_there_are_not_reported_as_missing(tmp_path, reports, kind, size):
    """Stage zero's ViTs have no pooler, like classifiers', and some SigLIP towers no head: that is no fault."""
    if kind == "siglip":
        model = tiny.tiny_siglip_vision(vision_use_head=False)
    elif kind == "vit":
        model = transformers.ViTModel(tiny.tiny_vit().config, add_pooling_layer=False)
    else:
        model = transformers.ViTForImageClassification(tiny.tiny_vit().config)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "20KB")
    if kind == "siglip":  # as the towers of LLaVA checkpoints: the config says nothing of it
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"vision_use_head": True}))
    processor_of("siglip" if kind == "siglip" else "vit", tmp_path)
    encoder = VisionEncoder.from_pretrained(tmp_path)
    if kind == "classifier":  # its head is there, and is not taken
        assert "MISSING" not in reports.text and "classifier.weight" in reports.text
    else:
        assert reports.text == "" and same_weights(encoder.backbone, model)


def test_half_a_pooler_is_a_fault(tmp_path, reports):
    tiny.tiny_vit().save_pretrained(tmp_path)
    processor_of("vit", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    extra = {name: value for name, value in state.items() if name != "pooler.dense.bias"} | {"odd": torch.zeros(1)}
    save_file(extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights of the vit are missing, such as 'pooler.dense.bias'"):
        VisionEncoder.from_pretrained(tmp_path)
    assert "MISSING" in reports.text and "odd" in reports.text and "UNEXPECTED" in reports.text


def test_a_siglip_tower_without_its_head(tmp_path):
    tower = tiny.tiny_siglip_vision()
    tower.save_pretrained(tmp_path)
    processor_of("siglip", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state = {name: value for name, value in state.items() if "head." not in name}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    encoder = VisionEncoder.from_pretrained(tmp_path)
    assert not encoder.config.vision_use_head and not encoder.backbone.use_head  # no random one in its place
    pixel_values = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(encoder(pixel_values).pooled, tower(pixel_values).last_hidden_state.mean(dim=1))


def test_weights_are_loaded_in_fp32_unless_asked(tmp_path):
    tiny.tiny_clip_vision().half().save_pretrained(tmp_path)
    processor_of("clip", tmp_path)
    assert VisionEncoder.from_pretrained(tmp_path).dtype == torch.float32
    assert VisionEncoder.from_pretrained(tmp_path, dtype="auto").dtype == torch.float16
    assert VisionEncoder.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_dinov3s_processor_works_without_torchvision(tmp_path):
    encoder = small("dinov3_vit")
    encoder.save_pretrained(tmp_path / "a")
    settings = {
        "image_processor_type": "DINOv3ViTImageProcessorFast", "do_resize": True, "do_rescale": True,
        "do_normalize": True, "size": {"height": 32, "width": 32}, "resample": 2, "rescale_factor": 1 / 255,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    (tmp_path / "a" / "preprocessor_config.json").write_text(json.dumps(settings))
    loaded = VisionEncoder.from_pretrained(tmp_path / "a")
    assert list(loaded.processor.image_mean) == settings["image_mean"]
    loaded.save_pretrained(tmp_path / "b")
    plain = transformers.AutoImageProcessor.from_pretrained(tmp_path / "b")
    assert torch.equal(
        plain(images=IMAGE, return_tensors="pt")["pixel_values"],
        loaded.processor(images=IMAGE, return_tensors="pt")["pixel_values"],
    )


# -- encode ----------------------------------------------------------------------------------------------------


def test_encode_takes_images_paths_and_bytes_in_batches(tmp_path):
    encoder = small("clip_vision_model").train()
    images = [tiny.random_image(seed, (30 + seed, 44)) for seed in range(5)]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    paths = [tmp_path / f"{index}.png" for index in range(5)]
    mixed = [images[0], paths[1], str(paths[2]), tiny.image_bytes(images[3]), images[4]]
    whole = encoder.encode(images)
    assert whole.shape == (5, 16, 32) and not whole.requires_grad
    torch.testing.assert_close(encoder.encode(mixed, batch_size=2), whole)
    torch.testing.assert_close(encoder.encode(iter(images), batch_size=3), whole)
    torch.testing.assert_close(encoder.encode(images[2]), whole[2:3])
    torch.testing.assert_close(encoder.encode(tiny.image_bytes(images[2])), whole[2:3])
    assert encoder.encode(images, feature="pooled").shape == (5, 32)
    assert encoder.encode([]).shape == (0, 16, 32)
    assert encoder.encode([tiny.random_image(0, mode="L"), tiny.random_image(1, mode="CMYK")]).shape == (2, 16, 32)
    assert encoder.training  # as it was


def test_encode_says_what_it_cannot_take():
    encoder = small("clip_vision_model")
    with pytest.raises(ValueError, match=r"use 'tokens' or 'pooled'"):
        encoder.encode([IMAGE], feature="token")
    with pytest.raises(ValueError, match=r"batch_size=0"):
        encoder.encode([IMAGE], batch_size=0)
    with pytest.raises(ValueError):
        encoder.encode([b"no image"])


# -- refusals --------------------------------------------------------------------------------------------------


def test_what_is_no_vision_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist"):
        VisionEncoder.from_pretrained(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no config.json.*found nothing"):
        VisionEncoder.from_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no config.json.*found notes.txt"):
        VisionEncoder.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is a file"):
        VisionEncoder.from_pretrained(tmp_path / "notes.txt")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"LoRA adapter"):
        VisionEncoder.from_pretrained(tmp_path)
    tiny.tiny_llama(32).save_pretrained(tmp_path / "llama")
    with pytest.raises(
        ValueError, match=r"not a vision model: model_type='llama'; accepted are clip_vision_model, .*llava"
    ):
        VisionEncoder.from_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "config.json").write_text("{not json")
    with pytest.raises(ValueError, match=r"config.json.* is not valid JSON"):
        VisionEncoder.from_pretrained(tmp_path / "llama")


def test_the_naflex_variant_of_siglip_2(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    with pytest.raises(ValueError, match=r"NaFlex.*fixed size"):
        VisionEncoder.from_pretrained(tmp_path)


def test_a_missing_processor(tmp_path):
    tiny.tiny_clip_vision().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no image processor \(preprocessor_config.json\).*pass processor="):
        VisionEncoder.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"patch_size": 8}))
    with pytest.raises(
        ValueError, match=r"processor_config.json does not describe an image processor; pass processor="
    ):
        VisionEncoder.from_pretrained(tmp_path)
    processor = tiny.tiny_image_processor("clip")
    assert VisionEncoder.from_pretrained(tmp_path, processor=processor).processor is processor
    with pytest.raises(ValueError, match=r"processor=None"):
        VisionEncoder.from_backbone(tiny.tiny_clip_vision(), None)


def test_incomplete_and_broken_weights(tmp_path):
    encoder = small("clip_vision_model")
    encoder.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    gone = next(name for name in state if "layers.1.mlp.fc1.weight" in name)
    save_file({name: value for name, value in state.items() if name != gone}, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"1 weights of the clip_vision_model are missing, such as .*layers.1.mlp.fc1.weight"
    ):
        VisionEncoder.from_pretrained(tmp_path)
    save_file({**state, gone: torch.zeros(3, 3)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights do not fit their config.json"):
        VisionEncoder.from_pretrained(tmp_path)
    save_file(state, file, metadata={"format": "pt"})
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read and may be truncated"):
        VisionEncoder.from_pretrained(tmp_path)
    file.unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only safetensors are read"):
        VisionEncoder.from_pretrained(tmp_path)


def test_a_hub_id_without_a_connection():
    with pytest.raises(
        FileNotFoundError, match=r"somebody/nothing is neither a local directory nor in the local cache"
    ):
        VisionEncoder.from_pretrained("somebody/nothing")


def test_a_misspelt_model_type_is_no_checkpoint(tmp_path, monkeypatch):
    """Offline, from what is there: a bare name that is a folder or in the Hub's cache stays a checkpoint."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    told = r"nearest known one is 'vit'.*neither a path .*nor a repository in the Hub's cache .HF_HUB_OFFLINE is set"
    for refused in (lambda: is_model_type("vitt"), lambda: build_encoder("vitt", overrides={"hidden_size": 32})):
        with pytest.raises(FileNotFoundError, match=told):
            refused()
    (tmp_path / "cache" / "models--gpt2").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    assert not is_model_type("gpt2") and not is_model_type("mine") and not is_model_type("somebody/vitt")
    assert is_model_type("vit") and is_model_type("clip")


@pytest.mark.parametrize("answer", [True, False, ConnectionError("no route")])
def test_the_hub_is_asked_for_a_bare_name(tmp_path, monkeypatch, answer):
    """Where it has such a repository, or does not answer, loading is what tells."""
    import huggingface_hub

    asked = []

    def repo_exists(name):
        asked.append(name)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "repo_exists", repo_exists)
    if answer is False:
        with pytest.raises(FileNotFoundError, match=r"nearest known one is 'dinov2'.*nor a repository on the Hub"):
            is_model_type("dinov22")
    else:
        assert not is_model_type("dinov22")
    assert asked == ["dinov22"]


def test_a_model_that_is_no_backbone():
    with pytest.raises(ValueError, match=r"model_type='llama' is not a vision backbone"):
        VisionEncoder.from_backbone(tiny.tiny_llama(32), tiny.tiny_image_processor("clip"))


# -- from scratch ----------------------------------------------------------------------------------------------


def test_build_from_a_type_a_dict_and_a_file(tmp_path):
    for name in ("clip", "siglip", "siglip2", "vit", "dinov2", "dinov3"):
        fields = dict(FAMILIES["dinov2"] if name == "dinov2" else FAMILIES["clip_vision_model"])
        backbone, processor = build_backbone(name, image_size=40, **fields)
        assert VisionEncoder.from_backbone(backbone, processor).num_tokens == 25
    small("vit").save_pretrained(tmp_path)
    for spec in (tmp_path, tmp_path / "config.json", str(tmp_path), json.loads((tmp_path / "config.json").read_text())):
        backbone, _ = build_backbone(spec)
        assert (backbone.config.model_type, backbone.config.num_hidden_layers, backbone.config.image_size) == (
            "vit",
            3,
            32,
        )
    tiny.tiny_clip().save_pretrained(tmp_path / "pair")
    assert build_backbone(tmp_path / "pair")[0].config.model_type == "clip_vision_model"


def test_efficientnet_starts_with_a_signal():
    backbone, processor = build_backbone("efficientnet", image_size=64, **FAMILIES["efficientnet"])
    tokens = VisionEncoder.from_backbone(backbone.train(), processor)(torch.randn(8, 3, 64, 64)).tokens
    assert 0.1 < tokens.std() < 10  # transformers' own start gives 0.02


def test_what_build_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"hiden_size.*hidden_size"):
        build_backbone("clip", hiden_size=32)
    with pytest.raises(ValueError, match=r"image_size=225 is not divisible by patch_size=16; use 224 or 240"):
        build_backbone("vit", image_size=225, patch_size=16)
    with pytest.raises(ValueError, match=r"hidden_dim=64 must be 320 with this width_coefficient"):
        build_backbone("efficientnet", hidden_dim=64, width_coefficient=0.25)
    with pytest.raises(ValueError, match=r"hidden_size=33 is not divisible by num_attention_heads=2"):
        build_backbone("clip", hidden_size=33, num_attention_heads=2, num_hidden_layers=1, image_size=32, patch_size=8)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    with pytest.raises(ValueError, match=r"images and patches must be square, but a size is \[8, 4\]"):
        build_backbone("vit", image_size=16, patch_size=[8, 4], **small)
    assert build_encoder("vit", image_size=16, overrides={"patch_size": [8, 8], **small}).num_tokens == 4
    with pytest.raises(FileNotFoundError, match=r"nearest known one is 'dinov2'"):
        build_backbone("dinov22")
    with pytest.raises(ValueError, match=r"hidden_size"):
        build_backbone("clip", hidden_size="wide")
    with pytest.raises(ValueError, match=r"'llama' cannot be built"):
        build_backbone({"model_type": "llama"})
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"must contain a config"):
        build_backbone(tmp_path)
