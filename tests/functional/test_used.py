"""Nothing in functional/ is there for its own sake: an objective, an evaluator or the preflight uses every name."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "mllm_vision"


def names_in(node: ast.AST) -> set[str]:
    """Names and attributes that are read anywhere inside."""
    return {part.id if isinstance(part, ast.Name) else part.attr for part in ast.walk(node)
            if isinstance(part, (ast.Name, ast.Attribute))}  # fmt: skip


def unused(functional: dict[str, set[str]], outside: set[str]) -> set[str]:
    """Public names that nothing outside reaches; `functional` says what the definition of a name reads."""
    reached, new = set(), {name for name in functional if name in outside}
    while new:
        reached |= new
        new = {name for user in new for name in functional[user] if name in functional} - reached
    return {name for name in functional if not name.startswith("_")} - reached


def test_every_public_name_is_used():
    functional: dict[str, set[str]] = {}
    outside: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.is_relative_to(PACKAGE / "functional"):
            for node in tree.body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    functional[node.name] = functional.get(node.name, set()) | names_in(node)
        else:
            outside |= names_in(tree)
    assert {"contrastive", "dcl", "triplet", "softmax_losses"} <= functional.keys()
    assert not (left := unused(functional, outside)), f"no objective, evaluator or preflight uses {sorted(left)}"


def test_the_check_can_fail():
    functional = {"a": {"_b"}, "_b": {"c"}, "c": set(), "d": {"a"}}
    assert unused(functional, {"a", "x"}) == {"d"}
    assert unused(functional, {"x"}) == {"a", "c", "d"}
