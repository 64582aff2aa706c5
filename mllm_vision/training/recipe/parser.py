"""Recipes from flags and YAML: a config is saved flags, the command line wins, an unknown key is an error.

Every field of the dataclasses given to `parse_recipe` is a flag (`--max_steps` or `--max-steps`) and a YAML key.
Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from mllm_vision.errors import IncompleteRun, explain, nearby, tidy, unknown_name
from mllm_vision.training.recipe.flag_types import convert, is_bool, is_list, read_yaml, type_name
from mllm_vision.training.recipe.launch import EXIT_CODE, is_collective_error, lost_rank, tell_launcher

_GIVEN = "_recipe_values"  # on an instance: what its constructor was given, and what became of it
# never written to recipe.yaml: a secret, and what belongs to one start of the run, not to the run
_SWITCH = "allow_import"  # a flag of every parser, as --config is
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

    A field with `metadata["imports"]` takes names such as `package.module:Class`, which make Python import a module.
    One that stands in a file of `--config` is refused unless the command line says `--allow_import`: a config is data
    that people share, and importing runs code.

    A bool field is `--bf16`, `--bf16 true`, `--bf16 false` or `--no_bf16`; a list takes several values; a dict
    takes JSON or `key=value,key=value`. `--help` prints every flag and ends the process.

    Args:
        classes: dataclasses; a field's `metadata["help"]` becomes its help, `metadata["aliases"]` are other names.
        argv: the words after the program's name; the process's own by default.
        description: the first lines of the help.
        defaults: field -> value in place of the dataclasses' own defaults (a method's); file and flags win.

    Raises:
        ValueError: an unknown flag or key (naming the nearest known one), a value of a wrong type (with the
            value and the type expected), a required flag missing.
        FileNotFoundError: the file of `--config` does not exist.
    """
    values = read_recipe(*classes, argv=argv, description=description, defaults=defaults)
    return tuple(build(cls, given) for cls, given in zip(classes, values))


def build(cls: type, given: dict[str, Any]) -> Any:
    """One instance of the dataclass `cls` that remembers what it was given (see `recipe_dict`)."""
    instance = cls(**given)
    kept = [field for field in dataclasses.fields(cls) if field.name not in _UNSAVED]  # no secret lies about
    resolved = {field.name: getattr(instance, field.name) for field in kept}
    values = {field.name: given.get(field.name, _default(field)) for field in kept}
    object.__setattr__(instance, _GIVEN, (values, resolved))
    return instance


