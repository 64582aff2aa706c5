"""`--help`: the flags of a recipe on one page, without importing torch or transformers; `--help all`: every flag."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mllm_vision.hub.lineage import plain
from mllm_vision.training.recipe.flag_types import default_of, is_required, type_name
from mllm_vision.training.recipe.flags import is_offered

WIDTH, LEFT = 120, 44  # columns of a line, and of the flag in it
MORE = "`--help all` lists every other flag: those of the method, of views and streams, and all of TrainingArguments."


def show_help(
    *classes: type, argv: Sequence[str] | None = None, description: str = "", defaults: Mapping[str, Any] | None = None
) -> None:
    """Prints the flags of `classes` and ends the process where the command line says `--help`.

    `parse_recipe` calls it; a recipe whose other classes take long to import calls it first. Classes with
    `only_in_full_help` are left out.

    Args:
        classes, argv, description, defaults: as of `parse_recipe`.
    """
    if _asked(argv) == "short":
        shown = [cls for cls in classes if not getattr(cls, "only_in_full_help", False)]
        _print([*page(shown, description, defaults or {}), "", *[MORE] * any(map(_has_more, classes))])


def show_full_help(
    *classes: type, argv: Sequence[str] | None = None, description: str = "", defaults: Mapping[str, Any] | None = None
) -> None:
    """The same for `--help all`, with all `classes`."""
    if _asked(argv) == "all":
        _print(page(classes, description, defaults or {}))


def page(classes: Sequence[type], description: str, defaults: Mapping[str, Any]) -> list[str]:
    """The lines of the help: a heading for each class, and a line for each flag, or for several described as one."""
    lines = [description.strip(), ""] if description else []
    lines += _entry("--config FILE", "Read saved flags from a YAML file; those of the command line win.")
    if any(field.metadata.get("imports") for cls in classes for field in dataclasses.fields(cls)):
        lines += _entry("--allow_import", "Let names in that file import a module (package.module:Class).")
    for cls in classes:
        lines += ["", f"{cls.__qualname__}:"]  # of a method: SimCLR.Config
        for flags, text in _described(cls, defaults):
            lines += _entry(flags, text)
    return lines


def _described(cls: type, defaults: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(flags with their type, help with the default); consecutive flags with the same of both are one entry."""
    hints, names, last = typing.get_type_hints(cls), [], None
    for field in [*dataclasses.fields(cls), None]:
        metadata = _metadata(cls, field.name) if field is not None else {}
        if field is not None and not (
            field.init and is_offered(field.name, metadata, getattr(cls, "recipe_name", None))
        ):
            continue
        described = None
        if field is not None:
            value = plain(defaults.get(field.name, default_of(field)))
            kind = "" if hints[field.name] is bool else type_name(hints[field.name]).replace(" or None", "")
            default = " (required)" if is_required(field) else f" (default: {value})"
            quiet = value in (None, False, [], {}) and not is_required(field)
            help_text = " ".join(str(metadata.get("help", "")).split())
            described = (kind, help_text + default * (not quiet))
        if last is not None and described != last:
            yield f"{', '.join(names)} {last[0]}".rstrip(), last[1]
            names = []
        if field is not None:
            names += [f"--{name}" for name in (field.name, *metadata.get("aliases", ()))]
        last = described


def _metadata(cls: type, name: str) -> Mapping[str, Any]:
    """Help and the like of a field: a recipe that changes a default leaves them to the class it derives from."""
    owners = [vars(base).get("__dataclass_fields__", {}) for base in cls.__mro__]
    return next((fields[name].metadata for fields in owners if name in fields and fields[name].metadata), {})


def _entry(flags: str, text: str) -> list[str]:
    """`  --flag TYPE   help`, the help wrapped in its own column."""
    wrapped = textwrap.wrap(text, WIDTH - LEFT) or [""]
    head = f"  {flags}".ljust(LEFT - 1)
    if len(head) >= LEFT:
        joined = f"{head} {' '.join(wrapped)}"
        return [joined] if len(joined) <= WIDTH else [head, *(" " * LEFT + line for line in wrapped)]
    return [f"{head} {wrapped[0]}".rstrip(), *(" " * LEFT + line for line in wrapped[1:])]


def _asked(argv: Sequence[str] | None) -> str | None:
    """ "short", "all", or None where no help is asked for."""
    words = list(sys.argv[1:] if argv is None else argv)
    for place, word in enumerate(words):
        if word in ("--help", "-h", "--help=all"):
            return "all" if word.endswith("=all") or words[place + 1 : place + 2] == ["all"] else "short"
    return None


def _has_more(cls: type) -> bool:
    return hasattr(cls, "recipe_name")


def _print(lines: Sequence[str]) -> None:
    print("\n".join(lines).rstrip())
    raise SystemExit(0)
