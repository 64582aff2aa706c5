"""Recipes from flags and YAML: a config is saved flags, the command line wins, an unknown key is an error.

Every field of the dataclasses given to `parse_recipe` is a flag (`--max_steps` or `--max-steps`) and a YAML key. This
file does not import torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import sys
from collections.abc import Sequence
from typing import Any

from mllm_vision.errors import unknown_name
from mllm_vision.hub.lineage import plain
from mllm_vision.training.recipe.common import CommonArguments
from mllm_vision.training.recipe.flag_types import default_of, is_required, known_fields, load_yaml
from mllm_vision.training.recipe.help import show_help
from mllm_vision.training.recipe.launch import run_recipe as run_recipe

_GIVEN = "_recipe_values"  # attribute of an instance: (constructor arguments, resolved values)
# never written to recipe.yaml: secrets, and flags of a single start of the run
_UNSAVED = {
    *("hub_token", "overwrite", "resume", "resume_from_checkpoint", "local_rank"),
    *("accept_changed_data", "accept_missing_state"),
}


def parse_recipe(
    *classes: type,
    argv: Sequence[str] | None = None,
    description: str = "",
    defaults: dict[str, Any] | None = None,
) -> tuple:
    """Instances of the dataclasses `classes`, filled from `--config file.yaml` and the command line.

    A bool field is `--bf16`, `--bf16 true`, `--bf16 false` or `--no_bf16`; a list accepts several values; a dict
    accepts JSON or `key=value,key=value`; `null` is None. `--help` prints the flags and exits (see `show_help`).

    A field with `metadata["imports"]` accepts names such as `package.module:Class`, which import a Python module. Such
    a name in a `--config` file is refused unless the command line has `--allow_import`: configs are shared, and
    importing runs code.

    Args:
        classes: dataclasses; a field's `metadata["help"]` becomes its help, `metadata["aliases"]` are other names. A
            subclass of `CommonArguments` becomes `RecipeArguments` with its defaults.
        argv: the command-line arguments; by default those of the process.
        description: the first lines of the help.
        defaults: field -> value that replaces the dataclasses' own defaults (a method's); file and flags win.

    Raises:
        ValueError: an unknown flag or key (with the nearest known name), a value of the wrong type, a missing required
            flag.
        FileNotFoundError: the file of `--config` does not exist.
    """
    show_help(*classes, argv=argv, description=description, defaults=defaults)
    whole = [complete(cls) for cls in classes]
    show_help(*whole, argv=argv, description=description, defaults=defaults, whole=True)
    values = read_recipe(*whole, argv=argv, defaults=defaults)
    return tuple(build(cls, given) for cls, given in zip(whole, values))


@functools.cache
def complete(cls: type) -> Any:
    """`cls`; a subclass of `CommonArguments` only becomes `RecipeArguments` with the defaults of `cls`."""
    if not issubclass(cls, CommonArguments):
        return cls
    from mllm_vision.training.recipe.arguments import RecipeArguments

    if issubclass(cls, RecipeArguments):
        return cls
    namespace = {"__doc__": cls.__doc__, "__reduce__": lambda self: (_restored, (cls, self.__dict__))}
    whole = dataclasses.make_dataclass(cls.__name__, [], bases=(cls, RecipeArguments), namespace=namespace)
    whole.__module__ = cls.__module__
    return whole


def _restored(cls: type, values: dict[str, Any]) -> Any:
    """Unpickle an instance of `complete(cls)`, a class that cannot be imported by name."""
    made = object.__new__(complete(cls))
    made.__dict__.update(values)
    return made


def build(cls: type, given: dict[str, Any]) -> Any:
    """An instance of the dataclass `cls` that remembers its constructor arguments (see `recipe_dict`)."""
    instance = cls(**given)
    kept = [field for field in dataclasses.fields(cls) if field.name not in _UNSAVED]
    resolved = {field.name: getattr(instance, field.name) for field in kept}
    values = {field.name: given.get(field.name, default_of(field)) for field in kept}
    object.__setattr__(instance, _GIVEN, (values, resolved))
    return instance


def read_recipe(
    *classes: type, argv: Sequence[str] | None = None, defaults: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """As `parse_recipe`, but return only the checked keyword arguments of each class."""
    from mllm_vision.training.recipe.flag_parser import SWITCH, RecipeParser

    classes = tuple(complete(cls) for cls in classes)
    fields = known_fields(classes)
    parser = RecipeParser(fields)
    flags = parser.read_flags(sys.argv[1:] if argv is None else argv)
    allowed, config = flags.pop(SWITCH, False), flags.pop("config", None)
    saved = parser.read_file(config) if config else {}
    for name, value in saved.items():
        if fields[name][0].metadata.get("imports") and name not in flags and not allowed:
            _check_import(name, value, config)
    values = saved | flags
    settled = dict(defaults or {})
    for name in settled:
        if name not in fields:
            raise ValueError(unknown_name("default", name, fields))
    for cls in classes:
        if hasattr(cls, "settle_defaults"):  # a class may drop defaults that the given values replace
            settled = cls.settle_defaults(values, settled)
    values = {**settled, **values}
    missing = [f"--{name}" for name, (field, _, _) in fields.items() if name not in values and is_required(field)]
    if missing:
        raise ValueError(f"missing: {', '.join(missing)} (a flag, or a key of --config; --help lists all)")
    return [{name: values[name] for name in values if fields[name][2] is cls} for cls in classes]


def peek_recipe(name: str, default: Any = None, *, argv: Sequence[str] | None = None) -> Any:
    """The value of one flag before the full parse, from the command line or the `--config` file.

    For recipes where one flag decides which other flags exist (`--objective` chooses its Config dataclass).
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in dict.fromkeys((name, "config", "allow_import")):
        parser.add_argument(f"--{flag}", *{f"--{flag.replace('_', '-')}"} - {f"--{flag}"}, nargs="?", const="")
    found, _ = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    if (value := getattr(found, name)) is not None:
        return value
    if not found.config:
        return default
    value = load_yaml(found.config).get(name, default)
    if found.allow_import is None:
        _check_import(name, value, found.config)
    return value


