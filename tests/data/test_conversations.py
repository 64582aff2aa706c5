"""Conversations: forms, templates, labels on the right words only, and everything that must be refused."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from tiny import (
    image_bytes,
    random_image,
    tiny_image_processor,
    tiny_tokenizer,
    write_conversations_jsonl,
    write_pairs_parquet,
)

from mllm_vision.data import (
    CHAT_TEMPLATES,
    ConversationCollator,
    ConversationDataset,
    ImageTransform,
    bind_conversations,
    load_records,
    preview_labels,
)
from mllm_vision.data.chat.templates import ChatTokenizer
from mllm_vision.data.images.layouts import FixedLayout

IMAGE = {"type": "image"}
QA = {"image": "image", "question": "questions", "answer": "answers"}
TALK = {"image": "image", "conversations": "conversations"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def image():
    return image_bytes(random_image())


def part(text):
    return {"type": "text", "text": text}


def talk(image, *turns):
    """A LLaVA record: turns alternate between human and gpt."""
    said = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return {"image": image, "conversations": said}


def four_tokens(tokenizer, count=4):
    return FixedLayout(tokenizer.convert_tokens_to_ids("<image>"), count, tiny_image_processor())


def build(records, columns, tokenizer, **options):
    options = {"layout": four_tokens(tokenizer), "chat_template": "qa", "max_length": 128, **options}
    return ConversationDataset(records, columns, tokenizer, progress=False, **options)


def supervised(sample, tokenizer):
    return tokenizer.decode([i for i in sample["labels"].tolist() if i != -100])


# -- templates and labels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", list(CHAT_TEMPLATES))
def test_marks_are_those_of_the_tokenizer_itself(tokenizer, template):
    """An independent path: transformers' own assistant mask, one conversation at a time."""
    chat = ChatTokenizer(tokenizer, template)
    conversations = [
        [
            {"role": "user", "content": [IMAGE, part("what colour is the star?")]},
            {"role": "assistant", "content": "red"},
        ],
        [
            {"role": "system", "content": "answer in one word."},
            {"role": "user", "content": "how many stars are there?"},
            {"role": "assistant", "content": "3"},
            {"role": "user", "content": "and circles, é中文 ?"},
            {"role": "assistant", "content": [part("no circles, naïve 中")]},
        ],
        [{"role": "user", "content": [IMAGE]}, {"role": "assistant", "content": "  a red circle at the left  "}],
    ]
    for conversation, (ids, mask) in zip(conversations, chat(conversations), strict=True):
        oracle = tokenizer.apply_chat_template(
            conversation,
            chat_template=chat.template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert ids.tolist() == oracle["input_ids"]
        assert mask.astype(int).tolist() == oracle["assistant_masks"]
        spoken = [m["content"] for m in conversation if m["role"] == "assistant"]
        words = [w if isinstance(w, str) else w[0]["text"] for w in spoken]
        said = "".join(f"{word}</s>" for word in words)
        assert "".join(tokenizer.decode(ids[mask]).split()) == "".join(
            said.split()
        )  # some templates begin with a space


@pytest.mark.parametrize("template", list(CHAT_TEMPLATES))
def test_the_prompt_in_use_is_the_beginning_seen_in_training(tokenizer, template):
    """Generation starts from add_generation_prompt: its ids must be what preceded the answer in training."""
    chat = ChatTokenizer(tokenizer, template)
    question = {"role": "user", "content": [IMAGE, part("what colour is the star?")]}
    ids, mask = chat([[question, {"role": "assistant", "content": "red"}]])[0]
    prompt = tokenizer.apply_chat_template(
        [question], chat_template=chat.template, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    start = int(mask.argmax())
    assert ids[:start].tolist() == prompt
    assert mask[start:].all() and ids[-1] == tokenizer.eos_token_id


def test_labels_are_the_answers_and_nothing_else(tokenizer, image):
    record = {"image": image, "questions": ["what colour?", "how many?"], "answers": ["red", "two"]}
    sample = build([record], QA, tokenizer, shuffle_turns=False)[0]
    ids, labels = sample["input_ids"], sample["labels"]
    assert ids.shape == labels.shape and ids.dtype == labels.dtype == np.int64
    assert (ids == tokenizer.convert_tokens_to_ids("<image>")).sum() == 4
    assert ((labels == -100) | (labels == ids)).all()
    assert supervised(sample, tokenizer).split() == ["red</s>", "two</s>"]
    captioned = [{"image": image, "captions": "a red circle"}]
    plain = build(captioned, {"image": "image", "caption": "captions"}, tokenizer, chat_template="plain")[0]
    bos = tokenizer.bos_token_id
    assert plain["input_ids"][:5].tolist() == [bos, *[tokenizer.convert_tokens_to_ids("<image>")] * 4]
    assert (plain["labels"][5:] == plain["input_ids"][5:]).all()
    assert supervised(plain, tokenizer) == "a red circle</s>"


def test_a_preview_shows_what_is_learnt(tokenizer, image):
    dataset = build([talk(image, "<image>\nwhat colour?", "red")], TALK, tokenizer, chat_template="vicuna")
    batch = ConversationCollator(tokenizer, four_tokens(tokenizer))([dataset[0]])
    text = preview_labels(batch, tokenizer)
    assert text == "<s>USER: <image>×4\nwhat colour? ASSISTANT:«red</s>»"


def test_templates_and_tokenizers_that_cannot_work(tokenizer, image):
    records = [talk(image, "<image>\nq?", "a")]
    with pytest.raises(ValueError, match=r"no generation marks.*\{% generation %\}.*'plain', 'vicuna', .*'qa'"):
        build(records, TALK, tokenizer, chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(ValueError, match="'<photo>' is not a token"):
        build(records, TALK, tokenizer, image_token="<photo>")

    class Without:
        chat_template = None

    with pytest.raises(ValueError, match="Without has no chat template; choose one of 'plain', 'vicuna'"):
        ChatTokenizer(Without())
    own = build(records, TALK, tokenizer, chat_template=None)  # the tokenizer's own template
    assert supervised(own[0], tokenizer) == "a</s>"


# -- what is refused --------------------------------------------------------------------------------------------------


def test_image_tokens_and_images_must_agree(tokenizer, image, caplog):
    records = [
        talk(image, "<image>\nfine?", "yes"),
        talk(image, "<image> <image>\nq?", "two marks, one image"),
        talk(None, "<image>\nq?", "a mark, no image"),
        talk(image, "q?", "an image, no mark"),
        talk([image, image], "<image>\nq?", "two images, one mark"),
        talk(None, "hello", "only text"),
        {"image": image, "conversations": talk(image, "<image>\nq?", "what is <image> about")["conversations"]},
    ]
    with caplog.at_level(logging.WARNING):
        dataset = build(records, TALK, tokenizer)
    assert dataset.refused == {"more <image> tokens than images": 3, "more images than <image> tokens": 2}
    assert dataset.bad_samples.count == 5 and dataset.bad_samples.seen == 7
    assert "5 of 7 conversations are refused" in caplog.text
    with pytest.raises(ValueError, match=r"5 of 7 samples are refused[\s\S]*2 in the text, 1 in the record"):
        dataset.bad_samples.check(0.01)
    assert len(dataset) == 2 and [dataset[i]["index"] for i in range(2)] == [0, 5]
    assert dataset[1]["images"] == [] and len(dataset[0]["images"]) == 1
    caption = [{"image": image, "captions": ["an <image> of text", "a dog"]}]
    kept = build(caption, {"image": "image", "caption": "captions"}, tokenizer)
    for number in range(4):
        kept.set_epoch(number)
        assert supervised(kept[0], tokenizer) == "a dog</s>"


def test_truncation_never_cuts_image_tokens(tokenizer, image):
    long = "a red circle on the left " * 20
    records = [talk(image, f"{long}\n<image>", "cut in the image"), talk(image, "<image>\nq?", long)]
    with pytest.raises(
        ValueError, match=r"no conversation of 2 can be used[\s\S]*longer than max_length.*max_length=40"
    ):
        build(records, TALK, tokenizer, max_length=40)
    dataset = build(records, TALK, tokenizer, max_length=40, on_truncation="truncate", chat_template="vicuna")
    assert len(dataset) == 1 and dataset.refused == {"truncation would cut image tokens": 1}
    sample = dataset[0]
    assert len(sample["input_ids"]) == 40 and (sample["input_ids"] == dataset.chat.image_token_id).sum() == 4
    unanswered = [talk(image, f"<image>\n{long}", "never reached"), records[1]]
    assert build(unanswered, TALK, tokenizer, max_length=40, on_truncation="truncate").refused == {
        "truncation leaves no supervised token": 1
    }
    # The limit counts the expanded image tokens, and is exact.
    length = int(build(records[1:], TALK, tokenizer, max_length=1000).lengths[0])
    assert len(build(records[1:], TALK, tokenizer, max_length=length)) == 1
    with pytest.raises(ValueError, match=f"{length} tokens, max_length={length - 1}"):
        build(records[1:], TALK, tokenizer, max_length=length - 1)


def test_samples_without_supervised_words_are_refused(tokenizer, image):
    records = [
        talk(image, "<image>\nnobody answers"),
        talk(image, "<image>\nq?", "a"),
        talk(image, "<image>\nq?", ""),
    ]
    dataset = build(records, TALK, tokenizer)
    assert len(dataset) == 1
    assert dataset.refused == {"no supervised token": 1, "a turn of the conversation is empty": 1}


def test_impossible_settings(tokenizer, image):
    records = [talk(image, "<image>\nq?", "a")]
    for options, message in (
        ({"max_length": 4}, "max_length=4 leaves no room for text beside the 4 tokens of an image"),
        ({"layout": FixedLayout(77, 4, tiny_image_processor())}, "image token has the id 77, but '<image>' is 4 in"),
        ({"on_truncation": "cut"}, "on_truncation='cut'"),
        ({"max_turns": 0}, "max_turns=0"),
    ):
        with pytest.raises(ValueError, match=message):
            build(records, TALK, tokenizer, **options)
    with pytest.raises(ValueError, match="0 rows"):
        build([], TALK, tokenizer)
    with pytest.raises(ValueError, match="no conversation found.*columns are: image"):
        bind_conversations([{"image": image}])


def test_a_corrupt_image_is_replaced_and_counted(tokenizer, image):
    records = [talk(image[:60], "<image>\nq?", "first"), talk(image, "<image>\nq?", "second")]
    dataset = build(records, TALK, tokenizer)
    assert len(dataset) == 2
    assert supervised(dataset[0], tokenizer) == "second</s>" and dataset.bad_samples.count == 1
    assert "cannot be decoded" in dataset.bad_samples.examples[0]


# -- drawing, batches, files ------------------------------------------------------------------------------------------


def many(image, n=6, turns=5):
    return [
        {
            "image": image,
            "questions": [f"what colour is star {k} of {i}?" for k in range(turns)],
            "answers": [f"{k} of {i}" for k in range(turns)],
        }
        for i in range(n)
    ]


@pytest.mark.parametrize("template, reorders", [("qa", True), ("vicuna", False)])
def test_questions_come_in_another_order_each_epoch(tokenizer, image, template, reorders):
    dataset = build(many(image), QA, tokenizer, chat_template=template, max_length=1000, seed=4)
    assert dataset._reorders is reorders, "cached turns where the template allows it, tokenised anew where not"

    def epoch(number):
        dataset.set_epoch(number)
        return [supervised(dataset[i], tokenizer) for i in range(len(dataset))]

    first, second = epoch(0), epoch(1)
    assert first != second and first == epoch(0)
    for i, (one, other) in enumerate(zip(first, second, strict=True)):
        turns = sorted(text.strip() for text in one.split("</s>") if text.strip())
        assert turns == sorted(text.strip() for text in other.split("</s>") if text.strip())
        assert turns == sorted(f"{k} of {i}" for k in range(5))
    dataset.set_epoch(3)
    for i in range(len(dataset)):  # every reordered dialogue equals the template's own rendering of that order
        sample = dataset[i]
        order = [int(text.split()[0]) for text in supervised(sample, tokenizer).split("</s>") if text.strip()]
        ids, mask = dataset._tokenise_again(i, order)
        repeat = np.where(ids == dataset.chat.image_token_id, 4, 1)
        assert np.array_equal(np.repeat(ids, repeat), sample["input_ids"])
        assert np.array_equal(np.repeat(mask, repeat), sample["labels"] != -100)


def test_long_dialogues_are_shared_out_over_samples(tokenizer, image):
    dataset = build(many(image, 4, 5), QA, tokenizer, max_turns=2, max_length=1000)
    assert len(dataset) == 12
    for number in range(3):
        dataset.set_epoch(number)
        answers = [supervised(dataset[i], tokenizer) for i in range(12)]
        assert [text.count("</s>") for text in answers] == [2, 2, 1] * 4
        said = sorted(text.strip() for answer in answers for text in answer.split("</s>") if text.strip())
        assert said == sorted(f"{k} of {i}" for i in range(4) for k in range(5)), "each question once an epoch"
    assert all(len(dataset[i]["images"]) == 1 for i in range(12))
    fixed = build(many(image, 1, 3), QA, tokenizer, max_turns=2, max_length=1000, shuffle_turns=False)
    assert [supervised(fixed[i], tokenizer).split("</s>")[0].strip() for i in range(2)] == ["0 of 0", "2 of 0"]


def test_captions_are_drawn_by_epoch(tokenizer, image):
    records = [{"image": image, "captions": [f"caption {k}" for k in range(4)]}] * 3
    dataset = build(records, {"image": "image", "caption": "captions"}, tokenizer, chat_template="plain")
    seen = set()
    for number in range(12):
        dataset.set_epoch(number)
        seen |= {supervised(dataset[i], tokenizer) for i in range(3)}
    assert seen == {f"caption {k}</s>" for k in range(4)}


def test_batches(tokenizer, image):
    other = image_bytes(random_image(9))
    records = [
        talk(None, "only text", "yes"),
        talk([image, other], "<image> and <image>\nwhat colour is the star at the left?", "red and blue"),
        talk(other, "<image>\nq?", "a"),
    ]
    dataset = build(records, TALK, tokenizer)
    transform = ImageTransform(tiny_image_processor())
    batch = ConversationCollator(tokenizer, dataset.layout)([dataset[i] for i in range(3)])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
    assert torch.equal(batch["pixel_values"], transform([image, other, other])), "in the order of their tokens"
    images = (batch["input_ids"] == dataset.chat.image_token_id).sum(1)
    assert images.tolist() == [0, 8, 4]
    padding = batch["attention_mask"] == 0
    assert (batch["input_ids"][padding] == tokenizer.pad_token_id).all() and (batch["labels"][padding] == -100).all()
    assert batch["attention_mask"].sum(1).tolist() == dataset.lengths.tolist()
    text_only = ConversationCollator(tokenizer, dataset.layout, pad_to_multiple_of=16)([dataset[0]])
    assert "pixel_values" not in text_only and text_only["input_ids"].shape[1] % 16 == 0


@pytest.mark.parametrize("style", ["messages", "llava"])
def test_from_files(tmp_path, tokenizer, style):
    records = load_records(write_conversations_jsonl(tmp_path / "talk.jsonl", 8, style))
    columns = bind_conversations(records)
    role = "messages" if style == "messages" else "conversations"
    assert columns == {role: role, "image": "image"}
    dataset = build(records, columns, tokenizer)
    assert len(dataset) == 8 and not dataset.refused
    assert supervised(dataset[0], tokenizer) in ("red</s>", "green</s>", "blue</s>", "yellow</s>")
    assert dataset[3]["images"][0].size == (32, 32)


def test_which_form_is_bound(tmp_path):
    records = load_records(write_pairs_parquet(tmp_path / "pairs.parquet", 4))
    assert bind_conversations(records) == {"question": "questions", "answer": "answers", "image": "image"}
    assert bind_conversations(records, {"caption": "captions"}) == {"caption": "captions", "image": "image"}
    with pytest.raises(ValueError, match="column 'turns' .* does not exist"):
        bind_conversations(records, {"messages": "turns"})


def test_inline_images_and_nulls_in_arrow(tokenizer, image):
    from datasets import Dataset

    inline = [{"messages": [
        {"role": "user", "content": [{"type": "image", "image": random_image(2)}, part("q?")]},
        {"role": "assistant", "content": "a"},
    ]}]  # fmt: skip
    sample = build(inline, {"messages": "messages"}, tokenizer)[0]
    assert len(sample["images"]) == 1 and sample["images"][0].size == (32, 32)
    table = Dataset.from_dict(
        {
            "image": [{"bytes": image, "path": None}, None, {"bytes": None, "path": None}],
            "questions": [["q?"]] * 3,
            "answers": [["a"]] * 3,
        }
    )
    dataset = build(table.select([2, 0, 1]), QA, tokenizer)
    assert [len(dataset[i]["images"]) for i in range(3)] == [0, 1, 0]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Every arrow data set is tokenised through a cache of its own."""
    import datasets

    from mllm_vision.data.chat import token_cache

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "_IN_MEMORY", 0)
    return tmp_path / "cache" / "mllm_vision"


def forms(image):
    """Good and bad rows of turns, rows of several questions, and captions; with their columns and settings."""
    talks = [talk(image, "<image>\nq?", "a"), talk(None, "<image>\nq?", "no image"), talk(image, "<image>\n", "b")] * 9
    captions = [{"image": image, "captions": [f"{row} {k}" for k in range(3)]} for row in range(9)]
    yield talks, TALK, {"max_length": 60}
    yield many(image, 20), QA, {"max_turns": 2, "max_length": 1000}
    yield captions, {"image": "image", "caption": "captions"}, {"chat_template": "plain"}


def test_what_is_cached_is_what_is_tokenised_in_memory(tokenizer, image, cache, monkeypatch):
    from datasets import Dataset

    from mllm_vision.data.chat.tokenise import Tokeniser

    whole = Tokeniser.__call__
    for rows, columns, options in forms(image):
        plain = build(rows, columns, tokenizer, **options)
        table = Dataset.from_list(rows)
        for _ in range(2):  # written, then found
            kept = build(table, columns, tokenizer, **options)
            assert kept.bad_samples.examples == plain.bad_samples.examples and kept.refused == plain.refused
            assert kept.lengths.tolist() == plain.lengths.tolist()
            for epoch in (0, 1):
                kept.set_epoch(epoch)
                plain.set_epoch(epoch)
                for index in range(len(plain)):
                    one, other = kept[index], plain[index]
                    assert np.array_equal(one["input_ids"], other["input_ids"]) and one["keys"] == other["keys"]
                    assert np.array_equal(one["labels"], other["labels"]) and one["index"] == other["index"]
            monkeypatch.setattr(Tokeniser, "__call__", None)  # the second time nothing is tokenised
        monkeypatch.setattr(Tokeniser, "__call__", whole)


def test_what_is_cached_is_never_stale(tokenizer, image, cache):
    from datasets import Dataset

    rows = [talk(image, "<image>\nq?", "a"), talk(image, "<image>\nq?", "b")]
    files = set()
    for change, options in (
        (rows, {}),
        ([rows[0], talk(image, "<image>\nq?", "c")], {}),  # one letter
        ([rows[1], rows[0]], {}),
        ([rows[0], talk([image, image], "<image>\nq?", "b")], {}),  # the same text, other images
        (rows, {"max_length": 127}),
        (rows, {"layout": four_tokens(tokenizer, 5)}),
        (rows, {"on_truncation": "truncate"}),
        (rows, {"chat_template": "vicuna"}),
    ):
        change = [row | {"image": row["image"] if isinstance(row["image"], list) else [row["image"]]} for row in change]
        build(Dataset.from_list(change), TALK, tokenizer, **options)
        before, files = files, {file.name for file in cache.glob("*.arrow")}
        assert len(files) == len(before) + 1


def test_processes_tokenise_once(tmp_path, tokenizer, image, run_python):
    """Two processes at once on a new cache: one file is written, and both read the same."""
    from concurrent.futures import ThreadPoolExecutor

    from datasets import Dataset

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    Dataset.from_list([talk(image, "<image>\nq?", f"answer {row}") for row in range(600)]).to_parquet(
        tmp_path / "t.parquet"
    )
    code = f"""
from transformers import AutoTokenizer
from mllm_vision.data import ConversationDataset, load_records
from mllm_vision.data.chat import token_cache, tokenise
from mllm_vision.data.images.layouts import FixedLayout
from transformers import CLIPImageProcessorPil
token_cache._IN_MEMORY = 0
count = [0]
original = tokenise.Tokeniser.__call__
def counted(self, records, first):
    count[0] += len(records)
    return original(self, records, first)
tokenise.Tokeniser.__call__ = counted
data = ConversationDataset(load_records({str(tmp_path / "t.parquet")!r}), None,
    AutoTokenizer.from_pretrained({str(tmp_path / "tokenizer")!r}), layout=FixedLayout(4, 4, CLIPImageProcessorPil()),
    max_length=128, chat_template="qa", progress=False)
print("found", count[0], len(data), int(data.lengths.sum()))
"""
    environment = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    with ThreadPoolExecutor(2) as pool:
        printed = [each.result() for each in [pool.submit(run_python, code, **environment) for _ in range(2)]]
    found = sorted(line.split() for text in printed for line in text.splitlines() if line.startswith("found"))
    assert [row[1] for row in found] == ["0", "600"] and found[0][2:] == found[1][2:]


def test_real_questions(data_dir, tokenizer):
    records = load_records(data_dir / "easyvqa_test.parquet", max_rows=100)
    dataset = build(records, bind_conversations(records), tokenizer, max_length=1024)
    assert len(dataset) == 100 and not dataset.refused and dataset._reorders
    row = records[0]
    said = [text.strip() for text in supervised(dataset[0], tokenizer).split("</s>") if text.strip()]
    assert sorted(said) == sorted(row["answers"]) and len(said) > 3
    batch = ConversationCollator(tokenizer, dataset.layout)([dataset[i] for i in range(8)])
    assert batch["pixel_values"].shape[0] == 8 and (batch["labels"] != -100).any(1).all()
