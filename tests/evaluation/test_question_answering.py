"""Questions about images: reading rows, batched generation against one by one, tables against hand counts."""

from __future__ import annotations

import pytest
import tiny
import torch
from causal_lms import tiny_causal_lm
from datasets import Dataset

from mllm_vision.data import CHAT_TEMPLATES, load_image, load_records
from mllm_vision.encoder import VisionEncoder
from mllm_vision.evaluation import QuestionAnswering
from mllm_vision.evaluation.language.generation import AnswerGenerator
from mllm_vision.evaluation.language.question_answering import read_questions
from mllm_vision.vlm import build_vlm
from mllm_vision.vlm.measure import answer as answer_one


def plain_answer(model, processor, messages, image, max_new_tokens: int) -> str:
    """transformers' own way: the processor's prompt, image tokens and pixels, generate from input ids."""
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text, images=image, return_tensors="pt", add_special_tokens=False)
    output = model.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


COLUMNS = {"image": "image", "question": "questions", "answer": "answers"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A vision-language model with random weights that still says different things about different images."""
    torch.manual_seed(0)
    tokenizer = tiny.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
    language_model = tiny.tiny_llama(len(tokenizer), initializer_range=0.4)
    model, processor = build_vlm(encoder, language_model, tokenizer=tokenizer, chat_template=CHAT_TEMPLATES["qa"])
    with torch.no_grad():
        for parameter in model.model.model.multi_modal_projector.parameters():
            parameter.mul_(20)
    return model.eval(), processor


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return load_records(str(tiny.write_pairs_parquet(tmp_path_factory.mktemp("data") / "pairs.parquet", n=7)))


def test_batched_answers_equal_one_by_one(pair, records) -> None:
    """The oracle is the processor's own path: its image tokens, its pixels, generate from input ids, no padding."""
    model, processor = pair
    images = [load_image(records[row]["image"]) for row in range(4)]
    asked = [(row, text) for row in range(4) for text in ("what?", "how many big red circles are there in it?", "why")]
    generator = AnswerGenerator(model, processor, batch_size=5, max_new_tokens=6)
    expected = []
    for row, text in asked:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        expected.append(plain_answer(model, processor, messages, images[row], 6))
        assert answer_one(model, processor, messages, [images[row]], max_new_tokens=6) == expected[-1]
    answers = generator.answer(images, asked)
    assert answers == expected
    assert len(set(answers)) > 3  # otherwise the comparison would say nothing


def test_every_image_is_encoded_once(pair, records, monkeypatch) -> None:
    model, processor = pair
    seen = []
    inner = model.image_tokens
    monkeypatch.setattr(model, "image_tokens", lambda pixels: seen.append(len(pixels["pixel_values"])) or inner(pixels))
    QuestionAnswering("vqa", records, COLUMNS, processor, batch_size=3, max_new_tokens=2)(model, 0)
    assert sum(seen) == len(records)


def test_blind_answers_do_not_depend_on_the_image(pair, records) -> None:
    model, processor = pair
    generator = AnswerGenerator(model, processor, batch_size=4, max_new_tokens=6, blind=True)
    images = [load_image(records[row]["image"]) for row in range(3)]
    answers = generator.answer(images, [(0, "what?"), (1, "what?"), (2, "what?")])
    assert len(set(answers)) == 1
    pixels = torch.zeros(1, 3, 32, 32)
    assert torch.equal(
        generator.image_features(images)[1], model.model.get_image_features(pixel_values=pixels).pooler_output[0]
    )


def test_figures_against_hand_counts(pair, records, monkeypatch) -> None:
    model, processor = pair
    said = {"what colour is the circle?": "Red.", "what shape is there?": "a square"}
    monkeypatch.setattr(
        AnswerGenerator, "answer", lambda self, images, asked: [said.get(text, "nothing") for _, text in asked]
    )
    evaluator = QuestionAnswering("vqa", records, COLUMNS, processor, no_image_baseline=True)
    result = evaluator.examine(model)
    metrics = result.metrics
    # Images 0-3 are circles in red, green, blue, yellow; 4-6 squares: each asked for its colour and its shape.
    answers = [(q, a, t) for row in records for q, a, t in zip(row["questions"], row["answers"], row["question_types"])]
    right = [said.get(q, "nothing").lower().strip(". ").removeprefix("a ") == a for q, a, _ in answers]
    assert metrics["count"] == len(answers) == 14
    assert metrics["accuracy"] == pytest.approx(sum(right) / 14)
    for kind in ("colour", "shape"):
        ours = [r for r, (_, _, t) in zip(right, answers) if t == kind]
        assert metrics[f"accuracy_{kind}"] == pytest.approx(sum(ours) / 7)
    shapes = [a for _, a, t in answers if t == "shape"]
    colours = [a for _, a, t in answers if t == "colour"]
    best = max(shapes.count(s) for s in shapes) + max(colours.count(c) for c in colours)
    assert result.baselines["majority_by_type"]["accuracy"] == pytest.approx(best / 14)
    everything = [a for _, a, _ in answers]
    assert result.baselines["majority"]["accuracy"] == pytest.approx(max(map(everything.count, everything)) / 14)
    assert result.baselines["no_image"]["accuracy"] == metrics["accuracy"]
    table = {row["name"]: row for row in result.tables["question_type"]}
    assert table["shape"]["count"] == 7 and table["shape"]["majority_answer"] == max(set(shapes), key=shapes.count)
    assert {sample["correct"] for sample in result.samples} == {True, False}
    assert all(sample["image"].startswith("data:image/png") for sample in result.samples)


def test_a_question_that_makes_no_prompt_is_counted_and_the_others_are_asked(pair, caplog) -> None:
    model, processor = pair
    asked = ["what?", "where is the <image> here?", "why " * 300]
    rows = [{"image": tiny.random_image(row), "question": text, "answer": "red"} for row, text in enumerate(asked)]
    columns = {"image": "image", "question": "question", "answer": "answer"}
    metrics = QuestionAnswering("vqa", Dataset.from_list(rows), columns, processor, max_new_tokens=2)(model, 0)
    assert (metrics["count"], metrics["skipped"]) == (1.0, 2.0)
    assert "row 1" in caplog.text and "row 2" in caplog.text and "max_new_tokens" in caplog.text


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "gemma3_text", "falcon_h1"])
def test_batched_answers_of_other_families(family, records, tmp_path) -> None:
    """Learned positions, ALiBi, sliding windows and recurrent layers under padding: each alone is the oracle."""
    tokenizer = tiny.tiny_tokenizer(tmp_path)
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
    torch.manual_seed(0)
    llm = tiny_causal_lm(family, initializer_range=0.4, tie_word_embeddings=False)
    model, processor = build_vlm(encoder, llm, tokenizer=tokenizer, chat_template=CHAT_TEMPLATES["qa"])
    with torch.no_grad():
        for parameter in model.model.model.multi_modal_projector.parameters():
            parameter.mul_(20)
    images = [load_image(records[row]["image"]) for row in range(3)]
    asked = [(row, text) for row in range(3) for text in ("what?", "how many big red circles are there in it?")]
    answers = AnswerGenerator(model, processor, batch_size=6, max_new_tokens=5).answer(images, asked)
    one = AnswerGenerator(model, processor, batch_size=1, max_new_tokens=5)
    assert answers == [one.answer([images[row]], [(0, text)])[0] for row, text in asked]
    assert len(set(answers)) > 1


