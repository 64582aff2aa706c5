"""Parse the flags of a recipe or script without running it."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]


class Parsed(BaseException):
    """Raised in the place of what comes after parsing; no `except Exception` swallows it."""

    def __init__(self, values: Any) -> None:
        super().__init__("parsed")
        self.values = values


def _load(target: str) -> Any:
    if not target.endswith(".py"):
        return importlib.import_module(target)
    path = ROOT / target
    spec = importlib.util.spec_from_file_location(f"dry_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def dry_parse(target: str, argv: list[str]) -> Any:
    """What `target` ("recipes/x.py" or a module for -m) makes of `argv`; its own errors come through.

    Dataclasses are constructed, so that their own checks run; TrainingArguments are not, because theirs ask
    for the hardware of the machine the config is meant for.
    """
    from mllm_vision.training.recipe import parser as recipe
    from mllm_vision.training.recipe.common import CommonArguments

    def parse_recipe(*classes: type, argv: Any = None, description: str = "", defaults: Any = None) -> tuple:
        given = recipe.read_recipe(*classes, argv=argv, defaults=defaults)
        for cls, values in zip(classes, given):
            if not issubclass(cls, CommonArguments):
                cls(**values)
        raise Parsed(dict(item for values in given for item in values.items()))

    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        raise Parsed(vars(original(self, args, namespace)))

    module = _load(target)
    patches = [
        mock.patch.object(recipe, "parse_recipe", parse_recipe),
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args),
        mock.patch.object(sys, "argv", [target, *argv]),
    ]
    if hasattr(module, "parse_recipe"):
        patches.append(mock.patch.object(module, "parse_recipe", parse_recipe))
    try:
        for patch in patches:
            patch.start()
        try:
            takes_argv = bool(inspect.signature(module.main).parameters)
            module.main(list(argv)) if takes_argv else module.main()
        except Parsed as parsed:
            return parsed.values
        except SystemExit as stop:
            raise ValueError(f"{target} {' '.join(argv)}: stopped with {stop.code}") from stop
    finally:
        for patch in reversed(patches):
            patch.stop()
    raise AssertionError(f"{target}: main() parses neither with parse_recipe nor with argparse")
