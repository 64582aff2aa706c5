"""Conversations of every common form as Hugging Face `messages`: [{"role", "content"}], images as content parts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from numbers import Number
from typing import Any

from mllm_vision.data.images.files import image_source, is_missing
from mllm_vision.data.records.sampling import BadRow
from mllm_vision.errors import short

IMAGE_MARK = "<image>"
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "bard", "chatgpt", "chatbot", "bing"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_TOOLS = ("tool", "function", "function_call", "function_response", "tool_call", "tool_response", "observation")
_SAID_BY = ("role", "from")
_SAID = ("content", "value", "text")
_SOURCES = ("image", "image_url", "bytes", "path", "url", "base64")  # keys under which a part may hold its image
_TEXTS, _IMAGES = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")


class BadConversation(BadRow):
    """A conversation that cannot be trained on; `reason` is a short phrase that repeats over samples."""


def words(value: Any) -> str:
    """A value as text: strings unchanged, numbers and dates in digits (whole floats without a point).

    Tables turn the integers of a column with gaps into floats: 3.0 becomes "3". Null and NaN are "".

    Raises:
        BadConversation: bytes, lists or other types.
    """
    if isinstance(value, dict):  # VQA files hold an annotator's answer as a dict with more than the text
        found = value.get("answer", value.get("text"))
        if found is None and value and "answer" not in value and "text" not in value:
            raise BadConversation("a text is not a string", f"a dict with {short(list(value))}")
        value = found
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, Number) or hasattr(value, "isoformat"):
        return str(value)
    raise BadConversation("a text is not a string", f"{type(value).__name__} {short(value)}")


def from_caption(caption: str, image_count: int) -> list[dict[str, Any]]:
    """The images alone as the question, the caption as the answer."""
    return [
        {"role": "user", "content": [{"type": "image"}] * image_count},
        {"role": "assistant", "content": caption},
    ]


def from_pairs(pairs: Sequence[tuple[str, str]], image_count: int) -> list[dict[str, Any]]:
    """Questions and answers in this order, the images before the first question."""
    messages: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(pairs):
        content: Any = question
        if number == 0 and image_count:
            content = [{"type": "image"}] * image_count + [{"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def from_turns(turns: Any) -> list[dict[str, Any]]:
    """Turns in any of the common spellings as messages; image parts keep what they name under "image".

    Accepted: lists of {"role" or "from": ..., "content" or "value" or "text": ...} or {"user": ..., "assistant": ...},
    one struct of lists, and any of these as JSON text.

    Raises:
        BadConversation: empty or malformed; an unknown role; tools, which no template here writes down.
    """
    turns = _as_list(turns)
    if not turns:
        raise BadConversation("the conversation is empty")
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadConversation("the conversation is malformed", f"a turn is {type(turn).__name__}, not a dict")
        for said, value, supervised in _spoken(turn):
            role = _role(said)
            if turn.get("tool_calls") or turn.get("function_call"):
                raise BadConversation(
                    "calls of tools are not supported", "leave the row out, or write the call as text"
                )
            content = _parts(value)
            if not content:
                raise BadConversation("a turn of the conversation is empty", f"the {role}'s")
            messages.append({"role": role, "content": content} | ({} if supervised else {"supervised": False}))
    return messages


def _as_list(turns: Any) -> Any:
    if isinstance(turns, str):
        if not turns.strip():
            return None
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise BadConversation(
                "the conversation is not valid JSON", f"{short(turns)} ({short(str(error))})"
            ) from None
    if isinstance(turns, dict):  # a struct of lists, as older data sets store a list of structs
        names = [name for name in (*_SAID_BY, *_SAID, "user", "assistant") if turns.get(name) is not None]
        lists = [turns[name] for name in names]
        if not names or not all(isinstance(each, list | tuple) for each in lists):
            raise BadConversation("the conversation is malformed", short(turns))
        if len({len(each) for each in lists}) > 1:
            counts = ", ".join(f"{len(each)} x {name}" for name, each in zip(names, lists, strict=True))
            raise BadConversation("turns lack a role or a text", counts)
        turns = [dict(zip(names, values, strict=True)) for values in zip(*lists, strict=True)]
    if turns is not None and not isinstance(turns, list | tuple):
        raise BadConversation("the conversation is malformed", f"{type(turns).__name__} {short(turns)}")
    return turns


def _spoken(turn: dict[str, Any]) -> list[tuple[Any, Any, bool]]:
    """(who, what, whether it is supervised) of one turn; two of them where it holds question and answer."""
    who = next((turn[name] for name in _SAID_BY if turn.get(name) is not None), None)
    if who is None:
        both = [name for name in turn if isinstance(name, str) and _ROLES.get(name.lower()) and turn[name] is not None]
        if both:  # {"user": ..., "assistant": ...}, in the order in which they are said
            order = ("system", "user", "assistant")
            return [(name, turn[name], True) for name in sorted(both, key=lambda n: order.index(_ROLES[n.lower()]))]
        raise BadConversation("the conversation is malformed", f"a turn has no role: {short(turn)}")
    what = next((turn[name] for name in _SAID if turn.get(name) is not None), None)
    weight = turn.get("weight")  # OpenAI's: 0 for an answer that is read but not trained on
    if weight is not None and weight not in (0, 1):
        raise BadConversation("a turn has a weight between 0 and 1", f"{short(weight)}; only 0 and 1 are known")
    return [(who, what, weight != 0)]


def _role(said: Any) -> str:
    name = str(said).strip().lower()
    if name in _TOOLS:
        raise BadConversation(
            "calls of tools are not supported", f"a turn of {short(said)}; leave the row out, or write it as text"
        )
    if name not in _ROLES:
        raise BadConversation("unknown role in a conversation", f"{short(said)}; known are {', '.join(_ROLES)}")
    return _ROLES[name]


def _parts(content: Any) -> str | list[dict[str, Any]]:
    """A string without images, otherwise a list of parts; `<image>` inside a string is an image."""
    items = list(content) if isinstance(content, list | tuple) else [content]
    parts: list[dict[str, Any]] = []
    for item in items:
        if not isinstance(item, dict):
            item = {"type": "text", "text": item}
        kind = item.get("type") or ("text" if item.get("text") is not None else "image")
        if kind in _IMAGES:
            part, source = {"type": "image"}, _source(item)
            if source is not None:
                part["image"] = source
            elif isinstance(item.get("index"), int):
                part["index"] = item["index"]
            parts.append(part)
        elif kind in _TEXTS:
            for number, piece in enumerate(words(item.get("text")).split(IMAGE_MARK)):
                if number:
                    parts.append({"type": "image"})
                if piece.strip():
                    parts.append({"type": "text", "text": piece.strip()})
        else:
            raise BadConversation("unknown kind of content", f"{short(kind)}; known are 'text' and 'image'")
    if any(part["type"] == "image" for part in parts):
        return parts
    return "\n".join(part["text"] for part in parts)


def _source(part: dict[str, Any]) -> Any:
    """The image of a part: a PIL image, bytes, a path or a URI; None if it is in the image column."""
    name = next((name for name in _SOURCES if not is_missing(part.get(name))), None)
    found = part[name] if name else None
    if isinstance(found, dict) and found.get("url"):
        found = found["url"]  # OpenAI's {"image_url": {"url": ...}}
    if isinstance(found, str) and found.startswith(("http://", "https://")):
        image_source(found)  # raises the message for web addresses before training
    return f"data:image;base64,{found}" if name == "base64" and isinstance(found, str) else found


def image_parts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The image parts of messages, in their order."""
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return [part for content in contents for part in content if part["type"] == "image"]