def _check_import(name: str, value: Any, config: str) -> None:
    """Refuse a name in a file that would import a Python module."""
    names = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
    if modules := [each for each in names if re.fullmatch(r"[\w.]+:\w+", each.strip())]:
        raise ValueError(
            f"{config}: {name}: {modules[0]} would import the module {modules[0].partition(':')[0]}, and importing "
            f"runs its code; add --allow_import to the command line if you trust it, or name it there (--{name} "
            f"{modules[0]})"
        )


def recipe_dict(*instances: Any) -> dict[str, Any]:
    """All flags as resolved, flat, for YAML: what `recipe.yaml` contains and `--config` reads back.

    A field that a class's own `__post_init__` rewrote (an enum, a parsed dict) is written as given; one that was set
    after construction is written with its present value; one that is derived from another (`derived_fields` of the
    class) is null. Secrets and flags of a single start (`overwrite`, `resume`) are left out.
    """
    flat: dict[str, Any] = {}
    none: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for instance in instances:
        given, resolved = getattr(instance, _GIVEN, none)
        derived = getattr(instance, "derived_fields", ())
        for field in dataclasses.fields(instance):
            if not field.init or field.name in _UNSAVED:
                continue
            now = getattr(instance, field.name)
            untouched = field.name in given and _same(now, resolved[field.name])
            flat[field.name] = None if field.name in derived else plain(given[field.name] if untouched else now)
    return flat


def _same(left: Any, right: Any) -> bool:
    try:
        return bool(left is right or left == right)
    except (ValueError, RuntimeError):  # arrays compare to arrays
        return False
