"""Sample captions of held-out rows, in whatever form they come."""

from __future__ import annotations

import logging

import pytest
import tiny

from mllm_vision.data import CHAT_TEMPLATES, bind_conversations
from mllm_vision.encoder import VisionEncoder
from mllm_vision.evaluation.language.captions import caption_samples
from mllm_vision.vlm import build_vlm


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    tokenizer = tiny.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
    llm = tiny.tiny_llama(len(tokenizer))
    return build_vlm(encoder, llm, "llava15", tokenizer, CHAT_TEMPLATES["plain"])


def test_captions_and_conversations_give_the_same_samples(built, caplog):
    image = tiny.image_bytes(tiny.random_image(3))
    ask = {"from": "human", "value": "Describe it.\n<image>"}
    captions = [{"image": image, "caption": text} for text in (["a star"], "a circle", None)]
    talks = [
        {"image": [image], "conversations": [ask, {"from": "gpt", "value": text}]}
        for text in ("a star", "a circle", "")
    ]
    found = []
    for records in (captions, talks):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            columns = bind_conversations(records)
            found.append(caption_samples(*built, records, columns, 8))
        assert "1 held-out rows were passed over" in caplog.text
    assert found[0] == found[1] and [sample["answer"] for sample in found[0]] == ["a star", "a circle"]
