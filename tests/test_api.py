"""docs/api.md is the reference of the public names, made of their docstrings: `python tests/test_api.py` writes it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import mllm_vision

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
HEAD = """# API reference

What `import mllm_vision` offers. Every name is imported when it is first used. These names do not change without a
line in the changelog; internals may.
"""
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):$")


def signature(name: str, found: Any) -> str:
    """As one would call it, without annotations: defaults say what is optional."""
    try:
        parameters = list(inspect.signature(found).parameters.values())
    except (TypeError, ValueError):
        return name
    if inspect.isclass(found) and "forward" in vars(found) and not parameters:
        return name
    shown, starred = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            shown.append("*")
            starred = True
        text = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "") + parameter.name
        starred |= parameter.kind is parameter.VAR_POSITIONAL
        if parameter.default is not parameter.empty:
            default = repr(parameter.default)
            text += f"={default if len(default) < 40 and ' object at ' not in default else '...'}"
        shown.append(text)
    return f"{name}({', '.join(shown)})"


def markdown(docstring: str) -> str:
    """A Google-style docstring as Markdown: sections are lists, examples are code."""
    lines, out, section = inspect.cleandoc(docstring).split("\n"), [], ""
    for line in lines:
        if match := SECTION.match(line):
            section = match[1]
            out += ["", f"**{section}**", ""]
        elif section and line.startswith("    ") and not line.startswith("     "):
            item, colon, rest = line.strip().partition(": ")
            named = colon and re.fullmatch(r"[\w*., \[\]|`()]+", item)
            out.append(f"- `{item.strip('`')}`: {rest}" if named else f"- {line.strip()}")
        elif section and line.startswith("     "):
            out.append(f"  {line.strip()}")
        else:
            section = section if not line else ""
            out.append(line)
    text, code = [], False
    for line in out:
        starts = line.startswith((">>> ", "... ")) or (code and line != "")
        if starts != code:
            text += ["", "```pycon"] if starts else ["```"]
            code = starts
        text.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join([*text, *["```"] * code])).strip()


def page() -> str:
    parts = [HEAD]
    for subject, names in mllm_vision._SUBJECTS.items():
        parts.append(f"## {subject}\n")
        for name in names:
            found = getattr(mllm_vision, name)
            parts.append(f"### `{signature(name, found)}`\n\n{markdown(found.__doc__ or '')}\n")
    return "\n".join(parts).rstrip() + "\n"


def test_the_page_is_that_of_the_docstrings() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/api.md is stale: run `python tests/test_api.py`"


def test_every_public_name_says_what_it_is() -> None:
    for name in mllm_vision.__all__:
        text = inspect.getdoc(getattr(mllm_vision, name)) or ""
        assert len(text.split("\n")[0]) > 15 and not text.startswith(name + "("), f"{name} has no docstring of its own"


def test_every_method_and_evaluator_is_public() -> None:
    """What the registries know is offered at the top, as the very class that they load."""
    from mllm_vision.evaluation.registry import list_evaluators, load_evaluator
    from mllm_vision.objectives.registry import list_objectives, load_objective

    known = [*map(load_objective, list_objectives()), *map(load_evaluator, list_evaluators())]
    assert len(known) > 20
    for found in known:
        assert getattr(mllm_vision, found.__name__) is found


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
