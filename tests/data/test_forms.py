"""The forms conversations come in: bound, read and judged; one conversation in every form is one sample."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import image_bytes, random_image, tiny_image_processor, tiny_tokenizer

from mllm_vision.data import ConversationDataset, bind_conversations
from mllm_vision.data.chat.messages import BadConversation, from_turns, words
from mllm_vision.data.images.layouts import FixedLayout
from mllm_vision.data.records.forms import ConversationForm
from mllm_vision.data.records.sampling import judge

IMAGE = image_bytes(random_image())
Q, A = "what colour is the star?", "red"
MARKED = f"<image>\n{Q}"


def turns(*spelling: str, mark: str = MARKED, said=("user", "assistant")) -> list[dict]:
    who, what = spelling
    return [{who: said[0], what: mark}, {who: said[1], what: A}]


ONE_CONVERSATION = {
    "messages": {"messages": turns("role", "content")},
    "role and value": {"messages": turns("role", "value")},
    "from and content": {"conversations": turns("from", "content", said=("Human", "ChatGPT"))},
    "LLaVA": {"id": "7", "conversations": turns("from", "value", said=("human", "gpt"))},
    "ShareGPT of bard": {"conversation": turns("from", "value", said=("user", "bard"))},
    "JSON text": {"messages": json.dumps(turns("role", "content"))},
    "parts as Arrow unifies them": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "text": None, "image": None},
                    {"type": "text", "text": Q, "image": None},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": A, "image": None}]},
        ]
    },
    "struct of lists": {"conversations": {"from": ["human", "gpt"], "value": [MARKED, A]}},
    "question and answer": {"question": Q, "answer": A},
    "lists of them": {"questions": [Q], "answers": [A]},
    "votes": {"question": Q, "answers": ["blue", A, A]},
    "the Cauldron": {"texts": [{"user": Q, "assistant": A, "source": "some"}]},
    "TRL, texts": {"prompt": Q, "completion": A},
    "TRL, messages": {"prompt": [{"role": "user", "content": Q}], "completion": [{"role": "assistant", "content": A}]},
    "Alpaca": {"instruction": "what colour", "input": "is the star?", "output": A},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def build(records, tokenizer, columns=None, **options):
    layout = FixedLayout(tokenizer.convert_tokens_to_ids("<image>"), 4, tiny_image_processor())
    options = {"layout": layout, "chat_template": "vicuna", "max_length": 128, **options}
    return ConversationDataset(records, columns, tokenizer, progress=False, **options)


def supervised(sample, tokenizer):
    return tokenizer.decode([i for i in sample["labels"].tolist() if i != -100])


@pytest.mark.parametrize("name", ONE_CONVERSATION)
def test_one_conversation_in_every_form_is_one_sample(tokenizer, name):
    record = {"image": IMAGE, **ONE_CONVERSATION[name]}
    expected = build([{"image": IMAGE, "question": Q, "answer": A}], tokenizer)[0]
    if name == "Alpaca":
        expected = build([{"image": IMAGE, "question": "what colour\nis the star?", "answer": A}], tokenizer)[0]
    listed = build([record | {"image": [IMAGE]}], tokenizer)
    for dataset in (build([record], tokenizer), build(Dataset.from_list([record]), tokenizer), listed):
        sample = dataset[0]
        assert np.array_equal(sample["input_ids"], expected["input_ids"])
        assert np.array_equal(sample["labels"], expected["labels"])
        streamed = dataset.read_record(dataset.records[0], 5, 0)
        assert np.array_equal(streamed["input_ids"], expected["input_ids"])
        assert len(sample["images"]) == len(streamed["images"]) == 1


def test_classes_are_taught_by_their_names_wherever_they_stand(tokenizer):
    names = ClassLabel(names=["round", "square"])
    roles = ClassLabel(names=["user", "assistant"])
    tables = [
        ({"question": "shape?", "answer": 1}, {"question": Value("string"), "answer": names}),
        ({"questions": ["shape?"], "answers": [1]}, {"questions": List(Value("string")), "answers": List(names)}),
        ({"question": "shape?", "answers": [0, 1, 1]}, {"question": Value("string"), "answers": List(names)}),
        (
            {"messages": [{"role": 0, "content": "shape?"}, {"role": 1, "content": "square"}]},
            {"messages": List({"role": roles, "content": Value("string")})},
        ),
        (
            {"texts": [{"user": "shape?", "assistant": 1}]},
            {"texts": List({"user": Value("string"), "assistant": names})},
        ),
    ]
    for row, features in tables:
        table = Dataset.from_list([row], features=Features(features))
        assert supervised(build(table, tokenizer)[0], tokenizer) == "square</s>", row
    unknown = Dataset.from_dict(
        {"question": ["shape?"] * 3, "answer": [0, -1, None]},
        features=Features({"question": Value("string"), "answer": names}),
    )
    kept = build(unknown, tokenizer)
    assert len(kept) == 1 and kept.refused == {"a question or an answer is empty": 2}


def test_what_stands_beside_a_question_is_used_or_told(tokenizer, caplog):
    record = {
        "instruction": "name it", "input": "the star", "output": A, "system": "be brief",
        "history": [["how many?", "two"], ["sure?", "yes"]], "choices": ["red", "blue"],
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        columns = bind_conversations([record])
    assert {"system", "history", "input"} <= set(columns) and "not used: 'choices'" in caplog.text
    dialogue = ConversationForm([record], columns)(record)
    said = [(message["role"], message["content"]) for message in dialogue.samples()[0][0]]
    assert said[0] == ("system", "be brief") and said[1:3] == [("user", "how many?"), ("assistant", "two")]
    assert said[-2:] == [("user", "name it\nthe star"), ("assistant", A)]
    llava = {"conversations": turns("from", "value", mark="hi", said=("human", "gpt")), "system": "be kind"}
    assert ConversationForm([llava])(llava).messages[0] == {"role": "system", "content": "be kind"}
    caplog.clear()
    with caplog.at_level(logging.WARNING):  # beside a question proper `input` is something else
        assert "input" not in bind_conversations([{"question": "q", "answer": "a", "input": "x"}])
    assert "input" in caplog.text


def test_what_is_read_and_not_learnt(tokenizer):
    prompt = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": Q}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": A}]}
    assert supervised(build([row], tokenizer)[0], tokenizer) == f"{A}</s>"
    weighed = [dict(turn) for turn in [*prompt, {"role": "assistant", "content": A}]]
    weighed[1]["weight"], weighed[3]["weight"] = 0, 1
    assert supervised(build([{"messages": weighed}], tokenizer)[0], tokenizer) == f"{A}</s>"
    del weighed[1]["weight"]
    assert supervised(build([{"messages": weighed}], tokenizer)[0], tokenizer).split() == ["b</s>", f"{A}</s>"]


def test_numbers_and_dates_are_said_in_digits():
    assert [words(value) for value in (3, 3.0, 2.5, True, None, float("nan"), " a ")] == [
        *("3", "3", "2.5", "True", "", "", "a")
    ]
    with pytest.raises(BadConversation, match="a text is not a string: bytes"):
        words(b"\xff" * 10_000)


@pytest.mark.parametrize(
    "given, message",
    [
        ([{"role": "tool", "content": "3"}], "calls of tools are not supported"),
        ([{"role": "assistant", "content": None, "function_call": {"x": 1}}], "calls of tools are not supported"),
        ({"role": ["user", "assistant"], "content": ["only one"]}, "a text: 2 x role, 1 x content"),
        ("{not json", "the conversation is not valid JSON"),
        ("[" * 100_000, "the conversation is not valid JSON"),
        ([{"said": "x"}], "a turn has no role"),
        (7, "malformed: int"),
        ([{"role": "user", "content": "x", "weight": 0.5}], "weight between 0 and 1"),
        ([[{"role": "user", "content": "x"}]], "a turn is list"),
        ([{"role": "user", "content": [["x"]]}], "a text is not a string: list"),
        ([{"role": "user", "content": "y" * 1_000_000, "weight": "z" * 1000}], "weight"),
    ],
)
def test_malformed_turns_are_refused_in_few_words(given, message):
    found = judge("row 3", from_turns, given)
    assert isinstance(found, BadConversation.__mro__[1]) and message in str(found) and len(str(found)) < 500


ALTERNATING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
)


def say(*roles: str, text: str = "a star") -> dict:
    return {"messages": [{"role": role, "content": text} for role in roles]}


def test_a_template_that_raises_refuses_that_row_alone(tokenizer, caplog):
    good = say("user", "assistant")
    rows = [say("user", "user", "assistant"), good, say("system", "user", "assistant"), good]
    with caplog.at_level(logging.WARNING):
        dataset = build(rows, tokenizer, chat_template=ALTERNATING)
    assert len(dataset) == 2 and dataset.refused == {"the chat template refuses the conversation": 2}
    assert "2 of 4 conversations are refused" in caplog.text
    assert "row 0" in dataset.bad_samples.examples[0] and "roles must alternate" in dataset.bad_samples.examples[0]
    streamed = dataset.bad_samples.judge("row 2", dataset.read_record, rows[2], 1, 2)
    assert "System role not supported" in str(streamed)
    with pytest.raises(ValueError, match=r"no conversation of 600 can be used[\s\S]*roles must alternate"):
        build([rows[0]] * 600, tokenizer, chat_template=ALTERNATING)
    assert len(build([rows[0]] * 300 + [good] * 5, tokenizer, chat_template=ALTERNATING)) == 5


def test_odd_values_refuse_their_rows_alone(tokenizer):
    rows = [
        {"image": IMAGE, "questions": ["a?", "b?"], "answers": ["1", "2"]},
        {"image": IMAGE, "questions": ["a?", "b?"], "answers": ["1"]},
        {"image": IMAGE, "questions": [], "answers": []},
        {"image": IMAGE, "questions": None, "answers": None},
        {"image": IMAGE, "questions": ["a?"], "answers": [b"\xff"]},
        {"image": IMAGE, "questions": ["\ud800"], "answers": ["half a pair"]},
        {"image": [None, IMAGE, {"bytes": None, "path": ""}], "questions": "a?", "answers": 3},
        {"image": [], "questions": "of no image?", "answers": [4.0]},
    ]
    dataset = build(rows, tokenizer, {"image": "image", "question": "questions", "answer": "answers"})
    assert [dataset.record_of(i) for i in range(len(dataset))] == [0, 6, 7]
    assert dataset.refused == {
        "questions and answers differ in number": 1,
        "the conversation is empty": 1,
        "a question or an answer is empty": 1,
        "a text is not a string": 1,
        "the text cannot be tokenised": 1,
    }
    assert [len(dataset[i]["images"]) for i in range(3)] == [1, 1, 0] and dataset.without_image == 1


def test_images_inside_messages_beside_a_column(tokenizer, caplog):
    other = image_bytes(random_image(5, size=48))

    def row(*parts, column=None):
        content = [{"type": "text", "text": "q"}, *parts]
        said = [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]
        return {"image": column, "messages": said}

    rows = [
        row({"type": "image", "image": IMAGE}, {"type": "image"}, column=[other]),
        row({"type": "image", "image": IMAGE}, column=[other, other]),
        row({"type": "image", "index": 1}, {"type": "image", "index": 0}, column=[IMAGE, other]),
        row({"type": "image", "image": IMAGE}, {"type": "image"}),
    ]
    with caplog.at_level(logging.WARNING):
        dataset = build(rows, tokenizer, {"image": "image", "messages": "messages"})
    assert dataset.refused == {"more <image> tokens than images": 1} and dataset.left_out == 2
    assert "2 images of the column 'image' are not used" in caplog.text
    sizes = [[image.size[0] for image in dataset[i]["images"]] for i in range(3)]
    assert sizes == [[32, 48], [32], [48, 32]]


def test_long_texts_are_not_read_to_their_end(tokenizer):
    long = "star " * 2_000_000
    rows = [{"question": long, "answer": "a"}, {"question": "q", "answer": long}, {"question": "q", "answer": "a"}]
    dataset = build(rows, tokenizer)
    assert len(dataset) == 1 and dataset.refused == {"longer than max_length": 2}
    assert "characters, max_length=128" in dataset.bad_samples.examples[0]
    cut = build(rows, tokenizer, on_truncation="truncate")
    assert (
        cut.truncated == 1
        and cut.refused == {"truncation leaves no supervised token": 1}
        and cut.lengths.tolist()[0] == 128
    )
    whole = build([{"question": "q", "answer": "star " * 400}], tokenizer, on_truncation="truncate")
    assert np.array_equal(cut[0]["input_ids"], whole[0]["input_ids"]), "the beginning of the whole text"
    marked = {"image": [IMAGE] * 2, **say("user", "assistant")}
    marked["messages"][0]["content"] = f"<image> {long} <image>"
    kept = build([marked, {"image": None, **say("user", "assistant")}], tokenizer, on_truncation="truncate")
    assert kept.refused == {"truncation would cut image tokens": 1}


def test_the_plain_template_takes_captions_alone(tokenizer):
    pair = turns("from", "value", said=("human", "gpt"))
    more = turns("from", "value", mark="and?", said=("human", "gpt"))
    rows = [{"image": IMAGE, "conversations": said} for said in (pair, pair + more)]
    dataset = build(rows, tokenizer, chat_template="plain")
    assert len(dataset) == 1 and dataset.refused == {"the template 'plain' supports captions only": 1}
    assert supervised(dataset[0], tokenizer) == f"{A}</s>"
    with pytest.raises(
        ValueError, match="template 'plain' supports captions only: the text of 1 questions would be lost"
    ):
        build([{"image": IMAGE, "question": Q, "answer": A}], tokenizer, chat_template="plain")
    captions = [{"image": IMAGE, "caption": "a star"}, {"image": None, "caption": "of nothing"}]
    assert build(captions, tokenizer, chat_template="plain").refused == {"the caption has no image": 1}


def test_which_columns_are_taken(caplog):
    text = {"image": IMAGE, "dialogue": "A: hi. B: hello.", "question": "q", "answer": "a"}
    assert bind_conversations([text]) == {"image": "image", "question": "question", "answer": "answer"}
    pretrain = {"image": IMAGE, "conversations": json.dumps(turns("from", "value", said=("human", "gpt")))}
    forms = [("caption",), ("conversations",)]  # as align.py asks; turns in a JSON text are no caption
    assert bind_conversations([pretrain], forms=forms) == {"image": "image", "conversations": "conversations"}
    both = {"messages": turns("role", "content"), "conversations": turns("from", "value", said=("human", "gpt"))}
    with caplog.at_level(logging.WARNING):
        assert bind_conversations([both]) == {"messages": "messages"}
    assert "not used: 'conversations'" in caplog.text
    with pytest.raises(ValueError, match="no conversation found.*prompt with completion.*columns are: image") as found:
        bind_conversations([{"image": IMAGE}], {"image": None, "messages": None})
    assert "--messages_column" in str(found.value)


# -- random conversations ---------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30).map(str.strip).filter(
    lambda text: text and "<" not in text
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    pairs=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4),
    count=st.integers(0, 2),
    system=st.one_of(st.just(""), WORDS),
    template=st.sampled_from(["vicuna", "qa"]),
    arrow=st.booleans(),
)
def test_random_conversations_are_the_same_in_every_form(tokenizer, pairs, count, system, template, arrow):
    images = [image_bytes(random_image(k)) for k in range(count)]
    question, answer = [q for q, _ in pairs], [a for _, a in pairs]
    marked = ["<image>\n" * count + question[0], *question[1:]]
    before = [{"role": "system", "content": system}] if system else []
    said = list(before)
    for asked, replied in zip(marked, answer, strict=True):
        said += [{"role": "user", "content": asked}, {"role": "assistant", "content": replied}]
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    llava = [{"from": names[turn["role"]], "value": turn["content"]} for turn in said]
    parts = [dict(turn) for turn in said]
    first = len(before)
    parts[first]["content"] = [{"type": "image", "text": None}] * count + [{"type": "text", "text": question[0]}]
    inline = [dict(turn) for turn in parts]
    inline[first]["content"] = [{"type": "image", "image": image} for image in images] + parts[first]["content"][count:]
    column = {"image": images, **({"system": system} if system else {})}
    forms = {
        "questions": column | {"questions": question, "answers": answer},
        "pairs": column | {"texts": [{"user": q, "assistant": a} for q, a in pairs]},
        "messages": {"image": images, "messages": said},
        "llava": {"image": images, "conversations": llava},
        "parts": {"image": images, "messages": parts},
        "inline": {"messages": inline},
        "json": {"image": images, "messages": json.dumps(said)},
        "lists": {
            "image": images,
            "conversations": {name: [turn[name] for turn in llava] for name in ("from", "value")},
        },
        "beside": column | {"conversations": llava[first:]},
        "trl": {"image": images, "prompt": said[:-1], "completion": said[-1:]},
    }
    found = {}
    for name, record in forms.items():
        records = Dataset.from_list([record]) if arrow and name not in ("inline", "parts") else [record]
        columns = bind_conversations(records)
        dataset = build(records, tokenizer, columns, chat_template=template, shuffle_turns=False, max_length=2000)
        sample, streamed = dataset[0], dataset.read_record(records[0], 3, 0)
        for one in (sample, streamed):
            assert len(one["images"]) == count, name
            assert np.array_equal(one["input_ids"], sample["input_ids"]), name
        found[name] = sample
    for name, sample in found.items():
        assert np.array_equal(sample["input_ids"], found["messages"]["input_ids"]), name
        if name != "trl" or len(pairs) == 1:
            assert np.array_equal(sample["labels"], found["messages"]["labels"]), name
    learnt = [text for text in supervised(found["messages"], tokenizer).split("</s>") if text]
    assert len(learnt) == len(pairs)
    assert supervised(found["trl"], tokenizer).count("</s>") == 1
