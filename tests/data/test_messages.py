"""Every form of conversation becomes the same `messages`; malformed ones say what is wrong."""

from __future__ import annotations

import pytest
from tiny import image_bytes, random_image

from mllm_vision.data import CHAT_TEMPLATES, to_messages
from mllm_vision.data.chat.messages import BadConversation

IMAGE = {"type": "image"}
QA = {"image": "image", "question": "questions", "answer": "answers"}
TALK = {"image": "image", "conversations": "conversations"}


@pytest.fixture(scope="module")
def image():
    return image_bytes(random_image())


def part(text):
    return {"type": "text", "text": text}


def talk(image, *turns):
    """A LLaVA record: turns alternate between human and gpt."""
    said = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return {"image": image, "conversations": said}


def test_forms_of_conversation_become_the_same_messages(image):
    expected = [
        {"role": "user", "content": [IMAGE, part("what colour?")]},
        {"role": "assistant", "content": "red"},
    ]
    llava = talk(image, "<image>\nwhat colour?", "red")
    assert to_messages(llava, TALK) == expected
    as_lists = {
        "image": image,
        "conversations": {"from": ["human", "gpt"], "value": ["<image>\nwhat colour?", "red"]},
    }
    assert to_messages(as_lists, TALK) == expected
    roles = [{"role": "user", "content": "<image>what colour?"}, {"role": "assistant", "content": "red"}]
    assert to_messages({"image": image, "messages": roles}, {"image": "image", "messages": "messages"}) == expected
    parts = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": " what colour? "}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    assert to_messages({"image": image, "messages": parts}, {"image": "image", "messages": "messages"}) == expected
    assert to_messages({"image": image, "questions": ["what colour?"], "answers": ["red"]}, QA) == expected
    assert to_messages({"image": image, "questions": "what colour?", "answers": "red"}, QA) == expected


def test_several_questions_become_one_dialogue(image):
    record = {"image": image, "questions": ["a?", "b?", "c?"], "answers": ["1", "2", "3"]}
    messages = to_messages(record, QA)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3
    assert messages[0]["content"] == [IMAGE, part("a?")] and messages[2]["content"] == "b?"
    assert [message["content"] for message in messages[1::2]] == ["1", "2", "3"]


def test_captions_system_turns_two_images_and_answers_by_vote(image):
    columns = {"image": "image", "caption": "captions"}
    record = {"image": image, "captions": ["a dog", "", "a cat"]}
    assert to_messages(record, columns)[1]["content"] == "a dog"
    assert to_messages(record, columns, choice=3)[1]["content"] == "a cat", "the empty one is no choice"
    record = {
        "image": None,
        "conversations": [{"from": "system", "value": "be brief"}, {"from": "human", "value": "hi"}],
    }
    assert to_messages(record, TALK) == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    two = talk([image, image], "<image>first <image> then\n<image>", "three")
    assert to_messages(two, TALK)[0]["content"] == [IMAGE, part("first"), IMAGE, part("then"), IMAGE]
    votes = {"image": image, "questions": "q?", "answers": ["no", "yes", "yes"]}
    assert to_messages(votes, QA)[1]["content"] == "yes"
    vqa = {"image": image, "questions": "q?", "answers": [{"answer": "2"}, {"answer": "2"}, {"answer": "3"}]}
    assert to_messages(vqa, QA)[1]["content"] == "2"


@pytest.mark.parametrize(
    "record, columns, message",
    [
        ({"image": b"x", "questions": ["a?", "b?"], "answers": ["1"]}, QA, "differ in number: 2 and 1"),
        ({"image": b"x", "questions": [], "answers": []}, QA, "the conversation is empty"),
        ({"image": b"x", "questions": ["a?"], "answers": [" "]}, QA, "answer is empty"),
        ({"conversations": None}, TALK, "the conversation is empty"),
        ({"conversations": [{"from": "robot", "value": "hi"}]}, TALK, "unknown role.*'robot'"),
        ({"conversations": [{"from": "human", "value": ""}]}, TALK, "turn of the conversation is empty"),
        ({"conversations": ["hi"]}, TALK, "a turn is str"),
        ({"image": b"x", "captions": ["", None]}, {"image": "image", "caption": "captions"}, "caption is empty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            {"messages": "messages"},
            "unknown kind of content.*'video'",
        ),
    ],
)
def test_malformed_conversations(record, columns, message):
    with pytest.raises(BadConversation, match=message):
        to_messages(record, columns)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_an_image_written_into_a_string_is_an_image_part(name) -> None:
    """lmms-eval gives templates the string "<image>\\nquestion"."""
    from transformers.utils.chat_template_utils import render_jinja_template

    question = {"type": "text", "text": "which is red?"}
    texts = []
    for content in ("<image>\n<image>\nwhich is red?", [{"type": "image"}, {"type": "image"}, question]):
        turns = [[{"role": "user", "content": content}]]
        options = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
        texts += render_jinja_template(conversations=turns, chat_template=CHAT_TEMPLATES[name], **options)[0]
    assert texts[0] == texts[1] and texts[0].count("<image>") == 2
