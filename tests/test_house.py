"""The house rules in numbers: functions, classes, recipes, files and rooms that stay readable."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FUNCTION, METHODS, RECIPE, FILE = 60, 12, 150, 400
# Room -> its lines at most. Lower a number when the room has shrunk; raise none without saying why.
ROOMS: dict[str, int] = {
    "package without vlm": 36200,
    "report and hub": 2050,
    "training": 7360,
}
# What is still longer, with its length: these only shrink, and an entry that is kept goes.
LONG_FUNCTIONS: dict[str, int] = {}
MANY_METHODS: dict[str, int] = {
    "mllm_vision/objectives/base.py:ImageObjective": 14,
}
LONG_FILES: dict[str, int] = {}
LONG_RECIPES: dict[str, int] = {}


def sources() -> list[Path]:
    return [path for folder in ("mllm_vision", "recipes", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines_of(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


def functions() -> dict[str, int]:
    """`file:function` -> lines from `def` to the last, without its docstring (which says what it must)."""
    found: dict[str, int] = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                key = f"{name_of(path)}:{node.name}"
                first = node.body[0]
                told = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) is not None else 0
                found[key] = max(found.get(key, 0), node.end_lineno - node.lineno + 1 - told)
    return found


def public_methods() -> dict[str, int]:
    """`file:Class` -> methods without a leading underscore; properties count as attributes."""
    found = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                methods = [part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)]
                names = {method.name for method in methods if not is_property(method)}
                found[f"{name_of(path)}:{node.name}"] = sum(not name.startswith("_") for name in names)
    return found


def is_property(method: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it is decorated with `property`, `cached_property` or a property's `setter`."""
    names = {getattr(part, "attr", getattr(part, "id", "")) for part in method.decorator_list}
    return not names.isdisjoint({"property", "cached_property", "setter"})


def rooms() -> Counter[str]:
    found: Counter[str] = Counter()
    for path in (ROOT / "mllm_vision").rglob("*.py"):
        room = path.relative_to(ROOT / "mllm_vision").parts[0]
        count = lines_of(path)
        found["training"] += count * (room == "training")
        found["report and hub"] += count * (room in ("report", "hub"))
        found["package without vlm"] += count * (room != "vlm")
    return found


@pytest.mark.parametrize(
    ("measured", "most", "allowed"),
    [
        pytest.param(functions, FUNCTION, LONG_FUNCTIONS, id="lines of a function"),
        pytest.param(public_methods, METHODS, MANY_METHODS, id="public methods of a class"),
        pytest.param(lambda: {name_of(p): lines_of(p) for p in sources()}, FILE, LONG_FILES, id="lines of a file"),
        pytest.param(
            lambda: {name_of(p): lines_of(p) for p in (ROOT / "recipes").glob("*.py")},
            RECIPE,
            LONG_RECIPES,
            id="lines of a recipe",
        ),
    ],
)
def test_nothing_outgrows_its_reader(measured, most: int, allowed: dict[str, int]) -> None:
    over = {name: count for name, count in measured().items() if count > most}
    wrong = [f"{name}: {count}, at most {allowed.get(name, most)}" for name, count in over.items()
             if count > allowed.get(name, most)]  # fmt: skip
    wrong += [f"{name}: is kept now, take it off the list" for name in allowed if name not in over]
    assert not wrong, "\n".join(wrong)


def test_rooms_keep_their_size() -> None:
    wrong = [f"{name}: {count} lines, at most {ROOMS[name]}" for name, count in rooms().items() if count > ROOMS[name]]
    assert not wrong, "\n".join(wrong)
