"""Conditions on the rows of a stream: what `--stream_filter` says, as a function of a row."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

_CONDITION = re.compile(r"\s*(?:(length|words)\((\w+)\)|(\w+))\s*(>=|<=|==|!=|>|<)\s*(.+?)\s*$")
_SIGNS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


def row_filter(conditions: Sequence[str]) -> tuple[Callable[[dict[str, Any]], bool] | None, list[str]]:
    """A filter of rows, and the columns it looks at; (None, []) without conditions.

    Args:
        conditions: each `column >= 0.28`, `words(caption) < 60`, `length(caption) > 4` or `lang == en`, with >=, <=,
            >, <, == or != (all of them must hold; a missing value fails); or one `package.module:function` that takes
            a row and has an attribute `columns`.

    Raises:
        ValueError: a condition that cannot be read; names its form. ImportError, AttributeError: no such function.
    """
    if not conditions:
        return None, []
    if len(conditions) == 1 and re.fullmatch(r"[\w.]+:\w+", conditions[0]):
        module, _, name = conditions[0].partition(":")
        function = getattr(import_module(module), name)
        columns = list(getattr(function, "columns", ()))
        if not columns:
            raise ValueError(f"{conditions[0]} needs an attribute `columns`: the names of the columns it looks at")
        return function, columns
    parsed = [_parse(condition) for condition in conditions]
    return _Conditions(parsed), list(dict.fromkeys(column for column, *_ in parsed))


def _parse(condition: str) -> tuple[str, str, str, Any]:
    found = _CONDITION.match(condition)
    if found is None:
        raise ValueError(
            f"--stream_filter {condition!r} is no condition; write e.g. 'similarity>=0.28', 'words(caption)<60', "
            "'lang==en' or package.module:function"
        )
    measure, measured, plain, sign, text = found.groups()
    try:
        value: Any = float(text)
    except ValueError:
        value = text.strip("'\"")
    if isinstance(value, str) and (measure or sign not in ("==", "!=")):
        raise ValueError(f"--stream_filter {condition!r}: {text!r} is no number, and {sign} compares numbers")
    return measured or plain, measure or "", sign, value


class _Conditions:
    """All conditions hold; a class, so that worker processes can be given it."""

    def __init__(self, parsed: list[tuple[str, str, str, Any]]) -> None:
        self.parsed = parsed

    def __call__(self, row: dict[str, Any]) -> bool:
        return all(self._holds(row.get(column), *rest) for column, *rest in self.parsed)

    @staticmethod
    def _holds(found: Any, measure: str, sign: str, value: Any) -> bool:
        if measure:
            text = found[0] if isinstance(found, list | tuple) and found else found
            if not isinstance(text, str):
                return False
            found = len(text.split()) if measure == "words" else len(text)
        if found is None:
            return False
        try:
            return (
                bool(_SIGNS[sign](float(found), value)) if isinstance(value, float) else _SIGNS[sign](str(found), value)
            )
        except (TypeError, ValueError):  # a text where a number should be
            return False
