"""Every public function of `functional/` says what it takes and where it comes from, and its example runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import mllm_vision.functional

MODULES = [module.name for module in pkgutil.iter_modules(mllm_vision.functional.__path__)]
# what the losses are made of: not for users, and explained where it is used
TOOLS = {"checks", "precision", "random"}
HELPERS = {"draws_of_blocks"}
# arithmetic on images, on loss values and on eigenvalues: no paper is its source
WITHOUT_PAPER = {"patchify", "unpatchify", "random_masks", "spectrum", "spread"}
ANY_SHAPE = {"mutual_information_bound", "triplet_masks"}


def public_functions(name):
    module = importlib.import_module(f"mllm_vision.functional.{name}")
    for label, value in vars(module).items():
        own = inspect.isfunction(value) and value.__module__ == module.__name__
        if own and not label.startswith("_") and label not in HELPERS:
            yield label, inspect.getdoc(value) or ""


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(f"mllm_vision.functional.{name}")
    result = doctest.testmod(module)
    assert result.failed == 0
    if name not in TOOLS:
        assert result.attempted >= len(list(public_functions(name)))


@pytest.mark.parametrize("name", [name for name in MODULES if name not in TOOLS])
def test_every_function_has_shapes_a_source_and_an_example(name):
    for label, text in public_functions(name):
        parts = ["Args:", "Example:", ">>> "]
        if label not in WITHOUT_PAPER:
            parts.append("Reference:")
        if label not in ANY_SHAPE:
            parts.append("`[")
        assert [part for part in parts if part not in text] == [], label