def place_images(messages: list[dict[str, Any]], given: Sequence[Any]) -> tuple[list[dict[str, Any]], list[Any], int]:
    """(messages without sources, the image of every image part in order, how many of `given` no part refers to).

    Args:
        messages: from `from_turns`.
        given: the images of the row's image column, for the parts that name none.

    Raises:
        BadConversation: parts and images differ in number. Where parts bring their own images, those of the column
            may stay unused.
    """
    parts = image_parts(messages)
    bare = [part for part in parts if "image" not in part]
    order = [part.get("index", place) for place, part in enumerate(bare)]
    if not all(0 <= place < len(given) for place in order):
        if not given and len(bare) == len(parts):
            raise BadConversation(
                "more <image> tokens than images",
                f"{len(bare)} in the text, 0 in the record; name their column with --image_column, or remove "
                f"{IMAGE_MARK} from rows that are text only",
            )
        raise BadConversation("more <image> tokens than images", f"{len(bare)} in the text, {len(given)} in the record")
    left = len(given) - len(set(order))
    if left and len(bare) == len(parts):
        raise BadConversation(
            "more images than <image> tokens",
            f"{len(given)} in the record, {len(bare)} in the text; put {IMAGE_MARK} where each one belongs",
        )
    taken = iter(order)
    images = [part["image"] if "image" in part else given[next(taken)] for part in parts]
    return without_sources(messages), images, left


def without_sources(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose image parts are bare marks."""
    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [{"type": "image"} if p["type"] == "image" else p for p in message["content"]]}
        for message in messages
    ]
