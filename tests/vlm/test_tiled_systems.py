"""LLaVA-NeXT, InternVL, Idefics2: conversations about images of many sizes give the loss and gradients of the native
class on what the native processor makes of the same texts and images."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.internvl import InternVLProcessor

from mllm_vision.data import ConversationCollator, ConversationDataset, PackedConversations
from mllm_vision.data.chat.templates import CHAT_TEMPLATES
from mllm_vision.encoder import VisionEncoder
from mllm_vision.vlm import answer, build_vlm, freeze, load_vlm, save_vlm

TOWERS = {
    "clip": tiny.tiny_clip_vision,
    "siglip": tiny.tiny_siglip_vision,
    "dinov2": tiny.tiny_dinov2,
    "vit": tiny.tiny_vit,
}
LATENTS = {"num_latents": 4, "perceiver_layers": 2, "perceiver_heads": 2, "perceiver_head_dim": 16}
LATENTS |= {"perceiver_key_value_heads": 1}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llava_next-clip": ("llava_next", "clip", {}),
    "llava_next-siglip": ("llava_next", "siglip", {"grids": ["1x2", "3x1", "2x2"]}),
    "internvl-vit": ("internvl", "vit", {"max_tiles": 6}),
    "internvl-dinov2": ("internvl", "dinov2", {"max_tiles": 4, "min_tiles": 2}),
    "idefics2-siglip": ("idefics2", "siglip", {**LATENTS, "longest_edge": 48, "shortest_edge": 16}),
    "idefics2-split": ("idefics2", "siglip", {**LATENTS, "image_splitting": True}),
}
SIZES = [(33, 90), (64, 64), (50, 20), (7, 40)]
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]


def image(number: int) -> Any:
    height, width = SIZES[number]
    return tiny.random_image(number, (width, height))


def talk(images: list[int], *turns: str) -> dict[str, Any]:
    said = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return {"image": [image(number) for number in images], "conversations": said}


RECORDS = [
    talk([0], "<image>\nwhat is it?", "a red star"),
    talk([], "how many stars are there?", "two"),
    talk([1, 2], "<image><image>\nwhich one is red?", "the first", "and blue?", "the star"),
    talk([3], "where?\n<image>", "at the left"),
]


def built(name: str, folder: Any, **options: Any) -> tuple[Any, Any]:
    """A tiny system whose connector is not small."""
    system, tower, settings = CASES[name]
    encoder = VisionEncoder.from_backbone(TOWERS[tower](), tiny.tiny_image_processor(tower))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    llm = tiny.tiny_llama(len(tokenizer), initializer_range=0.2)
    torch.manual_seed(0)
    task, processor = build_vlm(encoder, llm, system, tokenizer, CHAT_TEMPLATES["vicuna"], **settings, **options)
    for name, parameter in task.model.named_parameters():
        if task.system.parts.group_of(name) == "connector":
            torch.nn.init.normal_(parameter, std=0.3)
    return task, processor


@pytest.fixture(params=CASES)
def system(request, tokenizer_folder):
    """(task, processor)."""
    return built(request.param, tokenizer_folder)


def conversations(task: Any, processor: Any, records: Any = RECORDS, **options: Any) -> Any:
    layout = task.system.layout(task.model, processor)
    options = {"max_length": 2000, "shuffle_turns": False, "progress": False, **options}
    return ConversationDataset(
        records, None, processor.tokenizer, layout=layout, chat_template=processor.chat_template, **options
    )


def native_inputs(task: Any, processor: Any, text: str, images: list[Any]) -> dict[str, torch.Tensor]:
    """A text and its images through the native processor; InternVL's cannot be built without torchvision, so that its
    own method writes the text, from the counts of its image processor."""
    if task.system.name != "internvl":
        made = processor(text=text, images=images or None, return_tensors="pt", add_special_tokens=False)
        return {name: value for name, value in made.items() if name in ("input_ids", *NATIVE)}
    counts, found = [], {}
    if images:
        made = processor.image_processor(images, crop_to_patches=True, return_tensors="pt")
        counts, found = made["num_patches"].tolist(), {"pixel_values": made["pixel_values"]}
    holder = SimpleNamespace(**vars(processor), start_image_token="<img>", end_image_token="</img>")
    for number in range(len(images)):
        mark = InternVLProcessor.replace_image_token(holder, {"num_patches": counts}, number)
        text = text.replace(processor.image_token, mark.replace(processor.image_token, "<one>"), 1)
    text = text.replace("<one>", processor.image_token)
    return {"input_ids": processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"], **found}


NATIVE = ("pixel_values", "image_sizes", "pixel_attention_mask")


def test_loss_and_gradients_are_those_of_the_native_class_row_by_row(system):
    task, processor = system
    dataset = conversations(task, processor)
    rows = [dataset[index] for index in range(len(RECORDS))]
    batch = ConversationCollator(processor.tokenizer, dataset.layout)(rows)
    total, count = torch.zeros(()), 0
    for index, row in enumerate(rows):
        text = processor.tokenizer.decode(dataset.tokens_of(index)[0])
        given = native_inputs(task, processor, text, row["images"])
        assert given["input_ids"][0].tolist() == row["input_ids"].tolist()
        logits = task.model(**given, attention_mask=torch.ones_like(given["input_ids"])).logits[0, :-1]
        targets = torch.from_numpy(row["labels"])[1:]
        total = total + F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        count += int((targets != -100).sum())
    loss = task(**batch).loss
    assert torch.allclose(loss, total / count, atol=1e-5)
    parameters = [p for n, p in task.model.named_parameters() if task.system.parts.group_of(n) != "encoder"]
    ours, theirs = (torch.autograd.grad(value, parameters) for value in (loss, total / count))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-5, rtol=1e-3)
    assert any(one.any() for one in ours)


def test_saved_is_loaded_by_plain_transformers_with_equal_logits_and_words(system, tmp_path):
    task, processor = system
    said = answer(task, processor, QUESTION, [image(0)], max_new_tokens=5)
    save_vlm(task, processor, tmp_path)
    again, read = load_vlm(tmp_path)
    assert type(again.system) is type(task.system) and again.system.config == task.system.config
    assert answer(again, read, QUESTION, [image(0)], max_new_tokens=5) == said
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    text = "USER: <image>\nwhat is it? ASSISTANT:"
    theirs = native_inputs(task, processor, text, [image(0)])
    if task.system.name == "internvl":
        assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == "InternVLProcessor"
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
        assert [getattr(tokenizer, each) for each in names] == ["<img>", "</img>", "<image>", "<video>"]
        assert AutoImageProcessor.from_pretrained(tmp_path).to_dict() == processor.image_processor.to_dict()
        read = read(text=text, images=image(0), return_tensors="pt", add_special_tokens=False)
    else:
        native = AutoProcessor.from_pretrained(tmp_path)
        read = native(text=text, images=image(0), return_tensors="pt", add_special_tokens=False)
    assert torch.equal(read["input_ids"], theirs["input_ids"])
    with torch.no_grad():
        expected = task.model(**theirs).logits
        assert torch.equal(plain(**{name: read[name] for name in theirs}).logits, expected)
    tower = VisionEncoder.from_pretrained(tmp_path)
    assert tower.config.model_type == {"internvl": "vit", "idefics2": "siglip_vision_model"}.get(
        task.system.name, tower.config.model_type
    )


def test_batches_without_images_reach_the_connector_and_blind_runs_see_none(system):
    task, processor = system
    freeze(task, ("connector",)).train()
    text = torch.randint(20, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    task(text, labels=text).loss.backward()
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None and not parameter.grad.any() for parameter in trained)
    dataset = conversations(task, processor, [talk([0], "<image>\nwhat?", "a"), talk([0], "<image>\nwhat?", "a")])
    dataset.records[1]["image"][0] = image(0).rotate(180)
    collate = ConversationCollator(processor.tokenizer, dataset.layout)
    one, other = ({**collate([dataset[index]])} for index in (0, 1))
    task.eval()
    with torch.no_grad():
        assert not torch.equal(task(**one).loss, task(**other).loss)
        task.blind = True
        assert torch.equal(task(**one).loss, task(**other).loss)


def test_packed_questions_are_separate_ones(system):
    task, processor = system
    record = {
        "image": [image(0)],
        "questions": ["what colour is it?", "how many stars?", "where?"],
        "answers": ["red", "two of them", "left"],
    }
    samples = conversations(task, processor, [record], max_turns=1)
    packed = PackedConversations(samples, max_length=2000)
    collate = ConversationCollator(processor.tokenizer, samples.layout)
    with torch.no_grad():
        alone = task(**collate([samples[index] for index in range(3)]))
        together = task(**collate([packed[0]]))
    assert len(packed) == 1 and torch.allclose(alone.loss, together.loss, atol=1e-5)


# -- what is refused --------------------------------------------------------------------------------------------------


def encoder_of(kind: str, select_feature: str | None = None, **sizes: Any) -> VisionEncoder:
    processor = tiny.tiny_image_processor(kind, sizes.get("image_size", 32))
    return VisionEncoder.from_backbone(TOWERS[kind](**sizes), processor, select_feature=select_feature)


@pytest.mark.parametrize(
    ("system", "encoder", "settings", "message"),
    [
        ("internvl", {"kind": "siglip"}, {}, "a siglip_vision_model tower cannot become internvl_vision"),
        ("internvl", {"kind": "clip"}, {}, "CLIP has a norm before its first layer"),
        ("internvl", {"kind": "vit", "image_size": 24}, {}, r"3 patches along a side of 24 px.*--image_size 16"),
        ("internvl", {"kind": "vit"}, {"min_tiles": 3, "max_tiles": 2}, "min_tiles=3 and max_tiles=2"),
        ("idefics2", {"kind": "vit"}, {}, "a vit tower cannot become idefics2_vision"),
        ("idefics2", {"kind": "siglip"}, {"longest_edge": 4}, r"patch \(8\) <= shortest"),
        ("llava_next", {"kind": "clip", "select_feature": "cls_patch"}, {}, "select_feature='patch'"),
        ("llava_next", {"kind": "clip"}, {"grids": ["2 by 3"]}, "grids='2 by 3' is not rows x columns"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(tokenizer_folder, system, encoder, settings, message):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    with pytest.raises(ValueError, match=message):
        build_vlm(encoder_of(**encoder), tiny.tiny_llama(len(tokenizer)), system, tokenizer, **settings)


@pytest.mark.parametrize("system", ["internvl", "llava_next"])
def test_images_smaller_than_the_towers_own_are_refused_until_it_is_resized(tokenizer_folder, system):
    """DINOv2 has position embeddings of 518 pixels and images of 224: the native classes cut by the former."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    llm, images = tiny.tiny_llama(len(tokenizer)), tiny.tiny_image_processor("dinov2", 32)
    encoder = VisionEncoder.from_backbone(tiny.tiny_dinov2(image_size=64), images)
    with pytest.raises(
        ValueError, match="images of 32 and its tower image_size=64; load the encoder with --image_size"
    ):
        build_vlm(encoder, llm, system, tokenizer)
    encoder = VisionEncoder.from_backbone(tiny.tiny_dinov2(image_size=64), images, image_size=48)
    task, processor = build_vlm(encoder, llm, system, tokenizer, CHAT_TEMPLATES["vicuna"])
    assert isinstance(answer(task, processor, QUESTION, [image(0)], max_new_tokens=2), str)