def test_majority_from_training_answers(pair, records) -> None:
    _, processor = pair
    evaluator = QuestionAnswering(
        "vqa", records, COLUMNS, processor, training_answers=[("colour", "mauve")] * 9 + [("shape", "circle")]
    )
    assert evaluator.majority.guess() == "mauve" and evaluator.majority.guess("shape") == "circle"
    assert (
        QuestionAnswering("vqa", records, COLUMNS, processor, training_answers=records).majority_from == "training set"
    )


def test_read_questions_of_every_form() -> None:
    one = Dataset.from_dict({"question": ["q?"], "answer": ["yes"]})
    columns = {"question": "question", "answer": "answer"}
    assert [(q.text, q.answers, q.kind, q.annotated) for q in read_questions(one, columns, None)] == [
        ("q?", ("yes",), "all", False)
    ]
    vqa = Dataset.from_dict({"question": ["q?"], "answer": [["yes", "no", "yes"]], "kind": ["y/n"]})
    assert read_questions(vqa, columns, "kind")[0].answers == ("yes", "no", "yes")
    raw = Dataset.from_dict({"question": ["q?"], "answer": [[{"answer": "yes"}, {"answer": "no"}]]})
    assert read_questions(raw, columns, None)[0].answers == ("yes", "no")
    many = Dataset.from_dict({"question": [["a?", "b?"]], "answer": [["1", "2"]], "kind": [["x", "y"]]})
    assert [(q.text, q.answers, q.kind) for q in read_questions(many, columns, "kind")] == [
        ("a?", ("1",), "x"),
        ("b?", ("2",), "y"),
    ]
    with pytest.raises(ValueError, match="row 0: questions and answers differ in number: 2 and 1"):
        read_questions(Dataset.from_dict({"question": [["a", "b"]], "answer": [["1"]]}), columns, None)
    with pytest.raises(ValueError, match="row 0: a question or an answer is empty"):
        read_questions(Dataset.from_dict({"question": ["a"], "answer": [[]]}), columns, None)


