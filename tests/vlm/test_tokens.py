"""What a generation starts from and where it stops: one prompt for training, evaluation and chat, every end known."""

from __future__ import annotations

import itertools
import json
import logging

import pytest
import tiny
import torch

TURN = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + END }}{% endgeneration %}{% else %}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ROLES = ["<|user|>", "<|assistant|>", "<|end|>"]


def with_end(end: str) -> str:
    return TURN.replace("END", end)


@pytest.fixture
def join(tokenizer_folder):
    """`join(template, own_ends, bos=False)` -> model and processor of a language model with roles as tokens."""
    from transformers import AutoTokenizer

    from mllm_vision.encoder import VisionEncoder
    from mllm_vision.vlm import build_vlm

    def make(template, own_ends=None, bos=False):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, add_bos_token=bos)
        tokenizer.add_tokens(ROLES, special_tokens=True)
        llm = tiny.tiny_llama(len(tokenizer))
        if own_ends is not None:
            llm.generation_config.eos_token_id = own_ends
        encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
        return build_vlm(encoder, llm, tokenizer=tokenizer, chat_template=template)

    return make


@pytest.mark.parametrize("end", ["'<|end|>'", "'<|end|>\n'", "'. <|end|>'"])
def test_the_end_of_a_turn_stops_generation_here_and_in_the_export(join, tmp_path, end):
    from transformers import LlavaForConditionalGeneration

    from mllm_vision.vlm import answer, save_vlm

    model, processor = join(with_end(end), own_ends=[3, 77, 400])
    tokenizer = processor.tokenizer
    own, turn = tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>"])
    assert own == 400 and tokenizer.decode([77]).strip().isprintable()
    # the tokenizer's, the language model's, the template's; 77 is an ordinary word, which ends nothing
    assert model.model.generation_config.eos_token_id == [3, own, turn]
    save_vlm(model, processor, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [3, own, turn]
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()

    said = itertools.cycle([60, turn])

    def say(module, _, logits):  # one word, then the end of the turn
        logits[..., next(said)] = 1e4
        return logits

    for each in (model.model, plain):
        each.get_output_embeddings().register_forward_hook(say)
    ids = torch.randint(100, 200, (1, 9))
    assert plain.generate(input_ids=ids, max_new_tokens=9, do_sample=False)[0, 9:].tolist() == [60, turn]
    question = [{"role": "user", "content": "what is it"}]
    assert answer(model, processor, question, max_new_tokens=9) == processor.tokenizer.decode([60]).strip()


def test_a_space_that_belongs_to_the_answer_is_warned_about(join, caplog):
    with caplog.at_level(logging.WARNING, logger="mllm_vision"):
        join(PARTS)
    assert "put the space after {% generation %}" in caplog.text


UNLEARNT = TURN.replace(" + END }}{% endgeneration %}", " }}{% endgeneration %}{{ '<|end|>' }}")
UNMARKED = with_end("'<|end|>'").replace("{% generation %}", "").replace("{% endgeneration %}", "")
IMAGES_ONLY = "{% if m['content'] is string and m['role'] == 'user' %}{{ raise_exception('no image') }}{% endif %}"


def test_templates_that_say_little_of_ends(join, caplog, tmp_path):
    """An end outside the marks stops and is warned about; without marks, or text alone, a template says nothing."""
    from mllm_vision.vlm import answer, load_vlm, save_vlm

    with caplog.at_level(logging.WARNING, logger="mllm_vision"):
        model, processor = join(UNLEARNT)
    end = processor.tokenizer.convert_tokens_to_ids("<|end|>")
    assert (
        model.model.generation_config.eos_token_id == [3, end]
        and "do not end with a special token that is trained on" in caplog.text
    )
    caplog.clear()
    refusing = with_end("'<|end|>'").replace("{{ '<|' + m", IMAGES_ONLY + "{{ '<|' + m")
    assert "raise_exception" in refusing
    for number, template in enumerate((UNMARKED, refusing)):
        with caplog.at_level(logging.WARNING, logger="mllm_vision"):
            model, processor = join(template)
            save_vlm(model, processor, tmp_path / str(number))
            model, processor = load_vlm(tmp_path / str(number))
        assert model.model.generation_config.eos_token_id == 3 and not caplog.text
        question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]}]
        assert isinstance(answer(model, processor, question, [tiny.random_image()], max_new_tokens=2), str)


def test_a_template_without_an_end_is_warned_about(join, caplog):
    with caplog.at_level(logging.WARNING, logger="mllm_vision"):
        model, _ = join(with_end("' ###'"))
    assert "do not end with a special token" in caplog.text and model.model.generation_config.eos_token_id == 3


def _imaged(content):
    image = {"type": "image", "image": tiny.random_image()}
    return content if isinstance(content, str) else [image if part["type"] == "image" else part for part in content]


# As llava-hf writes them: strings have no parts, and so no words. As language models come: parts are no strings.
PARTS = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for part in m['content'] | selectattr('type', 'equalto', "
    "'image') %}{{ '<image>\\n' }}{% endfor %}{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ part['text'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
WORDS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>' }}{% generation %}"
    "{{ m['content'] | trim + '<|end|>' }}{% endgeneration %}{% else %}{{ '<|user|>' + m['content'] | trim }}"
    "{{ '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEMPLATES = {"roles": with_end("'<|end|>'"), "parts": PARTS, "words": WORDS}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", ["vicuna", "qa", "plain", *TEMPLATES])
def test_one_prompt_for_training_evaluation_and_chat(join, name, bos, monkeypatch):
    """Without the answer a training sample is the prompt, whether tokenizer or template begin with <s>."""
    from mllm_vision.data import CHAT_TEMPLATES
    from mllm_vision.data.chat.messages import from_pairs
    from mllm_vision.data.chat.templates import ChatTokenizer
    from mllm_vision.evaluation.language.generation import AnswerGenerator
    from mllm_vision.vlm import answer

    model, processor = join(CHAT_TEMPLATES.get(name) or TEMPLATES[name], bos=bos)
    asked = [("what colour is the star?", "blue"), ("how many stars are there?", "3")]
    seen, place = [], model.config.image_token_id

    def spy(input_ids, *more, **options):
        seen.append([int(token) for token in input_ids[0]])
        return torch.cat([input_ids, torch.tensor([[3]])], dim=1)

    monkeypatch.setattr(model, "generate", spy)
    # plain has no words between two answers; with a space before it "3" begins otherwise than words do
    for turns in (1,) if name in ("plain", "parts") else (1, 2):
        dialogue = from_pairs(asked[:turns], 1)
        [(ids, mask)] = ChatTokenizer(processor.tokenizer, processor.chat_template)([dialogue])
        last = max(i for i in range(len(mask)) if mask[i] and not mask[i - 1])  # where the last answer begins
        expected = ids[:last].tolist()
        assert answer(model, processor, dialogue[:-1], [tiny.random_image()]) == ""
        assert [t for i, t in enumerate(seen[-1]) if t != place or seen[-1][i - 1] != place] == expected
        assert seen[-1].count(place) == model.config.image_seq_length
        if turns == 1:
            generator = AnswerGenerator(model, processor, batch_size=1, max_new_tokens=2)
            assert generator.prompt(asked[0][0], [(32, 32)]).tolist() == seen[-1]
        if name not in ("words", "parts"):  # what the export does by itself in plain transformers
            talk = [{**turn, "content": _imaged(turn["content"])} for turn in dialogue[:-1]]
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            assert processor.apply_chat_template(talk, **options)["input_ids"][0] == seen[-1]
    assert bos is False or expected[0] == processor.tokenizer.bos_token_id
