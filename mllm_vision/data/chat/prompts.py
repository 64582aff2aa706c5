"""How messages reach a chat template, and the beginning of an answer: one way for training, evaluation and chat."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

IMAGE = {"type": "image"}
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SAID = ("probe-one", "probe-two", "probe-three", "probe-four")


def beginning(tokenizer: Any, text: str) -> list[int]:
    """What goes before the ids of a rendered conversation: the beginning-of-text token where it is missing.

    As LlavaProcessor does: a beginning the template leaves out is added where the tokenizer adds one by itself. Some
    templates put it after the images (PaliGemma, BLIP-2).
    """
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer.bos_token in text:
        return []
    return [bos] if tokenizer("")["input_ids"][:1] == [bos] else []


def chat_template_of(processor: Any) -> str | None:
    """The template of a processor, or else of its tokenizer; of several the one named "default"."""
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def has_marks(template: str | None) -> bool:
    """Whether a template has ``{% generation %}`` marks around the supervised text."""
    return template is not None and _MARKS.search(template) is not None


def parts_of(content: Any) -> list[dict[str, Any]]:
    """A message's content as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _mixed(content: Any, image_token: str) -> Any:
    """A string, unless it contains an image: what most templates expect."""
    parts = parts_of(content)
    return parts if any(part["type"] == "image" for part in parts) else "\n".join(part["text"] for part in parts)


def _listed(content: Any, image_token: str) -> Any:
    """Always a list of parts (the templates of llava-hf ignore strings)."""
    return parts_of(content)


def _written(content: Any, image_token: str) -> Any:
    """Always a string, images as the image token (templates of language models, which know no parts)."""
    return "\n".join(image_token if part["type"] == "image" else part["text"] for part in parts_of(content))


def render(
    template: str, messages: Sequence[Mapping[str, Any]], tokenizer: Any, image_token: str, **options: Any
) -> tuple[str, list[tuple[int, int]]]:
    """``messages`` through ``template``: the text, and the (start, end) of what its generation marks enclose.

    Contents may be strings or lists of parts; the template gets the form that it reads. ``options`` are the template's
    own (``add_generation_prompt``). Raises whatever the template raises.
    """
    tokens = tokenizer.special_tokens_map.items()
    names = tuple(sorted((name, str(token)) for name, token in tokens if not isinstance(token, list)))
    form = _form(template, image_token, names)
    return _rendered(template, messages, form, image_token, names, **options)


def _rendered(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    form: Callable[[Any, str], Any],
    image_token: str,
    names: tuple[tuple[str, str], ...],
    **options: Any,
) -> tuple[str, list[tuple[int, int]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [{"role": turn["role"], "content": form(turn["content"], image_token)} for turn in messages]
    marked = has_marks(template)
    settings: dict[str, Any] = {**dict(names), **options, "return_assistant_tokens_mask": marked}
    found: Any = render_jinja_template(conversations=[turns], chat_template=template, **settings)
    texts, spans = found
    return texts[0], spans[0] if marked else []


@lru_cache(maxsize=32)
def _form(template: str, image_token: str, names: tuple[tuple[str, str], ...]) -> Callable[[Any, str], Any]:
    """The form of contents of which the template shows most: tried on a dialogue of four turns with an image."""
    said = [[IMAGE, {"type": "text", "text": _SAID[0]}], *_SAID[1:]]
    dialogue = [{"role": ("user", "assistant")[turn % 2], "content": content} for turn, content in enumerate(said)]

    def shown(form: Callable[[Any, str], Any]) -> int:
        try:
            text, _ = _rendered(template, dialogue, form, image_token, names)
        except Exception:  # a template is a program of its own: what it cannot read it may fail on as it likes
            return -1
        if "'type'" in text:  # a list printed verbatim
            return -1
        return sum(text.count(word) == 1 for word in (*_SAID, image_token))

    return max((_mixed, _listed, _written), key=shown)


def prompt_text(processor: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """``messages`` through the chat template, ready for the answer to begin.

    Raises:
        ValueError: no chat template.
    """
    template = chat_template_of(processor)
    if not template:
        raise ValueError("the processor has no chat template, so a prompt cannot be built; see CHAT_TEMPLATES")
    image_token = str(getattr(processor, "image_token", "<image>"))
    return render(template, messages, processor.tokenizer, image_token, add_generation_prompt=True)[0]


def prompt_ids(processor: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of a prompt, one image token for each image: how a training sample of these messages begins."""
    text = prompt_text(processor, messages)
    return [*beginning(processor.tokenizer, text), *tokens_before_answer(processor.tokenizer, text)]


def tokens_before_answer(tokenizer: Any, prompt: str) -> list[int]:
    """Ids of a prompt up to where the answer's first token begins.

    A space at the end of a prompt belongs to that token ("▁red"), as training has it, and is left to the model.
    """
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not prompt[-1:].isspace() or not getattr(tokenizer, "is_fast", False):
        return ids
    with_answer = tokenizer(f"{prompt}a", add_special_tokens=False, return_offsets_mapping=True)
    offsets = with_answer["offset_mapping"]
    kept = next((place for place, (_, end) in enumerate(offsets) if end > len(prompt)), len(offsets))
    same = with_answer["input_ids"][:kept] == ids[:kept]
    return ids[:kept] if same and not tokenizer.decode(ids[kept:]).strip() else ids
