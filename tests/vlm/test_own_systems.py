"""Qwen-VL, prismatic and Cambrian as systems: built, trained, saved and read as any other."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F
from families import small
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mllm_vision.encoder import VisionEncoder
from mllm_vision.vlm import FreezeProof, audit, build_vlm, freeze, load_vlm, save_vlm
from mllm_vision.vlm.connectors.processing import JoinedLayout

IMAGES = [tiny.random_image(seed, (40 + seed, 64 - seed)) for seed in range(3)]
SYSTEMS = {
    "qwen_vl": {"num_queries": 9, "connector_heads": 2},
    "prismatic": {},
    "cambrian": {
        "query_side": 4, "connector_hidden_size": 32, "connector_heads": 2, "inner_layers": 2, "inner_stride": 2,
    },
}  # fmt: skip
TOKENS = {"qwen_vl": 9, "prismatic": 16, "cambrian": 16}


@pytest.fixture
def make(tokenizer_folder, tmp_path):
    """`make(system, encoder=None, more=None, **settings)` -> (task, processor) with towers of different kinds."""

    def build(system, encoder=None, more=None, **settings):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        if encoder is None:
            backbone = tiny.tiny_siglip_vision(num_hidden_layers=3)
            encoder = VisionEncoder.from_backbone(backbone, tiny.tiny_image_processor("siglip"))
        if more is None:
            second = {"prismatic": ("dinov2", 32), "cambrian": ("dinov2", 64)}.get(system)
            more = []
            if second:
                kind, size = second
                backbone = tiny.tiny_dinov2(num_hidden_layers=3, image_size=48)  # its positions are interpolated
                processor = tiny.tiny_image_processor(kind, size)
                more = [VisionEncoder.from_backbone(backbone, processor, select_layer=-2)]
            if system == "cambrian":
                more.append(small("convnext", image_size=64))
        for number, each in enumerate(more):
            each.save_pretrained(tmp_path / f"encoder_{number}")
        if more:
            settings["more_encoders"] = [str(tmp_path / f"encoder_{number}") for number in range(len(more))]
        torch.manual_seed(1)
        llm = tiny.tiny_llama(len(tokenizer), num_hidden_layers=4)
        task, processor = build_vlm(encoder, llm, system, tokenizer, **{**SYSTEMS[system], **settings})
        with torch.no_grad():
            for parameter in task.model.model.multi_modal_projector.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return task, processor

    return build


def batch(task, processor):
    """One image and two images in right-padded rows, by the system's layout."""
    layout = task.system.layout(task.model, processor)
    rows = []
    for number in (1, 2):
        text = torch.tensor([2, *[layout.image_token_id] * number, 20, 21, 22, 23 + number])
        ids, _ = layout.expand(text.numpy())
        rows.append(torch.from_numpy(ids))
    width = max(map(len, rows))
    ids = torch.stack([F.pad(row, (0, width - len(row))) for row in rows])
    mask = torch.stack([F.pad(torch.ones(len(row), dtype=torch.long), (0, width - len(row))) for row in rows])
    labels = ids.masked_fill((ids < 20) | (mask == 0) | (ids > 30), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **layout(IMAGES)}


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_task_is_the_native_forward(make, system):
    task, processor = make(system)
    data = batch(task, processor)
    with torch.no_grad():
        native = task.model(**data)
        torch.testing.assert_close(task(**data).loss, native.loss)
        features = task.system.features(task.model, {"pixel_values": data["pixel_values"]})
        assert features.ndim == 3
        pixels = data.pop("pixel_values")
        torch.testing.assert_close(task(**data, image_features=features.clone()).loss, native.loss, rtol=0, atol=0)
        task.blind = True
        blind = task(**data, pixel_values=pixels).loss
    assert abs(float(blind - native.loss)) > 1e-4


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_layout_is_the_processor(make, system):
    task, processor = make(system)
    layout = task.system.layout(task.model, processor)
    found = processor(images=IMAGES, text=["<image> a"] * 3, return_tensors="pt")
    # the layout's transform and the processor's differ by rounding of grey levels
    assert float((layout(IMAGES)["pixel_values"] - found["pixel_values"]).abs().max()) < 0.05
    spelt = layout.tokens(40, 64)
    assert (spelt == task.config.image_token_id).sum() == TOKENS[system] == task.config.image_seq_length
    row = found["input_ids"][0].tolist()
    assert any(row[start : start + len(spelt)] == spelt.tolist() for start in range(len(row)))
    blank = layout.blank()["pixel_values"]
    assert blank.shape == task.system.blank(task.model)["pixel_values"].shape
    if system == "qwen_vl":
        assert processor.tokenizer.convert_ids_to_tokens(spelt[[0, -1]]) == ["<img>", "</img>"]
    else:
        assert isinstance(layout, JoinedLayout)