def test_a_template_that_glues_words_to_images_is_refused_by_idefics2(tokenizer_folder):
    task, processor = built("idefics2-siglip", tokenizer_folder)
    processor.chat_template = processor.chat_template.replace("'<image>\n'", "'<image>'")
    with pytest.raises(ValueError, match="directly behind an image.*Idefics2Processor puts a space"):
        task.system.layout(task.model, processor)


def test_other_pinpoints_in_the_processor_are_refused(tokenizer_folder, tmp_path):
    task, processor = built("llava_next-clip", tokenizer_folder)
    processor.image_processor.image_grid_pinpoints = [[32, 64]]
    save_vlm(task, processor, tmp_path)
    with pytest.raises(ValueError, match=r"image_grid_pinpoints=\[\[32, 64\]\] are not the model's"):
        load_vlm(tmp_path)


def test_more_images_than_marks_are_refused_by_the_processor_of_internvl(tokenizer_folder):
    _, processor = built("internvl-vit", tokenizer_folder)
    with pytest.raises(ValueError, match=r"1 image tokens \(<image>\) in the text and 2 images"):
        processor(text="<image> a", images=[image(0), image(1)])
    found = processor(text=["<image> a", "b"], images=[image(0)], padding=True, return_tensors="pt")
    assert found["input_ids"].shape[0] == 2 and found["pixel_values"].ndim == 4