def read_recipe(
    *classes: type,
    argv: Sequence[str] | None = None,
    description: str = "",
    defaults: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """As `parse_recipe`, but only the checked keyword arguments of each class; nothing is constructed."""
    fields = _known_fields(classes)
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        print(_help(classes, description, defaults or {}))
        raise SystemExit(0)
    flags = _split_flags(words, fields)
    values: dict[str, Any] = {}
    allowed = flags.pop(_SWITCH, ["false"]) == ["true"]
    for config in flags.pop("config", []):
        found = _read_config(config, fields)
        for name in found:
            if fields[name][0].metadata.get("imports") and name not in flags:
                _check_import(name, found[name], config, allowed)
        values.update(found)
    for name, texts in flags.items():
        values[name] = convert(texts, fields[name][1], f"--{name}", words=True)
    settled = dict(defaults or {})
    for name in settled:
        if name not in fields:
            raise ValueError(unknown_name("default", name, fields))
    for cls in classes:
        if hasattr(cls, "settle_defaults"):  # a class may say which defaults the values given take the place of
            settled = cls.settle_defaults(values, settled)
    values = {**settled, **values}
    missing = [f"--{name}" for name, (field, _, _) in fields.items() if name not in values and _required(field)]
    if missing:
        raise ValueError(f"missing: {', '.join(missing)} (a flag, or a key of --config; --help lists all)")
    return [{name: values[name] for name in values if fields[name][2] is cls} for cls in classes]


def peek_recipe(name: str, default: Any = None, *, argv: Sequence[str] | None = None) -> Any:
    """The value of one flag before the full parse, from the command line or the `--config` file.

    For recipes where one flag decides which other flags exist (`--objective` chooses its Config dataclass).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    found: dict[str, str] = {}
    for position, word in enumerate(words):
        flag, equals, value = word.partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and key in (name, "config"):
            if not equals and position + 1 < len(words):
                value = words[position + 1]
            found[key] = value
    if name in found:
        return found[name]
    if "config" not in found:
        return default
    value = _load_yaml(found["config"]).get(name, default)
    _check_import(name, value, found["config"], any(word.startswith(f"--{_SWITCH}") for word in words))
    return value


def _check_import(name: str, value: Any, config: str, allowed: bool) -> None:
    """Refuses a name in a file that would make Python import a module, unless the command line allows it."""
    names = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
    modules = [each for each in names if re.fullmatch(r"[\w.]+:\w+", each.strip())]
    if modules and not allowed:
        raise ValueError(
            f"{config}: {name}: {modules[0]} would import the module {modules[0].partition(':')[0]}, and importing "
            f"runs its code; add --allow_import to the command line if you trust it, or name it there (--{name} "
            f"{modules[0]})"
        )


def recipe_dict(*instances: Any) -> dict[str, Any]:
    """All flags as resolved, flat and fit for YAML: what `recipe.yaml` holds and `--config` reads back.

    A field that a class's own `__post_init__` rewrote (an enum, a parsed dict) is written as it was given, so
    that reading it back reproduces it; one that was set after construction is written as it is now; one that is
    derived from another (`derived_fields` of the class) is null, and the other says it. Secrets
    (`hub_token`) and what belongs to a single start (`overwrite`, `resume`) are left out.
    """
    flat: dict[str, Any] = {}
    for instance in instances:
        given, resolved = getattr(instance, _GIVEN, ({}, {}))
        for field in dataclasses.fields(instance):
            if not field.init or field.name in _UNSAVED:
                continue
            now = getattr(instance, field.name)
            untouched = field.name in given and _same(now, resolved[field.name])
            value = given[field.name] if untouched else now
            flat[field.name] = None if field.name in getattr(instance, "derived_fields", ()) else _yamlable(value)
    return flat


def run_recipe(main: Callable[[], Any]) -> None:
    """Run a recipe's `main()`: a user's error becomes `error: ...` on stderr and exit code 2, without traceback.

    Exit code 3 says: trained and saved, and something after it failed (`Run.after_training`). 75: another rank was
    lost.

    `MLLM_VISION_TRACEBACK=1` shows the traceback all the same.
    """
    for stream in (sys.stdout, sys.stderr):  # a pipe that takes ascii alone shows signs escaped, and ends no run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except IncompleteRun as error:
        print(f"error: {tidy(str(error))}", file=sys.stderr)
        raise SystemExit(3) from None
    except Exception as error:
        tell_launcher(error)
        told = explain(error)
        if told is None and is_collective_error(error):
            print(lost_rank(error), file=sys.stderr)
            raise SystemExit(EXIT_CODE) from None
        if told is None or os.environ.get("MLLM_VISION_TRACEBACK", "0") not in ("", "0"):
            raise
        print(f"error: {told}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; a run with checkpoints goes on with --resume", file=sys.stderr)
        raise SystemExit(130) from None


# ---- reading -----------------------------------------------------------------------------------------------


def _known_fields(classes: Sequence[type]) -> dict[str, tuple[dataclasses.Field, Any, type]]:
    known: dict[str, tuple[dataclasses.Field, Any, type]] = {}
    for cls in classes:
        if "__dataclass_fields__" not in vars(cls) and "__annotations__" in vars(cls):  # its fields would be no flags
            raise ValueError(f"{cls.__qualname__} has fields and is no dataclass; put @dataclass above the class")
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if not field.init:
                continue
            if field.name in known:
                other = known[field.name][2].__name__
                raise ValueError(f"both {other} and {cls.__name__} have a field {field.name!r}; rename one of them")
            known[field.name] = (field, hints[field.name], cls)
    return known


def _aliases(fields: dict) -> dict[str, str]:
    """Other names of fields -> their own."""
    return {alias: name for name, (field, _, _) in fields.items() for alias in field.metadata.get("aliases", ())}


def _split_flags(words: list[str], fields: dict) -> dict[str, list[str]]:
    """Flag -> its words; the last one wins where a flag is repeated."""
    flags: dict[str, list[str]] = {}
    aliases = _aliases(fields)
    switch = [_SWITCH] * any(field.metadata.get("imports") for field, _, _ in fields.values())
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("--") or word == "--":
            raise ValueError(f"unexpected argument {word!r}; every value follows a --flag")
        flag, equals, value = word[2:].partition("=")
        name = flag.replace("-", "_")
        name = aliases.get(name, name)
        negated = name.removeprefix("no_")
        if name == _SWITCH and switch:
            flags[name] = [value.lower() or "true"]
            if not equals and position < len(words) and words[position].lower() in ("true", "false"):
                flags[name] = [words[position].lower()]
                position += 1
            continue
        if name not in fields and name != "config":
            if name.startswith("no_") and negated in fields and is_bool(fields[negated][1]) and not equals:
                flags[negated] = ["false"]
                continue
            raise ValueError(unknown_name("flag", name, [*fields, *aliases, "config", *switch], prefix="--"))
        if equals:
            flags[name] = [value]
            continue
        hint = str if name == "config" else fields[name][1]
        taken: list[str] = []
        while position < len(words) and not words[position].startswith("--"):
            if taken and not is_list(hint):
                break
            taken.append(words[position])
            position += 1
        if not taken and is_bool(hint):
            taken = ["true"]
        if not taken and not is_list(hint):
            raise ValueError(f"--{name} needs a value ({type_name(hint)})")
        flags[name] = taken
    return flags


def _load_yaml(path: str) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--config {path}: no such file{nearby(path)}")
    try:
        content = read_yaml(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `flag: value` lines, got {type(content).__name__}")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _read_config(path: str, fields: dict) -> dict[str, Any]:
    values = {}
    aliases = _aliases(fields)
    for key, value in _load_yaml(path).items():
        name = aliases.get(key, key)
        if name not in fields:
            raise ValueError(f"{path}: {unknown_name('key', name, fields)}")
        values[name] = convert(value, fields[name][1], f"{path}: {name}")
    return values


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


# ---- writing -----------------------------------------------------------------------------------------------


def _same(left: Any, right: Any) -> bool:
    try:
        return bool(left is right or left == right)
    except (ValueError, RuntimeError):  # arrays compare to arrays
        return False


def _yamlable(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return _yamlable(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {str(key): _yamlable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_yamlable(entry) for entry in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _yamlable(dataclasses.asdict(value))
    return str(value)


def _help(classes: Sequence[type], description: str, defaults: dict[str, Any]) -> str:
    lines = [description.strip(), ""] if description else []
    lines += ["  --config FILE", "        YAML of saved flags; flags on the command line win"]
    if any(field.metadata.get("imports") for cls in classes for field in dataclasses.fields(cls)):
        lines += [f"  --{_SWITCH}", "        a name in that file may import a module (package.module:Class)"]
    for cls in classes:
        lines += ["", f"{cls.__qualname__}:"]  # of a method: SimCLR.Config
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if not field.init:
                continue
            value = _yamlable(defaults.get(field.name, _default(field)))
            default = "required" if _required(field) else f"default {value}"
            names = ", ".join(f"--{name}" for name in (field.name, *field.metadata.get("aliases", ())))
            lines.append(f"  {names}  ({type_name(hints[field.name])}; {default})")
            if field.metadata.get("help"):
                lines.append(f"        {field.metadata['help']}")
    return "\n".join(lines)
