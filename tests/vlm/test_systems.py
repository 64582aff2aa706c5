"""Every system against its native class and its native processor; a new system is one line of `SYSTEMS`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mllm_vision.data import ConversationCollator
from mllm_vision.data.chat.templates import CHAT_TEMPLATES
from mllm_vision.encoder import VisionEncoder
from mllm_vision.vlm import answer, build_vlm, freeze, list_systems, load_vlm, save_vlm
from mllm_vision.vlm.feature_cache import cache_features
from mllm_vision.vlm.measure import spell_out

TOWERS = {
    "clip": tiny.tiny_clip_vision,
    "siglip": tiny.tiny_siglip_vision,
    "dinov2": tiny.tiny_dinov2,
    "vit": tiny.tiny_vit,
}
SMALL_QFORMER = {"num_query_tokens": 4, "qformer_layers": 2, "qformer_width": 64, "qformer_dropout": 0.0}
SMALL_PERCEIVER = {"num_latents": 4, "perceiver_layers": 2, "perceiver_heads": 2, "perceiver_head_dim": 16}
SMALL_PERCEIVER |= {"perceiver_key_value_heads": 1}
CAMBRIAN = {"query_side": 4, "connector_hidden_size": 32, "connector_heads": 2, "inner_layers": 1}


@dataclass
class Case:
    """A tiny system.

    Args:
        system, tower: by name.
        template: of its chats.
        prompt: what the native processor is given for one image and "what is it?"; None: its chat template's text.
        settings: of the system.
        llm: options of the tiny Llama.
        native: the exported folder is read by AutoProcessor (False where that needs torchvision, or is not native).
    """

    system: str
    tower: str
    template: str = "qa"
    prompt: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    llm: dict[str, Any] = field(default_factory=dict)
    native: bool = True
    special: bool = False  # the processor adds the beginning token
    size: tuple[int, int] = (40, 64)  # of images; our resizing of a ViT's is a grey level off here and there


SYSTEMS = {
    "llava-clip": Case("llava", "clip"),
    "llava15-siglip": Case("llava15", "siglip"),
    "llava15-dinov2": Case("llava15", "dinov2", llm={"tie_word_embeddings": True}),
    "qwen_vl-clip": Case("qwen_vl", "clip", settings={"num_queries": 9, "connector_heads": 2}),
    "prismatic-dinov2": Case("prismatic", "dinov2"),
    "cambrian-siglip": Case("cambrian", "siglip", settings=CAMBRIAN),
    "llava15-padded": Case("llava15", "clip", settings={"pad_images": True}),
    "paligemma-siglip": Case("paligemma", "siglip", "paligemma", "<image>what is it?"),
    "paligemma-clip": Case("paligemma", "clip", "paligemma", "<image>what is it?"),
    "blip2-vit": Case(
        "blip2", "vit", "blip2", "<s>Question: what is it? Answer:", SMALL_QFORMER, special=True, size=(32, 32)
    ),
    "blip2-dinov2": Case("blip2", "dinov2", "blip2", "<s>Question: what is it? Answer:", SMALL_QFORMER, special=True),
    "llava_next-clip": Case("llava_next", "clip"),
    "internvl-dinov2": Case("internvl", "dinov2", native=False),
    "idefics2-siglip": Case("idefics2", "siglip", settings=SMALL_PERCEIVER),
}
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]


def built(case: Case, folder: Any) -> tuple[Any, Any]:
    """The tiny system, with a connector that is not zero."""
    encoder = VisionEncoder.from_backbone(TOWERS[case.tower](), tiny.tiny_image_processor(case.tower))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    llm = tiny.tiny_llama(len(tokenizer), **{"initializer_range": 0.2, **case.llm})
    torch.manual_seed(0)
    template = CHAT_TEMPLATES[case.template]
    task, processor = build_vlm(encoder, llm, case.system, tokenizer, template, **case.settings)
    for part in task.system.parts.modules(task.model, "connector"):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return task, processor


@pytest.fixture(params=SYSTEMS, scope="module")
def system(request, tmp_path_factory):
    """(case, task, processor)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tiny_tokenizer(folder)
    case = SYSTEMS[request.param]
    return case, *built(case, folder)


