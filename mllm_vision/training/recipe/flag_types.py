"""The fields of dataclasses as flags: their types, and the conversion of text or YAML. Does not import torch."""

from __future__ import annotations

import dataclasses
import enum
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mllm_vision.errors import nearby

Known = dict[str, tuple[dataclasses.Field, Any, type]]  # name -> field, type, class
_LISTS = (list, tuple, set, Sequence)
_BOOLEANS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
_COMMA = re.compile(r",(?![^\[]*\])")  # between the pairs of a mapping, not within a list


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-6` is a number; PyYAML reads a string."""


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def load_yaml(path: str) -> dict[str, Any]:
    """The `flag: value` lines of a file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not YAML, or not a mapping.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config {path}: no such file{nearby(path)}")
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content or {}, dict):
        raise ValueError(f"{path} must hold `flag: value` lines, got {type(content).__name__}")
    return {str(key).replace("-", "_"): value for key, value in (content or {}).items()}


def known_fields(classes: Sequence[type]) -> Known:
    """The fields of dataclasses by name.

    Raises:
        ValueError: two classes with the same field; a class with annotations that is not a dataclass.
    """
    known: Known = {}
    for cls in classes:
        if "__dataclass_fields__" not in vars(cls) and "__annotations__" in vars(cls):
            raise ValueError(f"{cls.__qualname__} has fields and is not a dataclass; put @dataclass above the class")
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.name in known:
                other = known[field.name][2].__name__
                raise ValueError(f"both {other} and {cls.__name__} have a field {field.name!r}; rename one of them")
            if field.init:
                known[field.name] = (field, hints[field.name], cls)
    return known


def aliases_of(fields: Known) -> dict[str, str]:
    """Other names of fields -> their own."""
    return {alias: name for name, (field, _, _) in fields.items() for alias in field.metadata.get("aliases", ())}


def default_of(field: dataclasses.Field) -> Any:
    """The default of a field; None where it is required."""
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def is_required(field: dataclasses.Field) -> bool:
    """Whether a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def members(hint: Any) -> list[Any]:
    """The members of a union, or the type alone."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(hint) for member in members(part)]
    return [hint]


def is_list(kind: Any) -> bool:
    """Whether a type (not a union) is a collection."""
    return (typing.get_origin(kind) or kind) in _LISTS


def type_name(hint: Any) -> str:
    """`float`, `int or None`, `list of str`: how a type is named in help and errors."""
    names = []
    for member in members(hint):
        origin, inner = typing.get_origin(member) or member, typing.get_args(member)
        if member is type(None):
            names.append("None")
        elif origin is typing.Literal:
            names.append(" or ".join(repr(choice) for choice in inner))
        elif isinstance(origin, type) and issubclass(origin, enum.Enum):
            names.append("one of " + ", ".join(repr(entry.value) for entry in origin))
        elif origin in _LISTS:
            names.append(f"list of {type_name(inner[0])}" if inner else "list")
        else:
            names.append("mapping" if origin is dict else getattr(origin, "__name__", str(origin)))
    return " or ".join(dict.fromkeys(names))


def convert(value: Any, hint: Any) -> Any:
    """`value` (text or YAML) as the first member of the type `hint` that accepts it, the narrower ones first.

    Raises:
        ValueError: no member accepts it.
    """
    order = [type(None), bool, int, float, dict, Path, str, list, tuple, set]

    def breadth(kind: Any) -> int:
        origin = typing.get_origin(kind) or kind
        return order.index(origin) if origin in order else 0

    for kind in sorted(members(hint), key=breadth):
        try:
            return _convert(value, kind)
        except (ValueError, TypeError, KeyError):
            continue
    raise ValueError(value)


def _convert(value: Any, kind: Any) -> Any:
    """`value` as the type `kind`, which is not a union; any error means that it cannot be converted."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    text = isinstance(value, str)
    if kind is Any:
        return yaml.load(value, Loader=_Loader) if text else value
    if kind is type(None):
        return {None: None, "null": None, "~": None}[value]
    if origin is typing.Literal:
        return {str(choice): choice for choice in inner}[str(value)]
    if origin is dict:
        return _mapping(value)
    if origin in _LISTS:
        made = [convert(entry, inner[0] if inner else Any) for entry in (value if is_list(type(value)) else [value])]
        return made if origin in (list, Sequence) else origin(made)
    if origin is bool:
        return value if isinstance(value, bool) else _BOOLEANS[value.lower()] if text else {}[value]
    if text or (kind is float and type(value) is int) or type(value) is kind or issubclass(kind, enum.Enum):
        return kind(value)
    raise ValueError(value)


def _mapping(value: Any) -> dict:
    """A mapping from a dict, JSON, or `key=value,key=value`."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = yaml.load(value, Loader=_Loader)
    elif isinstance(value, str):
        pairs = [pair.partition("=") for pair in _COMMA.split(value) if pair.strip()]
        if not pairs or not all(equals for _, equals, _ in pairs):
            raise ValueError(value)
        return {key.strip(): yaml.load(text, Loader=_Loader) for key, _, text in pairs}
    return dict(value) if isinstance(value, dict) else {}[value]
