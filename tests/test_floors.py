"""The import floors of the package, read off the syntax trees; and what no file may contain."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mllm_vision"

FLOORS = {
    "functional": 0, "distributed": 0,
    "modules": 1, "encoder": 1, "data": 1, "hub": 1,
    "objectives": 2, "vlm": 2,
    "evaluation": 3,
    "training": 4,
    "cli": 5, "api": 5, "__main__": 5,
}  # fmt: skip
# Nothing imports recipes/ or scripts/. The one exception: the command line runs their files by path.
RUNS_FILES = {"mllm_vision.cli", "mllm_vision.api"}
LEAVES = {"errors", "lazy", "utils", "hub.lineage"}  # any room may import these, they import no room
# names of classes as text, which the package's own __init__ offers; they import no torch
REGISTRIES = {"objectives.registry", "evaluation.registry"}
# within one floor, who may import whom
SIDEWAYS = {
    ("encoder", "modules"),
    ("encoder", "data"),
    ("encoder", "hub"),
    ("hub", "encoder"),
    ("api", "cli"),
    ("__main__", "cli"),
}
# where modules take what they need from: floor 0 only, by design
CLOSED = {"report": set()}
# rooms limited to these packages, of the standard library too
LIMITED = {
    "functional": {"torch", "__future__", "collections", "concurrent", "dataclasses", "functools", "math", "threading",
                   "typing"},
}  # fmt: skip


def module_name(path: Path, root: Path = ROOT) -> list[str]:
    parts = list(path.relative_to(root).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(source: str, parts: list[str], is_package: bool) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of everything imported anywhere in a file, inside functions too."""
    found = []
    package = parts if is_package else parts[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{prefix}.{alias.name}") for alias in node.names]
    return found


def complaints(source: str, parts: list[str], is_package: bool = False) -> list[str]:
    """What the file `parts` (e.g. mllm_vision, vlm, model) imports against the floors."""
    bad = []
    room = parts[1] if len(parts) > 1 else None
    for line, name in imported(source, parts, is_package):
        words = name.split(".")
        if words[0] in ("recipes", "scripts", "tests", "tiny"):
            bad.append(f"line {line}: imports {name}; nothing imports {words[0]}")
            continue
        if words[0] == "runpy" or name.startswith(("importlib.util.spec_from", "importlib.machinery")):
            if ".".join(parts) not in RUNS_FILES:
                bad.append(f"line {line}: imports {name}; only {' and '.join(sorted(RUNS_FILES))} run files by path")
            continue
        if words[0] != "mllm_vision":
            allowed = LIMITED.get(room or "")
            if allowed is not None and words[0] not in allowed:
                bad.append(f"line {line}: {room} imports {name}; it may import {', '.join(sorted(allowed))} only")
            continue
        other = words[1] if len(words) > 1 else None
        leaf = not LEAVES.isdisjoint({other, ".".join(words[1:3])})
        if room not in ("errors", "lazy", "utils") and (other in (None, room, "__version__") or leaf):
            if other == room == "objectives" and _method(words) and _method(parts) not in (None, _method(words)):
                bad.append(f"line {line}: method {_method(parts)} imports its sibling {_method(words)}")
            continue
        if room is None and parts == ["mllm_vision"] and ".".join(words[1:3]) in REGISTRIES:
            continue
        if room is None:
            bad.append(f"line {line}: the package's own __init__ imports {name}; it must stay lazy")
        elif room in CLOSED:
            bad.append(f"line {line}: {room} imports {name}; it imports none of the other rooms")
        elif not LEAVES.isdisjoint({room, ".".join(parts[1:3])}):
            bad.append(f"line {line}: the leaf {'.'.join(parts[1:3])} imports {name}")
        elif other not in FLOORS or room not in FLOORS:
            if other not in {"report"} and (PACKAGE / other).exists():
                bad.append(f"line {line}: {room} imports {name}, a room without a floor; give it one in FLOORS")
            elif other == "report":
                bad.append(f"line {line}: {room} imports {name}; the report stands apart")
        elif FLOORS[other] > FLOORS[room]:
            bad.append(f"line {line}: {room} (floor {FLOORS[room]}) imports {name} (floor {FLOORS[other]}), upwards")
        elif FLOORS[other] == FLOORS[room] and FLOORS[room] > 0 and (room, other) not in SIDEWAYS:
            bad.append(f"line {line}: {room} imports {name} on its own floor")
    return bad


def _method(words: list[str]) -> str | None:
    """The method a file of objectives/ holds, None for what methods share (base, base_*) and the package itself."""
    if len(words) < 3 or words[2] in ("registry", "images", "image_text", "__init__") or not words[2].islower():
        return None
    if words[2].startswith("base"):
        return None
    return words[2] if (PACKAGE / "objectives" / f"{words[2]}.py").exists() else None


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected groups of more than one file (Tarjan), each sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in edges.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in edges:
        if node not in index:
            visit(node)
    return found


def file_imports() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, anywhere in the file."""
    names = {".".join(module_name(path)): path for path in package_files()}
    edges: dict[str, set[str]] = {}
    for name, path in names.items():
        found = imported(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py")
        targets = {target if target in names else target.rpartition(".")[0] for _, target in found}
        edges[name] = {target for target in targets if target in names and target != name}
    return edges


def test_no_circle_between_files() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles(file_imports()) == []


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", package_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path: Path) -> None:
    parts = module_name(path)
    found = complaints(path.read_text(encoding="utf-8"), parts, path.name == "__init__.py")
    assert not found, f"{path.relative_to(ROOT)}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("parts", "source", "word"),
    [
        (["mllm_vision", "encoder", "x"], "from mllm_vision.vlm import build_vlm", "upwards"),
        (["mllm_vision", "encoder", "x"], "def f():\n    from ..training.run import Run", "upwards"),
        (["mllm_vision", "modules", "x"], "import mllm_vision.encoder.features", "own floor"),
        (["mllm_vision", "data", "x"], "from mllm_vision import encoder", "own floor"),
        (["mllm_vision", "objectives", "x"], "from mllm_vision.vlm.model import A", "own floor"),
        (["mllm_vision", "objectives", "siglip"], "from .clip import CLIP", "sibling"),
        (["mllm_vision", "report", "x"], "from mllm_vision.functional import geometry", "none of the other rooms"),
        (["mllm_vision", "training", "x"], "import mllm_vision.report", "stands apart"),
        (["mllm_vision", "functional", "x"], "import transformers", "it may import"),
        (["mllm_vision", "functional", "x"], "import socket", "it may import"),
        (["mllm_vision", "vlm", "x"], "from recipes.align import main", "nothing imports"),
        (["mllm_vision", "training", "x"], "import runpy", "by path"),
        (["mllm_vision", "hub", "lineage"], "from mllm_vision.encoder import families", "leaf"),
        (["mllm_vision", "errors"], "from mllm_vision.training import run", "leaf"),
    ],
)
def test_a_breach_is_seen(parts: list[str], source: str, word: str) -> None:
    """The walker itself: each kind of breach is named, relative and nested imports included."""
    if "sibling" in word and not (PACKAGE / "objectives" / "clip.py").exists():
        pytest.skip("objectives/clip.py is not there")
    assert any(word in complaint for complaint in complaints(source, parts))


def test_allowed_imports_pass() -> None:
    lines = ["import torch", "from mllm_vision.modules import text", "from mllm_vision.errors import nearest"]
    source = "\n".join([*lines, "from . import sizes"])
    assert complaints(source, ["mllm_vision", "encoder", "x"]) == []


def source_files() -> list[Path]:
    folders = [PACKAGE, ROOT / "recipes", ROOT / "scripts"]
    return [path for folder in folders if folder.exists() for path in sorted(folder.rglob("*.py"))]


def test_what_no_file_contains() -> None:
    """No remote code, no torchvision, no pickled weights, no file that outgrew its reader."""
    bad = []
    for path in source_files():
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                bad.append(f"{name}:{node.value.lineno}: trust_remote_code")
        for line, module in imported(text, module_name(path), path.name == "__init__.py"):
            if module.split(".")[0] in ("torchvision", "timm", "open_clip", "pickle"):
                bad.append(f"{name}:{line}: imports {module}")
        if text.count("\n") > 450:  # "about 400"
            bad.append(f"{name}: {text.count(chr(10))} lines; split it")
    assert not bad, "\n".join(bad)


def test_the_package_and_help_import_no_torch(run_python) -> None:
    """`import mllm_vision`, its names listed, and parsing a recipe cost no torch import."""
    printed = run_python(
        "import sys, mllm_vision\n"
        "names = dir(mllm_vision)\n"
        "from mllm_vision.training import parse_recipe\n"
        "import mllm_vision.report, mllm_vision.hub.lineage\n"
        "print('VisionEncoder' in names, 'torch' in sys.modules, 'transformers' in sys.modules)",
        PYTHONPATH=str(ROOT),
    )
    assert printed.split() == ["True", "False", "False"]


def test_public_names_resolve() -> None:
    import mllm_vision

    for name in mllm_vision.__all__:
        assert getattr(mllm_vision, name) is not None, name
    with pytest.raises(AttributeError, match="VisionEncoder"):
        _ = mllm_vision.VisionEncodr
