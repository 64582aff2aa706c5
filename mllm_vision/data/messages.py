"""Conversations of every common form, as one list of Hugging Face `messages`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from .sampling import BadRow

IMAGE_MARK = "<image>"
_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
}


class BadConversation(BadRow):
    """A conversation that cannot be trained on."""


def to_messages(record: dict[str, Any], columns: dict[str, str], *, choice: int = 0) -> list[dict[str, Any]]:
    """A record as `messages`: [{"role", "content"}], content a string or a list of image and text parts.

    Args:
        record: one row.
        columns: role -> column. The first of these that is there is read:
            "messages" (role/content; content a string, in which `<image>` may stand, or a list of parts),
            "conversations" (LLaVA: from/value with `<image>` in the text),
            "question" with "answer" (strings, or lists: several questions on one picture become one dialogue;
            several answers to one question give the most frequent one),
            "caption" (the picture alone is the question; `choice` picks among several).
        choice: which of several captions, modulo their number.

    Raises:
        BadConversation: (a ValueError) for an empty, malformed or unpaired conversation.
    """
    count = len(record_images(record, columns))
    if "messages" in columns or "conversations" in columns:
        return _from_turns(record[columns.get("messages") or columns["conversations"]])
    if "question" in columns and "answer" in columns:
        return from_pairs(question_pairs(record, columns), count)
    if "caption" in columns:
        captions = caption_texts(record, columns)
        return from_caption(captions[choice % len(captions)], count)
    raise ValueError(
        f"columns={columns} name no conversation: bind 'messages', 'conversations', "
        "'question' and 'answer', or 'caption'"
    )


def record_images(record: dict[str, Any], columns: dict[str, str]) -> list[Any]:
    """The record's pictures, undecoded: of the image column (one, a list or none), or inside the messages."""
    turns = record.get(columns["messages"]) if "messages" in columns else None
    inline = [
        found
        for turn in turns or []
        if isinstance(turn, dict) and isinstance(turn.get("content"), list | tuple)
        for part in turn["content"]
        if isinstance(part, dict)
        and part.get("type") in ("image", "image_url")
        and (found := _inline(part)) is not None
    ]
    if inline:
        return inline
    value = record.get(columns["image"]) if "image" in columns else None
    values = value if isinstance(value, list | tuple) else [value]
    return [each for each in values if not _missing(each)]


def _inline(part: dict[str, Any]) -> Any:
    return next((part[name] for name in ("image", "path", "url", "image_url") if part.get(name) is not None), None)


def _missing(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("bytes") is None and not value.get("path")
    return value is None or (isinstance(value, str) and value == "")


def from_caption(caption: str, image_count: int) -> list[dict[str, Any]]:
    """The pictures alone as the question, the caption as the answer."""
    return [
        {"role": "user", "content": [{"type": "image"}] * image_count},
        {"role": "assistant", "content": caption},
    ]


def from_pairs(pairs: Sequence[tuple[str, str]], image_count: int) -> list[dict[str, Any]]:
    """Questions and answers in this order, the pictures before the first question."""
    messages: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(pairs):
        content: Any = question
        if number == 0 and image_count:
            content = [{"type": "image"}] * image_count + [{"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def caption_texts(record: dict[str, Any], columns: dict[str, str]) -> list[str]:
    """The captions that have words; BadConversation when there are none."""
    value = record[columns["caption"]]
    texts = value if isinstance(value, list | tuple) else [value]
    captions = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if not captions:
        raise BadConversation("the caption is empty")
    return captions


def question_pairs(record: dict[str, Any], columns: dict[str, str]) -> list[tuple[str, str]]:
    """(question, answer) pairs of a row; BadConversation when they do not pair up or have no words."""
    questions, answers = record[columns["question"]], record[columns["answer"]]
    if not isinstance(questions, list | tuple):
        questions, answers = [questions], [answers]
    if not isinstance(answers, list | tuple):
        answers = [answers]
    if len(questions) != len(answers):
        raise BadConversation("questions and answers differ in number", f"{len(questions)} and {len(answers)}")
    pairs = [(_words(question), _consensus(answer)) for question, answer in zip(questions, answers, strict=True)]
    if not pairs:
        raise BadConversation("the conversation is empty")
    for question, answer in pairs:
        if not question or not answer:
            raise BadConversation("a question or an answer is empty", f"{question!r} -> {answer!r}")
    return pairs


def _words(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("answer", value.get("text"))
    return "" if value is None else str(value).strip()


def _consensus(value: Any) -> str:
    """The most frequent of several answers (VQA has ten a question); the first one where they tie."""
    if not isinstance(value, list | tuple):
        return _words(value)
    counted = Counter(words for each in value if (words := _words(each)))
    return counted.most_common(1)[0][0] if counted else ""


def _from_turns(turns: Any) -> list[dict[str, Any]]:
    if isinstance(turns, dict):  # a struct of lists, as older data sets store a list of structs
        names = ("role", "content") if "role" in turns else ("from", "value")
        if not all(isinstance(turns.get(name), list | tuple) for name in names):
            raise BadConversation("the conversation is malformed", f"{str(turns)[:120]}")
        turns = [dict(zip(names, values, strict=False)) for values in zip(*(turns[n] for n in names), strict=False)]
    if not isinstance(turns, list | tuple) or not turns:
        raise BadConversation("the conversation is empty")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadConversation("the conversation is malformed", f"a turn is {type(turn).__name__}, not a dict")
        said = turn.get("role") or turn.get("from")
        role = _ROLES.get(str(said).lower())
        if role is None:
            raise BadConversation("unknown role in a conversation", f"{said!r}; known are {', '.join(_ROLES)}")
        content = _parts(turn.get("content") if turn.get("role") else turn.get("value"))
        if not content:
            raise BadConversation("a turn of the conversation is empty", f"the {role}'s")
        messages.append({"role": role, "content": content})
    return messages


def _parts(content: Any) -> str | list[dict[str, str]]:
    """A string without pictures, otherwise a list of parts; `<image>` inside a string is a picture."""
    items = content if isinstance(content, list | tuple) else [{"type": "text", "text": content}]
    parts: list[dict[str, str]] = []
    for item in items:
        if isinstance(item, str):
            item = {"type": "text", "text": item}
        if not isinstance(item, dict):
            raise BadConversation("the conversation is malformed", f"a part is {type(item).__name__}")
        kind = item.get("type") or ("text" if item.get("text") is not None else "image")
        if kind in ("image", "image_url"):
            parts.append({"type": "image"})
        elif kind == "text":
            pieces = (item.get("text") or "").split(IMAGE_MARK)
            for number, piece in enumerate(pieces):
                if number:
                    parts.append({"type": "image"})
                if piece.strip():
                    parts.append({"type": "text", "text": piece.strip()})
        else:
            raise BadConversation("unknown kind of content", f"{kind!r}; known are 'text' and 'image'")
    if any(part["type"] == "image" for part in parts):
        return parts
    return "\n".join(part["text"] for part in parts)


def image_parts(messages: Sequence[dict[str, Any]]) -> int:
    """How many pictures the messages mention."""
    return sum(
        part["type"] == "image"
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
    )
