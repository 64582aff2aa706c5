"""The beginning of an answer: one way to put a question into token ids, for training, evaluation and chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def beginning(tokenizer: Any, text: str) -> list[int]:
    """What goes before the ids of a rendered conversation: the beginning-of-text token where it is missing.

    As LlavaProcessor does: a beginning the template leaves out is added where the tokenizer adds one by itself.
    """
    bos = tokenizer.bos_token_id
    if bos is None or text.startswith(tokenizer.bos_token):
        return []
    return [bos] if tokenizer("")["input_ids"][:1] == [bos] else []


def chat_template_of(processor: Any) -> str | None:
    """The template of a processor, or else of its tokenizer; of several the one named "default"."""
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def prompt_text(processor: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """``messages`` through the chat template, ready for the answer to begin.

    Contents take the form that they have in training (``data.messages``): a string unless an image stands in them.

    Raises:
        ValueError: no chat template.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    template = chat_template_of(processor)
    if not template:
        raise ValueError("the processor has no chat template, so a question cannot be put; see CHAT_TEMPLATES")
    [text], _ = render_jinja_template(
        conversations=[[{**message, "content": _content(message["content"])} for message in messages]],
        chat_template=template,
        add_generation_prompt=True,
        **processor.tokenizer.special_tokens_map,
    )
    return text


def prompt_ids(processor: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of a prompt, one image token for each image: how a training sample of these messages begins."""
    text = prompt_text(processor, messages)
    tokenizer = processor.tokenizer
    return [*beginning(tokenizer, text), *tokenizer(text, add_special_tokens=False)["input_ids"]]


def _content(content: Any) -> Any:
    if isinstance(content, str) or any(part.get("type") == "image" for part in content):
        return content
    return "\n".join(part["text"] for part in content)
