"""The chain as a diagram: a box for each stage, an arrow wherever one stage's weights became another's parent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mllm_vision.report.chain import STAGES, Chain, Stage, as_dict, as_list
from mllm_vision.report.format import compact, duration, number, short_hash
from mllm_vision.report.results import numbers

Edge = tuple[str, str, str]


@dataclass
class Box:
    """A stage, its (hash, text) lines, and its place: levels before it, slots across (centred)."""

    stage: Stage
    lines: list[tuple[str, str]]
    level: int
    slot: float


def data_rows(stage: Stage) -> float | None:
    """Rows of the training data, as the run recorded them."""
    data = as_dict(stage.run.get("data"))
    found = (numbers(data.get(role)).get("rows") for role in ("train", *data))
    return next((rows for rows in found if rows is not None), None)


def box_lines(stage: Stage) -> list[tuple[str, str]]:
    """(hash, text) lines of a stage's box; most have no hash."""
    run, lines = stage.run, []
    rows = data_rows(stage)
    if rows is not None:
        lines.append(("", f"{number(rows)} training rows"))
    modules = [numbers(module) for module in as_list(run.get("modules"))]
    flags = [bool(as_dict(module).get("trainable")) for module in as_list(run.get("modules"))]
    total = sum(module.get("parameters", 0.0) for module in modules)
    trained = sum(module.get("parameters", 0.0) for module, trains in zip(modules, flags) if trains)
    if total:
        part = "" if trained == total else f"{compact(trained)} of "
        lines.append(("", f"{part}{compact(total)} weights trained"))
    seconds = numbers(run).get("seconds")
    if seconds is not None:
        lines.append(("", duration(seconds)))
    for artifact in map(as_dict, as_list(run.get("artifacts"))):
        if artifact.get("weights_sha256"):
            lines.append((short_hash(artifact["weights_sha256"]), str(artifact.get("name", "weights"))[:16]))
    return lines


def edges(chain: Chain) -> list[Edge]:
    """(parent stage, child stage, role): by weight hash, else by the parent's kind.

    A tokenizer holds no weights, so it makes no arrow.
    """
    owners: dict[str, str] = {}
    for stage in chain.stages:
        for artifact in map(as_dict, as_list(stage.run.get("artifacts"))):
            if digest := artifact.get("weights_sha256"):
                owners.setdefault(str(digest), stage.name)
    found: dict[Edge, None] = {}
    for stage in chain.stages:
        for parent in map(as_dict, as_list(stage.run.get("parents"))):
            digest = parent.get("weights_sha256")
            owner = owners.get(str(digest)) if digest else str(parent.get("kind", ""))
            if owner and owner != stage.name and chain.stage(owner) and parent.get("role") != "tokenizer":
                found[owner, stage.name, str(parent.get("role", "")).replace("_", " ")] = None
    return list(found)


def _levels(chain: Chain, links: list[Edge]) -> dict[str, int]:
    """How many stages stand before each one."""
    level = {stage.name: 0 for stage in chain.stages}
    for _ in chain.stages:
        for parent, child, _role in links:
            level[child] = min(max(level[child], level[parent] + 1), len(level))
    if not links:  # no recorded parents: one after the other, in the order of the chain
        level = {name: place for place, name in enumerate(name for name in STAGES if name in level)} or level
    return level


def lineage(chain: Chain) -> dict[str, Any]:
    """The boxes, the arrows between them, and how many levels, slots and lines of text there are."""
    drawn = Chain(stages=[stage for stage in chain.stages if stage.run])
    if len(drawn.stages) < 2:
        return {}
    links = edges(drawn)
    level = _levels(drawn, links)
    rows: dict[int, list[Stage]] = {}
    for stage in drawn.stages:
        rows.setdefault(level.get(stage.name, 0), []).append(stage)
    most = max(map(len, rows.values()))
    boxes = [
        Box(stage, box_lines(stage), place, (most - len(rows[key])) / 2 + index)
        for place, key in enumerate(sorted(rows))
        for index, stage in enumerate(rows[key])
    ]
    by_name = {box.stage.name: box for box in boxes}
    return {
        "boxes": boxes,
        "arrows": [(by_name[parent], by_name[child], role) for parent, child, role in links],
        "levels": len(rows),
        "slots": most,
        "lines": max(len(box.lines) for box in boxes),
    }
