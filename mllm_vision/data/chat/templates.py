"""Chat templates, and conversations as token ids with the assistant's tokens marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mllm_vision.data.chat.messages import BadConversation
from mllm_vision.data.chat.prompts import beginning, has_marks, render
from mllm_vision.data.text_length import most_characters
from mllm_vision.errors import short

_OTHER = "choose another --chat_template, or leave the row out"

# The images of a message in their order; templates differ in the text around them. In a string, which is what
# lmms-eval gives ("<image>\nquestion"), they are marks.
_IMAGES = (
    "{% if m['content'] is string %}{{ '<image>' * (m['content'].split('<image>') | length - 1) }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<image>' }}{% endif %}{% endfor %}{% endif %}"
)
_TEXT = (
    "{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
)
_ASKED = _TEXT.replace("m['content'] | trim", "m['content'] | replace('<image>', '') | trim")  # without these marks
_ORDERED = (
    "{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] | trim }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endif %}{% endfor %}{% endif %}"
)
_ANSWER = "{% generation %}{{ ' ' }}" + _TEXT + "{{ eos_token }}{% endgeneration %}"
_START = "{{ bos_token }}{% for m in messages %}"

CHAT_TEMPLATES: dict[str, str] = {
    # Stage one: the image, then the caption, and no other text. The space matters: after a special token
    # sentencepiece and GPT-2 know "there" as a word only with one before it (otherwise it is "t" "he" "re").
    "plain": _START
    + "{% if m['role'] == 'assistant' %}"
    + _ANSWER
    + "{% else %}"
    + _IMAGES
    + "{% endif %}{% endfor %}",
    # LLaVA 1.5: the prompt ends without a space, and the answer begins with one.
    "vicuna": _START
    + "{% if m['role'] == 'assistant' %}{{ 'ASSISTANT:' }}"
    + _ANSWER
    + "{% elif m['role'] == 'system' %}"
    + _TEXT
    + "{{ ' ' }}{% else %}{{ 'USER: ' }}"
    + _ORDERED
    + "{{ ' ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    # As PaliGemmaProcessor writes a prompt; the answer follows the line break.
    "paligemma": "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
    + _TEXT
    + "{{ eos_token }}{% endgeneration %}{% else %}"
    + _IMAGES
    + "{% if loop.first %}{{ bos_token }}{% endif %}"
    + _ASKED
    + "{{ '\n' }}{% endif %}{% endfor %}",
    # As Blip2Processor writes a prompt, with the words of BLIP-2's question answering; captions have no question.
    "blip2": "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    + _ANSWER
    + "{% else %}"
    + _IMAGES
    + "{% if loop.first %}{{ bos_token }}{% endif %}{% set text %}"
    + _ASKED
    + "{% endset %}{% if text %}{{ 'Question: ' + text + ' Answer:' }}{% endif %}{% endif %}{% endfor %}",
    # Short, for small language models with lower-case vocabularies.
    "qa": _START
    + "{% if m['role'] == 'assistant' %}{{ 'answer:' }}"
    + _ANSWER
    + "{% elif m['role'] == 'system' %}"
    + _TEXT
    + "{{ ' ' }}{% else %}"
    + _IMAGES
    + "{% set text %}"
    + _ASKED
    + "{% endset %}{% if text %}{{ ' question: ' + text + ' ' }}{% endif %}"
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'answer:' }}{% endif %}",
}


class Rendered(NamedTuple):
    """A rendered conversation: (start, end) of the supervised spans, and how many characters were cut off."""

    text: str
    spans: list[tuple[int, int]]
    cut: int


class ChatTokenizer:
    """Messages to token ids and a mask of the assistant's tokens, through a chat template's generation marks.

    Args:
        tokenizer: a fast tokenizer that has `image_token` as one token, and an end-of-text token.
        chat_template: a name in `CHAT_TEMPLATES`, a Jinja text, or None for the tokenizer's own.
        image_token: appears once for every image in the template's output.

    Raises:
        ValueError: no template, no generation marks, no such token, a tokenizer without character offsets.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None, image_token: str = "<image>") -> None:
        self.tokenizer, self.image_token = tokenizer, image_token
        template = CHAT_TEMPLATES.get(chat_template or "", chat_template) or getattr(tokenizer, "chat_template", None)
        names = ", ".join(map(repr, CHAT_TEMPLATES))
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise ValueError(
                f"{type(tokenizer).__name__} has no chat template; choose one of {names} or pass a Jinja text"
            )
        if not has_marks(template):
            raise ValueError(
                "the chat template has no generation marks, so the assistant's tokens cannot be identified: "
                "put {% generation %} ... {% endgeneration %} around what the assistant says, "
                f"or choose one of {names}"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} gives no character offsets, which the label mask needs; "
                "load the fast tokenizer (AutoTokenizer.from_pretrained)"
            )
        if tokenizer.eos_token is None:
            raise ValueError(f"{type(tokenizer).__name__} has no end token (eos_token), so answers would never end")
        token_id = tokenizer.convert_tokens_to_ids(image_token)
        if token_id is None or token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"{image_token!r} is not a token of {type(tokenizer).__name__}; add it "
                f"(tokenizer.add_special_tokens({{'additional_special_tokens': [{image_token!r}]}})) and resize the "
                "language model's embeddings, as build_vlm does"
            )
        if tokenizer(f"a{image_token}b", add_special_tokens=False)["input_ids"].count(token_id) != 1:
            raise ValueError(f"{image_token!r} is not read as one token inside text; add it as a special token")
        self.template, self.image_token_id = template, int(token_id)

    def turns(self, tokens: np.ndarray, mask: np.ndarray) -> tuple[int, list[tuple[int, int]]]:
        """The spans of the turns of a tokenised dialogue: the length of what precedes the first question (beginning
        and images), and (start, end) of every question with its complete answer."""
        images = np.flatnonzero(tokens == self.image_token_id)
        prefix = int(images[-1]) + 1 if len(images) else int(tokens[0] == self.tokenizer.bos_token_id)
        last = np.flatnonzero(mask & ~np.append(mask[1:], False))
        turns, start = [], prefix
        for end in last:
            if tokens[end] == self.tokenizer.eos_token_id:
                turns.append((start, int(end) + 1))
            start = int(end) + 1
        return prefix, turns

    def __call__(self, conversations: Sequence[Sequence[dict[str, Any]]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids int32 `[T]`, mask bool `[T]`) for each conversation; one image token per image.

        Raises:
            BadConversation: template or tokenizer refuse one of them.
        """
        rendered = [self.render(conversation) for conversation in conversations]
        return [encoded if isinstance(encoded, tuple) else _raise(encoded) for encoded in self.encode(rendered)]

    def render(self, conversation: Sequence[dict[str, Any]], max_length: int | None = None) -> Rendered:
        """A conversation rendered by the template, cut where it has more than `max_length` tokens for certain.

        Raises:
            BadConversation: the template refuses it (roles that do not alternate, a system turn it has no place for),
                or fails on it; or answers without supervision, where the template does not mark each by itself.
        """
        try:
            text, spans = render(self.template, conversation, self.tokenizer, self.image_token)
        except Exception as error:  # a template is a program of its own, and fails on messages as it likes
            said = f"{error}" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: {error}"
            raise BadConversation("the chat template refuses the conversation", f"{short(said)}; {_OTHER}") from error
        answers = [turn for turn in conversation if turn["role"] == "assistant"]
        if any(turn.get("supervised") is False for turn in answers):
            if len(spans) != len(answers):
                raise BadConversation(
                    "the chat template does not mark each answer by itself",
                    f"{len(spans)} marks for {len(answers)} answers, some of which are not supervised; {_OTHER}",
                )
            spans = [span for span, turn in zip(spans, answers, strict=True) if turn.get("supervised") is not False]
        most = len(text) if max_length is None else most_characters(self.tokenizer, max_length)
        return Rendered(text[:most], spans, max(0, len(text) - most))

    def encode(self, rendered: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray] | BadConversation]:
        """What `render` gave as (ids int32 `[T]`, mask bool `[T]`), or why the tokenizer refuses it."""
        if not rendered:
            return []
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        try:
            encoded = self.tokenizer([each.text for each in rendered], **options)
        except Exception as error:  # half of a surrogate pair, for one; which of them it is shows one by one
            if len(rendered) > 1:
                return [found for each in rendered for found in self.encode([each])]
            said = f"{type(error).__name__}: {short(str(error))}"
            return [BadConversation("the text cannot be tokenised", f"{said}: {short(rendered[0].text, 80)}")]
        return [
            self._marked(each, np.asarray(ids, dtype=np.int32), np.asarray(offsets, dtype=np.int64).reshape(-1, 2))
            for each, ids, offsets in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]

    def _marked(self, rendered: Rendered, tokens: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mask = np.zeros(len(tokens), dtype=bool)
        for start, end in rendered.spans:
            mask |= (places[:, 1] > start) & (places[:, 0] < end)
        if before := beginning(self.tokenizer, rendered.text):
            tokens = np.concatenate([before, tokens]).astype(np.int32)
            mask = np.concatenate([[False] * len(before), mask])
        return tokens, mask & (tokens != self.image_token_id)


def _raise(error: BadConversation) -> Any:
    raise error
