"""Result figures of README and docs against the stored results files: a stale number fails.

A figure is followed by the key it comes from, `0.881<!-- stage_two/accuracy -->`; docs/results/*.json hold the values
(quickstart.json is runs/quickstart/results.json). A table between `<!-- results:name -->` and `<!-- /results -->` has a
key behind each of its figures. `python tests/test_figures.py` writes the stored values into the pages.
"""

from __future__ import annotations

import json
import re
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")])
FIGURE = re.compile(r"(?P<figure>\d+(?:\.\d+)?)(?P<percent> ?%)?<!-- (?P<key>\w+/\w+) -->")
TABLE = re.compile(r"<!-- results:([\w-]+) -->\n(.*?)<!-- /results -->", re.S)
UNSTORED = {"cifar10", "cifar10_2000"}  # tables of runs whose results files were not kept
UNKEYED = {"67.0 %"}  # easy-VQA's question-only baseline, a model outside this repository


def stored() -> dict[str, float]:
    """Key to value of all results files."""
    values: dict[str, float] = {}
    for file in sorted((ROOT / "docs" / "results").glob("*.json")):
        found = {key: value for key, value in json.loads(file.read_text()).items() if not key.startswith("_")}
        assert not values.keys() & found.keys(), f"{file.name} repeats keys of another file"
        values |= found
    return values


def rounded(match: re.Match[str], values: dict[str, float]) -> str:
    """The stored value of a figure, to the digits that the page shows."""
    exact = Decimal(str(values[match["key"]])) * (100 if match["percent"] else 1)
    return str(exact.quantize(Decimal(1).scaleb(-len(match["figure"].partition(".")[2])), ROUND_HALF_EVEN))


def stale(text: str, values: dict[str, float]) -> list[str]:
    """Figures that are not the stored value, rounded to the digits that are shown."""
    wrong = []
    for match in FIGURE.finditer(text):
        line, figure, key = text.count("\n", 0, match.start()) + 1, match["figure"], match["key"]
        if key not in values:
            wrong.append(f"line {line}: {key} is in no file of docs/results")
        elif (exact := rounded(match, values)) != figure:
            wrong.append(f"line {line}: {key} is {exact} in docs/results, and {figure} on the page")
    return wrong


def rewritten(text: str, values: dict[str, float]) -> str:
    """The page with the stored values."""

    def figure(match: re.Match[str]) -> str:
        return match[0] if match["key"] not in values else rounded(match, values) + match[0][len(match["figure"]) :]

    return FIGURE.sub(figure, text)


def unkeyed(text: str) -> list[str]:
    """Figures in marked tables that name no key."""
    found = []
    for name, body in TABLE.findall(text):
        for row in body.splitlines()[2:] if name not in UNSTORED else ():
            cells = "|".join(row.split("|")[2:])
            left = re.sub(r"R@\d+", "", FIGURE.sub("", re.sub(r"\w+260K", "", cells)))
            found += [f"{name}: {figure}" for figure in re.findall(r"\d+\.\d+(?: %)?", left) if figure not in UNKEYED]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_figures_are_those_of_the_results_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    wrong = stale(text, stored()) + unkeyed(text)
    assert not wrong, f"{page.relative_to(ROOT)}:\n" + "\n".join(wrong)


def test_most_figures_carry_a_key() -> None:
    """The pattern still finds them."""
    shown = {match["key"] for page in PAGES for match in FIGURE.finditer(page.read_text(encoding="utf-8"))}
    assert len(shown) > 90 and shown <= stored().keys()


def test_a_stale_figure_is_seen() -> None:
    values = {"a/b": 0.88149, "a/c": 156.2}
    assert stale("0.881<!-- a/b --> 88.1 %<!-- a/b --> 156<!-- a/c -->", values) == []
    (wrong,) = stale("\n0.882<!-- a/b -->", values)
    assert wrong == "line 2: a/b is 0.881 in docs/results, and 0.882 on the page"
    assert rewritten("0.882<!-- a/b --> 88.2 %<!-- a/b -->", values) == "0.881<!-- a/b --> 88.1 %<!-- a/b -->"
    assert "a/d is in no file" in stale("0.1<!-- a/d -->", values)[0]
    table = "<!-- results:x -->\n| a | b |\n| --- | --- |\n| k | 0.5 and 0.25<!-- a/b --> |\n<!-- /results -->"
    assert unkeyed(table) == ["x: 0.5"]


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rewritten(page.read_text(encoding="utf-8"), stored()), encoding="utf-8")
