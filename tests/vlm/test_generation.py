"""Answers of every system: left-padded batches against one prompt at a time, and against the native `generate` on the
pixels; several images, text only, images of several sizes."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from families import small
from transformers import AutoTokenizer

from mllm_vision.data.chat.templates import CHAT_TEMPLATES
from mllm_vision.encoder import VisionEncoder
from mllm_vision.evaluation.language.generation import AnswerGenerator
from mllm_vision.vlm import answer, build_vlm, list_systems

TOWERS = {"clip": tiny.tiny_clip_vision, "siglip": tiny.tiny_siglip_vision, "vit": tiny.tiny_vit}
IDEFICS = {"longest_edge": 48, "shortest_edge": 16, "num_latents": 4, "perceiver_layers": 2, "perceiver_heads": 2}
IDEFICS |= {"perceiver_head_dim": 16, "perceiver_key_value_heads": 1}
QFORMER = {"num_query_tokens": 4, "qformer_layers": 2, "qformer_width": 64, "qformer_dropout": 0.0}
CAMBRIAN = {"query_side": 4, "connector_hidden_size": 32, "connector_heads": 2, "inner_layers": 2, "inner_stride": 2}
SYSTEMS: dict[str, tuple[str, str, dict[str, Any]]] = {  # tower, chat template, settings
    "llava": ("clip", "qa", {}),
    "llava15": ("siglip", "qa", {}),
    "llava_next": ("clip", "qa", {}),
    "internvl": ("vit", "qa", {"max_tiles": 4}),
    "idefics2": ("siglip", "vicuna", IDEFICS),
    "paligemma": ("siglip", "paligemma", {}),
    "blip2": ("vit", "blip2", QFORMER),
    "qwen_vl": ("siglip", "qa", {"num_queries": 9, "connector_heads": 2}),
    "prismatic": ("siglip", "qa", {}),
    "cambrian": ("siglip", "qa", CAMBRIAN),
}
IMAGES = [tiny.random_image(number, size) for number, size in enumerate([(32, 32), (90, 33), (20, 50), (64, 48)])]


def user(images: int, text: str) -> list[dict[str, Any]]:
    parts = [{"type": "image"}] * images
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if images else text}]


ASKED: list[tuple[Any, Any]] = [
    *((place, text) for place in range(4) for text in ("what?", "how many big red circles are there in it?")),
    ([0, 1], user(2, "which one is red?")),
    ([], user(0, "what is a circle?")),
    ([2], [*user(1, "what?"), {"role": "assistant", "content": "a star"}, *user(0, "where?")]),
]


@pytest.fixture(params=list_systems(), scope="module")
def pair(request, tmp_path_factory):
    """(task, processor) of a tiny system with random weights that says different things about different images."""
    folder = tmp_path_factory.mktemp(request.param)
    tower, template, settings = SYSTEMS[request.param]
    encoder = VisionEncoder.from_backbone(TOWERS[tower](num_hidden_layers=3), tiny.tiny_image_processor(tower))
    if request.param in ("prismatic", "cambrian"):
        settings = {**settings, "more_encoders": [str(folder / "more")]}
        more = small("convnext", image_size=64)
        if request.param == "prismatic":
            backbone = tiny.tiny_dinov2(num_hidden_layers=3)
            more = VisionEncoder.from_backbone(backbone, tiny.tiny_image_processor("dinov2"), select_layer=-2)
        more.save_pretrained(folder / "more")
    tiny.tiny_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    llm = tiny.tiny_llama(len(tokenizer), initializer_range=0.4, num_hidden_layers=4, max_position_embeddings=512)
    task, processor = build_vlm(encoder, llm, request.param, tokenizer, CHAT_TEMPLATES[template], **settings)
    for name, parameter in task.model.named_parameters():
        if task.system.parts.group_of(name) == "connector":
            torch.nn.init.normal_(parameter, std=0.5)
    return task.eval(), processor


def messages_of(asked: tuple[Any, Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    places, question = asked
    own = [IMAGES[place] for place in ([places] if isinstance(places, int) else places)]
    return user(len(own), question) if isinstance(question, str) else question, own


def test_a_padded_batch_says_what_each_prompt_says_alone(pair) -> None:
    task, processor = pair
    expected = [answer(task, processor, *messages_of(asked), max_new_tokens=6) for asked in ASKED]
    for batch_size in (4, len(ASKED)):
        generator = AnswerGenerator(task, processor, batch_size=batch_size, max_new_tokens=6)
        assert generator.answer(IMAGES, ASKED) == expected
    assert len(set(expected)) > 6  # otherwise the comparison would say nothing


def test_answers_are_those_of_the_native_generate_on_pixels(pair) -> None:
    """Nothing of ours but the spelling of the prompt: the native class encodes the pixels."""
    task, processor = pair
    generator = AnswerGenerator(task, processor, batch_size=3, max_new_tokens=6)
    found = generator.answer(IMAGES, [(place, "what?") for place in range(4)])
    for image, said in zip(IMAGES, found, strict=True):
        ids = torch.from_numpy(generator.prompt("what?", [(image.height, image.width)]))[None]
        inputs = {name: value for name, value in generator.layout([image]).items() if name != "tiles"}
        if task.system.name == "idefics2":
            inputs = {name: value[None] for name, value in inputs.items()}
        if task.system.name == "paligemma":
            inputs["token_type_ids"] = torch.zeros_like(ids)
        limits: Any = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": generator.ends}
        output = task.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, **limits)[0]
        new = output[ids.shape[1] :] if len(output) > 6 else output
        assert processor.tokenizer.decode(new, skip_special_tokens=True).strip() == said


def test_beams_keep_the_images_of_their_row(pair) -> None:
    task, processor = pair
    generator = AnswerGenerator(task, processor, batch_size=4, max_new_tokens=6)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2, "eos_token_id": None}
    options["pad_token_id"] = 0
    rows = [torch.from_numpy(generator.prompt("what?", [(image.height, image.width)])) for image in IMAGES]
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
    tokens = generator.image_features(IMAGES)
    together = task.generate(ids, mask, torch.cat(tokens), **options)[:, -6:]
    alone = [task.generate(row[None], None, each, **options)[0, -6:] for row, each in zip(rows, tokens, strict=True)]
    assert torch.equal(together, torch.stack(alone))
    assert len({tuple(row.tolist()) for row in alone}) > 1


def test_images_are_encoded_once_and_blind_answers_ignore_them(pair, monkeypatch) -> None:
    task, processor = pair
    counts = []
    inner = type(generator := AnswerGenerator(task, processor, batch_size=3, max_new_tokens=4))._encode
    monkeypatch.setattr(
        AnswerGenerator, "_encode", lambda self, images: counts.append(len(images)) or inner(self, images)
    )
    generator.answer(IMAGES, ASKED)
    assert sum(counts) == len(IMAGES)
    blind = AnswerGenerator(task, processor, batch_size=3, max_new_tokens=4, blind=True)
    same = [tiny.random_image(number, 40) for number in range(3)]
    assert len(set(blind.answer(same, [(place, "what?") for place in range(3)]))) == 1
    assert len(set(generator.answer(same, [(place, "what?") for place in range(3)]))) > 1
