"""Values of flags and YAML keys as the types that dataclasses give them. Nothing here imports torch."""

from __future__ import annotations

import enum
import os
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
_COMMA = re.compile(r",(?![^\[]*\])")  # between the pairs of a mapping, not within a list


class _Loader(yaml.SafeLoader):
    """YAML as people write it: PyYAML takes `1e-6` for a string, here it is a number."""


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def read_yaml(text: str) -> Any:
    """What a YAML text says."""
    return yaml.load(text, Loader=_Loader)


def _members(hint: Any) -> list[Any]:
    """The members of a union, or the type alone."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(hint) for member in _members(part)]
    return [hint]


def _origin(hint: Any) -> Any:
    return typing.get_origin(hint) or hint


def is_list(hint: Any) -> bool:
    """Whether a flag of this type takes several words."""
    return any(_origin(member) in (list, tuple, set, Sequence) for member in _members(hint))


def is_bool(hint: Any) -> bool:
    """Whether a flag of this type needs no word."""
    members = [member for member in _members(hint) if member is not type(None)]
    return members == [bool]


def type_name(hint: Any) -> str:
    """`float`, `int or None`, `list of str`: how a type is named in help and errors."""
    names = []
    for member in _members(hint):
        origin, arguments = _origin(member), typing.get_args(member)
        if member is type(None):
            names.append("None")
        elif origin is typing.Literal:
            names.append(" or ".join(repr(argument) for argument in arguments))
        elif isinstance(origin, type) and issubclass(origin, enum.Enum):
            names.append("one of " + ", ".join(repr(entry.value) for entry in origin))
        elif origin in (list, tuple, set, Sequence):
            names.append(f"list of {type_name(arguments[0])}" if arguments else "list")
        elif origin is dict:
            names.append("mapping")
        else:
            names.append(getattr(origin, "__name__", str(origin)))
    return " or ".join(dict.fromkeys(names))


def convert(value: Any, hint: Any, where: str, *, words: bool = False) -> Any:
    """`value` (from YAML, or with `words` the list of words after a flag) as the type `hint`.

    Raises:
        ValueError: it cannot be; the message holds `where`, the value and the type.
    """
    single = not isinstance(value, list) or (words and len(value) == 1)
    scalar = value[0] if words and single else value
    members = sorted(_members(hint), key=_precedence)
    if not words and type(value) in members:
        return value  # YAML types its values: the string "no" stays a string
    for member in members:
        listed = _origin(member) in (list, tuple, set, Sequence)
        if (listed and single and str in members) or (not listed and not single):
            continue  # one word is a string where a string will do; several words are only ever a list
        try:
            return _convert_one(value if listed else scalar, member)
        except (ValueError, TypeError):
            continue
    shown = " ".join(value) if words else value
    raise ValueError(f"{where}: expected {type_name(hint)}, got {shown!r}")


def _precedence(member: Any) -> int:
    """The narrower type is tried first; `str` takes anything and comes last."""
    origin = _origin(member)
    if origin is typing.Literal or (isinstance(origin, type) and issubclass(origin, enum.Enum)):
        return 1
    order = [type(None), None, bool, int, float, dict, list, tuple, set, Path, str]
    return order.index(origin) if origin in order else 7


def _convert_one(value: Any, hint: Any) -> Any:
    origin, arguments = _origin(hint), typing.get_args(hint)
    if hint is Any:
        return read_yaml(value) if isinstance(value, str) else value
    if hint is type(None):
        if value is None or (isinstance(value, str) and value.lower() in ("null", "~")):
            return None
    elif origin is typing.Literal:
        for argument in arguments:
            if value == argument or (isinstance(value, str) and value == str(argument)):
                return argument
    elif isinstance(origin, type) and issubclass(origin, enum.Enum):
        return origin(value)
    elif origin is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
            return value.lower() in _TRUE
    elif origin is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str):
            return int(value)
    elif origin is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):
            return float(value)
    elif origin is str:
        if isinstance(value, str):
            return value
    elif isinstance(origin, type) and issubclass(origin, os.PathLike):
        if isinstance(value, (str, os.PathLike)):
            return Path(value)
    elif origin is dict:
        return _mapping(value)
    elif origin in (list, tuple, set, Sequence):
        entries = list(value) if isinstance(value, (list, tuple, set)) else [value]
        inner = arguments[0] if arguments else Any
        result = [_convert_one(entry, member) for entry in entries for member in [_fitting(entry, inner)]]
        return result if origin in (list, Sequence) else origin(result)
    raise ValueError(value)


def _fitting(entry: Any, hint: Any) -> Any:
    """The member of a union that takes `entry` (lists of unions are rare; the first that works)."""
    for member in sorted(_members(hint), key=_precedence):
        try:
            _convert_one(entry, member)
        except (ValueError, TypeError):
            continue
        return member
    raise ValueError(entry)


def _mapping(value: Any) -> dict:
    if isinstance(value, dict):
        return value
    if isinstance(value, str) and value.lstrip().startswith("{"):
        found = read_yaml(value)
        if isinstance(found, dict):
            return found
    elif isinstance(value, str) and "=" in value:
        pairs = [pair.partition("=") for pair in _COMMA.split(value) if pair.strip()]
        if all(equals for _, equals, _ in pairs):
            return {key.strip(): read_yaml(text) for key, _, text in pairs}
    raise ValueError(value)
