"""The command line of the recipes: transformers' `HfArgumentParser` with YAML files and the nearest name in errors."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from transformers.hf_argparser import HfArgumentParser

from mllm_vision.errors import unknown_name
from mllm_vision.training.recipe.flag_types import Known, aliases_of, convert, is_list, load_yaml, members, type_name

SWITCH = "allow_import"  # offered where a field may name a module


class RecipeParser(HfArgumentParser):
    """`HfArgumentParser` for the fields of dataclasses; returns only what was given, without defaults.

    Aliases are written without dashes, every bool has a `--no_x`, types may be unions, mappings and lists: argparse
    reads everything but bools as text, which `convert` parses.

    Args:
        fields: from `known_fields`.
    """

    def __init__(self, fields: Known) -> None:
        self.fields = fields
        self.switches = [SWITCH] * any(field.metadata.get("imports") for field, _, _ in fields.values())
        flags: list[tuple[str, Any, Any]] = [("config", str, _suppressed())] + [
            (name, bool, _suppressed()) for name in self.switches
        ]
        negated = []
        for name, (field, hint, _) in fields.items():
            kinds = [kind for kind in members(hint) if kind is not type(None)]
            kind: Any = bool if kinds == [bool] else list[str] if any(map(is_list, kinds)) else str
            flags.append((name, kind, _suppressed(field.metadata.get("aliases", ()), listed=kind == list[str])))
            negated += [name] * (kind is bool)
        text: Any = dataclasses.make_dataclass("Flags", flags)
        super().__init__(text, add_help=False, allow_abbrev=False, exit_on_error=False)
        for name in negated:
            off = {"action": "store_const", "const": False, "default": argparse.SUPPRESS}
            self.add_argument(*_spellings(f"no_{name}"), dest=name, **off)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As in argparse; a list may be empty."""
        if settings.get("nargs") == "+":
            settings["nargs"] = "*"
        return super().add_argument(*names, **settings)

    def read_flags(self, argv: Sequence[str]) -> dict[str, Any]:
        """Name -> value of the flags on a command line; the last one wins where a flag is repeated.

        Raises:
            ValueError: an unknown flag, a flag without its value, a value of the wrong type.
        """
        try:
            namespace, rest = self.parse_known_args([_as_value(word) for word in argv])
        except argparse.ArgumentError as error:
            raise ValueError(f"{(error.argument_name or '').partition('/')[0]}: {error.message}") from None
        for argument in sorted(rest, key=lambda argument: not argument.startswith("--")):
            if not argument.startswith("--") or argument == "--":
                raise ValueError(f"unexpected argument {argument.lstrip()!r}; every value follows a --flag")
            known = [*self.fields, *aliases_of(self.fields), "config", *self.switches]
            name = argument[2:].partition("=")[0].replace("-", "_")
            raise ValueError(unknown_name("flag", name, known, prefix="--"))
        return {name: self._read_flag(name, text) for name, text in vars(namespace).items()}

    def read_file(self, path: str) -> dict[str, Any]:
        """Name -> value of the keys in a `--config` file.

        Raises:
            ValueError: not YAML of `flag: value` lines, an unknown key, a value of the wrong type.
            FileNotFoundError: the file does not exist.
        """
        values, aliases = {}, aliases_of(self.fields)
        for key, value in load_yaml(path).items():
            name = aliases.get(key, key)
            if name not in self.fields:
                raise ValueError(f"{path}: {unknown_name('key', name, self.fields)}")
            hint = self.fields[name][1]
            typed = type(value) in members(hint)  # YAML types its values: the string "no" stays a string
            values[name] = value if typed else _read(value, hint, f"{path}: {name}", value)
        return values

    def _read_flag(self, name: str, text: Any) -> Any:
        if name not in self.fields:
            return text
        text = [_as_typed(part) for part in text] if isinstance(text, list) else _as_typed(text)
        hint, shown = self.fields[name][1], " ".join(text) if isinstance(text, list) else text
        if isinstance(text, list) and len(text) == 1 and str in members(hint):
            text = text[0]  # a single value is a string where a string is accepted
        return _read(text, hint, f"--{name}", shown)


def _read(value: Any, hint: Any, where: str, shown: Any) -> Any:
    try:
        return convert(value, hint)
    except ValueError:
        raise ValueError(f"{where}: expected {type_name(hint)}, got {shown!r}") from None


def _as_value(word: str) -> str:
    """`-1e-5` and `-x` with a space in front: argparse takes what contains a space for a value, and our flags have two
    dashes.
    """
    return f" {word}" if word.startswith("-") and not word.startswith("--") else word


def _as_typed(value: Any) -> Any:
    return value[1:] if isinstance(value, str) and value.startswith(" -") else value


def _suppressed(aliases: Sequence[str] = (), *, listed: bool = False) -> Any:
    """A field that is absent from the namespace where its flag is not given."""
    default: Any = {"default_factory": lambda: argparse.SUPPRESS} if listed else {"default": argparse.SUPPRESS}
    return dataclasses.field(**default, metadata={"aliases": _spellings(*aliases)})


def _spellings(*names: str) -> list[str]:
    """The flags of the names, with underscores and with hyphens."""
    return list(dict.fromkeys(f"--{spelt}" for name in names for spelt in (name, name.replace("_", "-"))))
