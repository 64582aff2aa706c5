"""Relative image paths in tables: they start from the folder of the file that names them, whatever the column."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mllm_vision.data.images.files import is_path
from mllm_vision.data.records.columns import IMAGE_NAMES, TEXT_NAMES, TURN_NAMES
from mllm_vision.data.records.readers.files import IMAGES, LeftOut

_TRIED = 32  # values of a column, spread over it, that are looked for on the disk
_SURE = frozenset(("image", "images", "image_path", "image_paths"))  # what else could such a column mean?
_ADDRESS = re.compile(r"(?i)https?://")
_FILE = re.compile(r"(?i)file://")
_HINTS = ("image", "img", "photo", "picture", "file", "path")


class ImagePaths:
    """Makes the relative image paths of one file's columns absolute.

    A column holds image paths when its name says so or its values end like images, and at least one of some values
    spread over it is a file below `root`. Then all its relative paths start from there; one that does not exist is
    met, and counted, like any other bad row.

    Args:
        root: the folder relative paths start from.
        left_out: collects paths outside `root` and of addresses on the net.
        sure: columns that are of images, as named or bound by the user; missing files are not an error here.
    """

    def __init__(self, root: Path, left_out: LeftOut, sure: Collection[str] = ()) -> None:
        self.left_out, self.sure = left_out, sure
        self._base = os.path.abspath(root)
        self._decided: dict[str, bool] = {}

    def column(self, name: str, values: Sequence[Any]) -> Sequence[Any]:
        """The values with absolute paths; the very same object where there is nothing to do.

        Raises:
            FileNotFoundError: a column that can only mean images, of which no file is found.
        """
        if _kind(name) == "text" and name not in self.sure:
            return values
        if name not in self._decided:
            decided = self._holds_paths(name, values)
            if decided is None:
                return values
            self._decided[name] = decided
        if not self._decided[name]:
            return values
        return [_mapped(value, name, self._joined) for value in values]

    def holds(self, name: str) -> bool:
        """Whether a column that was read was found to hold paths."""
        return self._decided.get(name, False)

    def _holds_paths(self, name: str, values: Sequence[Any]) -> bool | None:
        """Whether the column holds paths; None while it cannot be decided."""
        address = next((value for value in values if isinstance(value, str) and _ADDRESS.match(value)), None)
        if address is not None and holds_images(name):
            self.left_out.note(
                f"column {name!r} holds addresses on the net ({address[:80]!r}): nothing is fetched; download the "
                "images beforehand and name their files"
            )
        texts = [text for value in values for text in _paths_in(value, name)]
        relative = [text for text in texts if not os.path.isabs(text) and not _FILE.match(text)]
        absolute = len(relative) < len(texts)
        if not relative or name in self.sure:
            return True if absolute or relative else None
        tried = relative[:: -(-len(relative) // _TRIED)]
        if any(os.path.isfile(os.path.join(self._base, text)) for text in tried):
            return True
        if name.lower() in _SURE:
            others = f", nor do {len(tried) - 1} others that were tried" if len(tried) > 1 else ""
            raise FileNotFoundError(
                f"column {name!r} names the image {tried[0]!r}, but {os.path.join(self._base, tried[0])} does not exist"
                f"{others}; set --image_root to the folder that the paths start from"
            )
        return absolute

    def _joined(self, text: str) -> str:
        if ":" not in text and ".." not in text and text[0] not in "/\\":  # as nearly all are
            return f"{self._base}{os.sep}{text}"
        if _FILE.match(text):
            text = unquote(urlsplit(text).path)
        path = text if os.path.isabs(text) else os.path.join(self._base, text)
        if not path.startswith(self._base) or ".." in text:
            normal = os.path.normpath(path)
            if os.path.commonpath([normal, self._base]) != self._base:
                self.left_out.lies_outside(normal)
        return path


def _mapped(value: Any, key: str, change: Callable[[str], str]) -> Any:
    """The value with every string that may be an image path changed; containers are copied."""
    if isinstance(value, str):
        if (turns := _json_turns(value, key)) is not None:
            mapped = _mapped(turns, "", change)
            return value if mapped == turns else json.dumps(mapped, ensure_ascii=False)
        return change(value) if _may_be_path(value, key) else value
    if isinstance(value, list | tuple):
        return [_mapped(each, key, change) for each in value]
    if isinstance(value, dict) and value.get("bytes") is None:
        return {name: _mapped(each, _inner(name, key), change) for name, each in value.items()}
    return value


def _paths_in(value: Any, key: str) -> list[str]:
    """Every string in a value that may be an image path."""
    found: list[str] = []

    def collect(text: str) -> str:
        found.append(text)
        return text

    _mapped(value, key, collect)
    return found


def _json_turns(text: str, key: str) -> Any:
    """The turns of a conversation stored in its column as JSON text; None for any other text."""
    if _kind(key) != "turns" or text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _inner(name: str, key: str) -> str:
    """What a field of a struct is called for our purpose: the url of an image_url is an image."""
    return key if name in ("url", "path") and holds_images(key) else name


def holds_images(name: str) -> bool:
    """Whether a column or field is called like one of images or of their files."""
    return _kind(name) == "image"


@functools.lru_cache(4096)
def _kind(name: str) -> str:
    """What the name of a column or field says of the strings in it: "image", "text" or "other"."""
    name = name.lower()
    if name in TEXT_NAMES:
        return "text"
    if name in TURN_NAMES:
        return "turns"
    return "image" if name in IMAGE_NAMES or any(hint in name for hint in _HINTS) else "other"


def _may_be_path(text: str, key: str) -> bool:
    kind = _kind(key)
    if kind == "text" or not text or len(text) > 1024:
        return False
    if kind != "image" and text[text.rfind(".") :].lower() not in IMAGES:
        return False
    if len(text) < 80 and ":" not in text and "\n" not in text:
        return True
    return "\n" not in text and (is_path(text) or _FILE.match(text) is not None)  # no address, nor the image itself
