"""`--help`: the flags of a recipe on one page, without importing torch or transformers; `--help all`: every flag."""

from __future__ import annotations

import dataclasses
import functools
import sys
import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_vision.hub.lineage import plain
from mllm_vision.training.recipe.flag_types import default_of, is_required, type_name
from mllm_vision.training.recipe.flags import is_offered

WIDTH, LEFT = 120, 40  # columns of a line, and of the flag in it
MORE = "\n`--help all` lists every flag: of the method, of views and streams, and all of TrainingArguments."


def show_help(
    *classes: type,
    argv: Sequence[str] | None = None,
    description: str = "",
    defaults: Mapping[str, Any] | None = None,
    whole: bool = False,
) -> None:
    """Print the flags and exit where the command line says `--help`, or with `whole` where it says `--help all`.

    `parse_recipe` calls it; a recipe whose other classes take long to import calls it first. One page leaves out
    classes and fields that are `rare`.

    Args:
        classes, argv, description, defaults: see `parse_recipe`.
        whole: list everything that `classes` have.
    """
    if _asked(argv) != ("all" if whole else "short"):
        return
    if not whole:
        classes = tuple(cls for cls in classes if not getattr(cls, "rare", False))
        description = "\n\n".join(description.strip().split("\n\n")[:2])
    lines = _page(classes, description.strip(), defaults or {}, rare=whole)
    if whole and any(field.metadata.get("imports") for cls in classes for field in dataclasses.fields(cls)):
        switch = _entry("--allow_import", "Let names in a config file import a module (package.module:Class).")
        lines += ["", *switch]
    elif not whole and any(hasattr(cls, "recipe_name") for cls in classes):
        lines.append(MORE)
    print("\n".join(lines).rstrip())
    raise SystemExit(0)


def _page(classes: Sequence[type], description: str, defaults: Mapping[str, Any], *, rare: bool) -> list[str]:
    """A heading per class; one entry per flag, or per several flags with the same description."""
    lines = [description, ""] if description else []
    lines += _entry("--config FILE", "Read saved flags from a YAML file; those of the command line win.")
    for cls in classes:
        lines += ["", f"{cls.__qualname__}:"]  # of a method: SimCLR.Config
        grouped: dict[tuple[bool, str, str], list[str]] = {}
        for field in dataclasses.fields(cls):
            if entry := _described(cls, field, defaults, rare):
                grouped.setdefault((not is_required(field), *entry[1:]), []).append(entry[0])
        for (_, kind, text), names in sorted(grouped.items(), key=lambda group: group[0][0]):  # required ones first
            lines += _entry(f"{', '.join(names)} {kind}".rstrip(), text)
    return lines


def _described(
    cls: type, field: dataclasses.Field, defaults: Mapping[str, Any], rare: bool
) -> tuple[str, str, str] | None:
    """(flags, type, help with the default) of a field; None where it is not listed."""
    recipe, metadata = getattr(cls, "recipe_name", None), _metadata(cls, field.name)
    if not field.init or not is_offered(field.name, metadata, recipe):
        return None
    if not rare and (metadata.get("rare") or not (metadata.get("help") or recipe is None)):
        return None
    hint, value = _hints(cls)[field.name], plain(defaults.get(field.name, default_of(field)))
    kind = "" if hint is bool else type_name(hint).replace(" or None", "").replace("' or '", "|").strip("'")
    text = " ".join(str(metadata.get("help", "")).split())
    if is_required(field):
        text += " (required)"
    elif value not in (None, False, [], {}):
        text += f" (default: {value})"
    return ", ".join(f"--{name}" for name in (field.name, *metadata.get("aliases", ()))), kind, text.strip()


def _metadata(cls: type, name: str) -> Mapping[str, Any]:
    """Metadata of a field, inherited from the base class where a recipe only changes the default."""
    owners = [vars(base).get("__dataclass_fields__", {}) for base in cls.__mro__]
    return next((fields[name].metadata for fields in owners if name in fields and fields[name].metadata), {})


def _entry(flags: str, text: str) -> list[str]:
    """`  --flag TYPE   help`, the help wrapped in its own column."""
    wrapped = textwrap.wrap(text, WIDTH - LEFT) or [""]
    head = f"  {flags}".ljust(LEFT - 1)
    if len(head) >= LEFT:
        joined = f"{head}  {' '.join(wrapped)}"
        return [joined] if len(joined) <= WIDTH else [head, *(" " * LEFT + line for line in wrapped)]
    return [f"{head} {wrapped[0]}".rstrip(), *(" " * LEFT + line for line in wrapped[1:])]


def _asked(argv: Sequence[str] | None) -> str | None:
    """ "short", "all", or None where no help is asked for."""
    given = list(sys.argv[1:] if argv is None else argv)
    for place, flag in enumerate(given):
        if flag in ("--help", "-h", "--help=all"):
            return "all" if flag.endswith("=all") or given[place + 1 : place + 2] == ["all"] else "short"
    return None


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)