def native_inputs(case: Case, processor: Any, image: Any) -> dict[str, torch.Tensor]:
    """What the native processor makes of a prompt about an image."""
    options = {} if case.special else {"add_special_tokens": False}
    prompt = case.prompt or processor.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=prompt, images=image, return_tensors="pt", **options)
    return {name: value for name, value in inputs.items() if name != "labels"}


def our_inputs(task: Any, processor: Any, image: Any) -> dict[str, torch.Tensor]:
    """The same by our own chat template and layout."""
    from mllm_vision.data.chat.prompts import prompt_ids

    layout = task.system.layout(task.model, processor)
    ids = spell_out(layout, torch.tensor(prompt_ids(processor, QUESTION)), [image])
    return {"input_ids": ids[None], **layout([image])}


def test_every_system_is_in_a_table():
    """Those without a native class are in `test_own_systems`; `test_tiled_systems` has more of those with tiles."""
    tables = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*systems.py"))
    assert not [name for name in list_systems() if f'"{name}"' not in tables]


def test_logits_and_words_are_those_of_the_native_class(system):
    case, task, processor = system
    image = tiny.random_image(3, case.size)
    ours, native = our_inputs(task, processor, image), native_inputs(case, processor, image)
    assert torch.equal(ours["input_ids"], native["input_ids"])
    assert torch.allclose(ours["pixel_values"], native["pixel_values"].flatten(0, -4), atol=1e-5)
    with torch.no_grad():
        expected = task.model(**native).logits
        assert torch.allclose(task(**ours).logits, expected, atol=1e-4)
        assert expected.std() > 0.1
        other = task(**our_inputs(task, processor, tiny.random_image(4, case.size))).logits
        assert not torch.allclose(other, expected, atol=1e-2), "the image has no influence"
    said = task.generate(**ours, max_new_tokens=6, do_sample=False)
    words = task.model.generate(**native, max_new_tokens=6, do_sample=False)
    assert said[0, -words.shape[1] :].tolist() == words[0, -said.shape[1] :].tolist()


def test_loss_and_gradients_are_those_of_the_native_class(system):
    case, task, processor = system
    inputs = our_inputs(task, processor, tiny.random_image(3, case.size))
    ids = torch.cat([inputs["input_ids"], torch.tensor([[60, 61, 62, 3]])], dim=1)
    labels = torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - 4, -100, ids)
    native = native_inputs(case, processor, tiny.random_image(3, case.size))
    native |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "token_type_ids" in native:
        native["token_type_ids"] = (labels != -100).long()
    task.requires_grad_(True)
    logits = task.model(**native).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
    loss = task(**{**inputs, "input_ids": ids}, labels=labels, attention_mask=torch.ones_like(ids)).loss
    assert torch.allclose(loss, expected, atol=1e-5)
    parameters = [p for _, p in task.model.named_parameters()]
    ours, theirs = (torch.autograd.grad(value, parameters, allow_unused=True) for value in (loss, expected))
    for (name, _), one, other in zip(task.model.named_parameters(), ours, theirs, strict=True):
        if one is None or other is None:
            assert other is None or not other.any() or one is None, name
        else:
            assert torch.allclose(one, other, atol=1e-4, rtol=1e-3), name


@pytest.mark.parametrize("train", [("connector",), ("encoder", "connector", "language_model")])
def test_what_trains_gets_a_gradient_with_and_without_images(system, train):
    case, task, processor = system
    freeze(task, train).train()
    inputs = our_inputs(task, processor, tiny.random_image(3, case.size))
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    task.zero_grad()
    task(**inputs, labels=labels).loss.backward()
    trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
    groups = {task.system.parts.group_of(name.removeprefix("model.")) for name in trained}
    assert groups == set(train)
    assert not [name for name, p in trained.items() if p.grad is None]
    text = torch.randint(20, 60, (2, 9))
    task.zero_grad()
    task(text, labels=text).loss.backward()  # no image: another rank may have some
    connector = [p for name, p in trained.items() if task.system.parts.group_of(name[6:]) == "connector"]
    assert all(p.grad is not None and not p.grad.any() for p in connector)
    freeze(task, ("encoder", "connector", "language_model")).eval()