def test_questions_are_judged_and_put_as_in_training() -> None:
    from datasets import ClassLabel, Features, Value

    features = Features({"question": Value("string"), "answer": ClassLabel(names=["no", "yes"])})
    named = Dataset.from_dict({"question": ["a?", "b?", None], "answer": [1, 0, 1]}, features=features)
    columns = {"question": "question", "answer": "answer"}
    refused: dict = {}
    assert [q.answers for q in read_questions(named, columns, None, refused=refused)] == [("yes",), ("no",)]
    assert list(refused) == [2] and refused[2].reason == "a question or an answer is empty"
    rows = [
        {"image": ["a.png"], "instruction": "name it", "input": "in one word", "output": 3.0, "system": ""},
        {"image": ["a.png", "b.png"], "instruction": "same?", "input": None, "output": "no", "system": None},
        {"image": ["a.png", None], "instruction": "name it", "input": "", "output": "x", "system": "be brief"},
    ]
    bound = {"image": "image", "question": "instruction", "answer": "output", "input": "input", "system": "system"}
    for records in (rows, Dataset.from_list([row | {"output": str(row["output"])} for row in rows])):
        refused = {}
        [asked] = read_questions(records, bound, None, refused=refused)
        assert asked.text == "name it\nin one word" and asked.answers in (("3",), ("3.0",))
        assert [bad.reason for bad in refused.values()] == [
            "the question is about several images", "the question has a system turn or a history",
        ]  # fmt: skip


def test_bad_input(pair, records) -> None:
    model, processor = pair
    with pytest.raises(ValueError, match="needs the model's processor"):
        QuestionAnswering("vqa", records, COLUMNS)
    with pytest.raises(ValueError, match="'reply' .* is not in the data"):
        QuestionAnswering("vqa", records, {**COLUMNS, "answer": "reply"}, processor)
    template, processor.chat_template = processor.chat_template, None
    own, processor.tokenizer.chat_template = processor.tokenizer.chat_template, None
    try:
        with pytest.raises(ValueError, match="no chat template"):
            QuestionAnswering("vqa", records, COLUMNS, processor)(model, 0)
    finally:
        processor.chat_template, processor.tokenizer.chat_template = template, own