@pytest.mark.parametrize("system", SYSTEMS)
def test_saved_and_loaded(make, system, tmp_path):
    task, processor = make(system)
    data = batch(task, processor)
    save_vlm(task, processor, tmp_path / "model")
    again, loaded = load_vlm(tmp_path / "model")
    assert again.system.name == system
    assert vars(again.system.config) == vars(task.system.config)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        wanted = task.model(**data).logits
        assert torch.equal(plain(**data).logits, wanted)
        assert torch.equal(again.model(**data).logits, wanted)
    words = {"images": IMAGES[:1], "text": ["<image> a red star"], "return_tensors": "pt"}
    one, two, three = (each(**words) for each in (processor, loaded, AutoProcessor.from_pretrained(tmp_path / "model")))
    assert all(torch.equal(one[name], two[name]) and torch.equal(one[name], three[name]) for name in one)
    encoder = VisionEncoder.from_pretrained(tmp_path / "model")  # the first tower comes back out
    mine, theirs = encoder.backbone.state_dict(), task.model.model.vision_tower.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert encoder.select_layer == task.config.vision_feature_layers[0]


@pytest.mark.parametrize("system", SYSTEMS)
def test_generation_of_a_padded_batch_is_one_at_a_time(make, system):
    task, processor = make(system)
    layout = task.system.layout(task.model, processor)
    rows = []
    for number in range(1, 4):
        ids, _ = layout.expand(torch.tensor([2, layout.image_token_id, *range(20, 20 + number)]).numpy())
        rows.append(torch.from_numpy(ids))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    pixels = layout(IMAGES)["pixel_values"]
    alone = [
        task.generate(row[None], pixel_values=pixels[i : i + 1], **options)[0, len(row) :] for i, row in enumerate(rows)
    ]
    width = max(map(len, rows))
    ids = torch.stack([F.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    together = task.generate(ids, mask, task.image_tokens({"pixel_values": pixels}), **options)[:, width:]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("train", ["connector", "encoder", "language_model=lora"])
def test_what_trains_moves_and_nothing_else(make, system, train):
    task, processor = make(system)
    freeze(task, [train])
    rows = audit(task, 1e-3)
    proof = FreezeProof(task, rows)
    task.train()
    learning = [parameter for parameter in task.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.5)
    data = batch(task, processor)
    for _ in range(2):  # the second factor of an adapter starts at zero
        optimizer.zero_grad()
        task(**data).loss.backward()
        assert not [name for name, each in task.named_parameters() if each.requires_grad and each.grad is None]
        optimizer.step()
    proof.verify(task, 2)
    assert not proof.problems


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_batch_without_images_reaches_the_connector(make, system):
    task, _ = make(system)
    freeze(task, ["connector"])
    task.train()
    ids = torch.tensor([[2, 20, 21, 22]])
    task(input_ids=ids, labels=ids).loss.backward()
    assert not [name for name, each in task.named_parameters() if each.requires_grad and each.grad is None]


@pytest.mark.parametrize("kind", ["efficientnet", "resnet", "convnext"])
@pytest.mark.parametrize("system", ["qwen_vl", "cambrian", "prismatic"])
def test_convolutional_towers(make, system, kind, tmp_path):
    settings = {"query_side": 2, "inner_layers": 1} if system == "cambrian" else {}
    task, processor = make(system, encoder=small(kind, image_size=64), more=[], **settings)
    data = batch(task, processor)
    save_vlm(task, processor, tmp_path / "model")
    with torch.no_grad():
        found = load_vlm(tmp_path / "model")[0](**data).loss
        torch.testing.assert_close(found, task(**data).loss)


def test_what_does_not_fit_is_refused(make, tmp_path):
    other = VisionEncoder.from_backbone(tiny.tiny_dinov2(), tiny.tiny_image_processor("dinov2", 64))
    with pytest.raises(ValueError, match=r"patch by patch, but they give \[16, 64\] patches.*--more_image_sizes"):
        make("prismatic", more=[other])
    task, _ = make("prismatic", more=[other], more_image_sizes=[32], more_select_layers=[1])
    assert task.config.vision_feature_layers == [-2, 1]
    assert task.config.vision_configs[1].image_size == 32
    with pytest.raises(ValueError, match=r"more_image_sizes=\[32, 32\] has 2 entries for 1 more_encoders"):
        make("prismatic", more=[other], more_image_sizes=[32, 32])
    clip = tiny.tiny_clip_vision()
    pooled = VisionEncoder.from_backbone(clip, tiny.tiny_image_processor("clip"), select_feature="cls_patch")
    with pytest.raises(ValueError, match="system=qwen_vl takes the patches.*--select_feature patch"):
        make("qwen_vl", encoder=pooled)
    with pytest.raises(ValueError, match="10 tokens are not a square"):
        make("qwen_vl", num_queries=10)
    task, processor = make("qwen_vl")
    save_vlm(task, processor, tmp_path / "model")
    processor.num_image_tokens = 4
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="spells an image as 4 tokens, but the model gives 9"):
        load_vlm(tmp_path / "model")