def test_a_padded_batch_answers_as_each_row_alone(system):
    from mllm_vision.evaluation.language.generation import AnswerGenerator

    _, task, processor = system
    images = [tiny.random_image(seed) for seed in range(3)]
    asked = [(0, "what is it?"), (1, "how many red stars are there?"), (2, "a"), (0, "where?")]
    together = AnswerGenerator(task, processor, batch_size=4, max_new_tokens=5).answer(images, asked)
    alone = AnswerGenerator(task, processor, batch_size=1, max_new_tokens=5).answer(images, asked)
    assert together == alone and len(set(together)) > 1
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked[1][1]}]}]
    assert answer(task, processor, messages, [images[1]], max_new_tokens=5) == together[1]


def test_saved_and_loaded_here_and_by_plain_transformers(system, tmp_path):
    case, task, processor = system
    image = tiny.random_image(3, case.size)
    inputs = our_inputs(task, processor, image)
    with torch.no_grad():
        logits = task(**inputs).logits
    save_vlm(task, processor, tmp_path)
    again, read = load_vlm(tmp_path)
    assert type(again.system) is type(task.system) and again.system.config == task.system.config
    ours = our_inputs(again, read, image)
    assert torch.equal(ours["input_ids"], inputs["input_ids"])
    with torch.no_grad():
        assert torch.equal(again(**ours).logits, logits)
    if case.native:
        plain = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        native = native_inputs(case, AutoProcessor.from_pretrained(tmp_path), image)
        assert torch.equal(native["input_ids"], inputs["input_ids"])
        with torch.no_grad():
            assert torch.allclose(plain(**native).logits, logits, atol=1e-4)


def test_cached_features_give_the_tokens_of_images_or_are_refused(system, tmp_path):
    """Images of several sizes, read back in another order and one at a time."""
    _, task, processor = system
    layout = task.system.layout(task.model, processor)
    values = [tiny.random_image(1, (48, 96)), tiny.random_image(2, (40, 40)), tiny.random_image(3, (96, 33))]
    images = [[value] for value in values]
    freeze(task, ("connector",))
    if "pixel_attention_mask" in layout([layout.load(values[0])]):
        with pytest.raises(ValueError, match="--cache_features: NativeAspectLayout pads"):
            cache_features(task, layout, images, folder=tmp_path)
        return
    cached = cache_features(task, layout, images, folder=tmp_path)
    for chosen in ([2, 0, 1], [1], [0, 0]):
        found = cached([cached.load(values[each]) for each in chosen])
        features = found.pop("image_features")
        expected = task.image_tokens(layout([layout.load(values[each]) for each in chosen]))
        torch.testing.assert_close(task.image_tokens(found, features), expected, rtol=1e-4, atol=1e-5)


def test_samples_packed_in_a_row_are_separate_or_packing_is_refused(system):
    """Two samples with an image each, in one row: their loss and the connector's gradient."""
    case, task, processor = system
    freeze(task, ("connector",))
    images = [tiny.random_image(5, case.size), tiny.random_image(6, case.size)]
    rows = [our_inputs(task, processor, image)["input_ids"][0] for image in images]
    rows[1] = torch.cat([rows[1], rows[1][-3:]])
    labels = [torch.where(torch.arange(len(row)) >= len(row) - 4, row, -100) for row in rows]
    layout = task.system.layout(task.model, processor)
    segments = torch.arange(2).repeat_interleave(torch.tensor([len(row) for row in rows]))
    packed = {"input_ids": torch.cat(rows), "labels": torch.cat(labels), "segments": segments}
    count = torch.tensor(8)
    batches = {
        "packed": [ConversationCollator.pad([packed], len(segments), pad_id=0) | layout(images)],
        "alone": [
            {"input_ids": row[None], "labels": target[None], **layout([image])}
            for row, target, image in zip(rows, labels, images, strict=True)
        ],
    }
    if task.system.bidirectional:
        with pytest.raises(ValueError, match="attend in both directions; train without --packing|--packing"):
            task(**batches["packed"][0])
        return
    found = {}
    for name, each in batches.items():
        task.zero_grad()
        loss = sum(task.train()(**batch, num_items_in_batch=count).loss for batch in each)
        loss.backward()
        found[name] = [loss.detach(), *(p.grad.clone() for p in task.parameters() if p.grad is not None)]
    assert len(found["packed"]) == len(found["alone"]) > 1
    for ours, separate in zip(found["packed"], found["alone"], strict=True):
        torch.testing.assert_close(ours, separate, rtol=1e-3, atol=1e-5)
