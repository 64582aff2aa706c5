"""The chain as an image: a box a stage, an arrow wherever one stage's weights became another's parent."""

from __future__ import annotations

from typing import Any

from mllm_vision.report.chain import STAGES, Chain, Stage, as_dict, as_list
from mllm_vision.report.markup import compact, duration, esc, number, short_hash
from mllm_vision.report.results import numbers

BOX_WIDTH, LINE = 236, 18
WHAT = {
    "stage_zero": "vision encoder",
    "language_model": "from text alone",
    "stage_one": "projector, aligned on captions",
    "stage_two": "instructed to answer",
}


def data_rows(stage: Stage) -> float | None:
    """Rows of the training data, as the run recorded them."""
    data = as_dict(stage.run.get("data"))
    for role in ("train", *data):
        rows = numbers(as_dict(data.get(role))).get("rows")
        if rows is not None:
            return rows
    return None


def box_lines(stage: Stage) -> list[str]:
    """What stands in a stage's box, already escaped."""
    run, lines = stage.run, []
    rows = data_rows(stage)
    if rows is not None:
        lines.append(f"{number(rows)} training rows")
    modules = [as_dict(module) for module in as_list(run.get("modules"))]
    trained = sum(int(module.get("parameters", 0)) for module in modules if module.get("trainable"))
    total = sum(int(module.get("parameters", 0)) for module in modules)
    if total:
        lines.append(
            f"{compact(trained)} of {compact(total)} weights trained"
            if trained != total
            else f"{compact(total)} weights trained"
        )
    seconds = numbers(run).get("seconds")
    if seconds is not None:
        lines.append(duration(seconds))
    for artifact in as_list(run.get("artifacts")):
        artifact = as_dict(artifact)
        if artifact.get("weights_sha256"):
            name = esc(str(artifact.get("name", "weights"))[:16])
            lines.append(f"<tspan class=hash>{short_hash(artifact['weights_sha256'])}</tspan> {name}")
    return lines


def edges(chain: Chain) -> list[tuple[str, str, str]]:
    """(parent stage, child stage, role): by weight hash, else by the parent's kind.

    A tokenizer holds no weights, so it makes no arrow.
    """
    owners: dict[str, str] = {}
    for stage in chain.stages:
        for artifact in as_list(stage.run.get("artifacts")):
            digest = as_dict(artifact).get("weights_sha256")
            if digest:
                owners.setdefault(str(digest), stage.name)
    found: list[tuple[str, str, str]] = []
    for stage in chain.stages:
        for parent in as_list(stage.run.get("parents")):
            parent = as_dict(parent)
            if parent.get("role") == "tokenizer":
                continue
            owner = owners.get(str(parent.get("weights_sha256")))
            if owner is None and not parent.get("weights_sha256"):
                owner = str(parent.get("kind", ""))
            if owner and owner != stage.name and chain.stage(owner):
                edge = (owner, stage.name, str(parent.get("role", "")).replace("_", " "))
                if edge not in found:
                    found.append(edge)
    return found


def _levels(chain: Chain, links: list[tuple[str, str, str]]) -> dict[str, int]:
    """How many stages stand before each one."""
    level = {stage.name: 0 for stage in chain.stages}
    for _ in chain.stages:
        for parent, child, _role in links:
            level[child] = min(max(level[child], level[parent] + 1), len(level))
    if not links:  # no recorded parents: one after the other, in the order of the chain
        level = {name: place for place, name in enumerate(name for name in STAGES if name in level)} or level
    return level


def lineage(chain: Chain) -> str:
    """The diagram, side by side for wide pages and top to bottom for narrow ones (the style sheet picks
    one).
    """
    stages = [stage for stage in chain.stages if stage.run]
    if not stages:
        return ""
    drawn = Chain(stages=stages)
    links = edges(drawn)
    level = _levels(drawn, links)
    wide, tall = _draw(drawn, links, level, False), _draw(drawn, links, level, True)
    return f"<div class='lineage wide'>{wide}</div><div class='lineage tall'>{tall}</div>"


def _draw(chain: Chain, links: list[tuple[str, str, str]], level: dict[str, int], tall: bool) -> str:
    heights = {stage.name: 62 + LINE * len(box_lines(stage)) for stage in chain.stages}
    box = max(heights.values())
    rows: dict[int, list[Stage]] = {}
    for stage in chain.stages:
        rows.setdefault(level.get(stage.name, 0), []).append(stage)
    order = sorted(rows)
    most = max(len(row) for row in rows.values())
    gap_along, gap_across = (62, 22) if tall else (96, 26)
    along, across = (box, BOX_WIDTH) if tall else (BOX_WIDTH, box)
    length = len(order) * along + (len(order) - 1) * gap_along
    breadth = most * across + (most - 1) * gap_across
    place: dict[str, tuple[float, float]] = {}
    for step, key in enumerate(order):
        used = len(rows[key]) * across + (len(rows[key]) - 1) * gap_across
        for index, stage in enumerate(rows[key]):
            a, b = step * (along + gap_along), (breadth - used) / 2 + index * (across + gap_across)
            place[stage.name] = (b + 2, a + 2) if tall else (a + 2, b + 2)
    width, height = (breadth, length) if tall else (length, breadth)
    parts = [_arrow(place[a], place[b], box, tall, role) for a, b, role in links if a in place and b in place]
    parts += [_box(stage, *place[stage.name], box) for stage in chain.stages]
    key = "t" if tall else "w"
    marker = (
        f'<defs><marker id="arrow-{key}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        'orient="auto"><path class=arrow-head d="M0 0L8 4L0 8z"/></marker></defs>'
    )
    return (
        f'<svg viewBox="0 0 {width + 4:.0f} {height + 4:.0f}" style="max-width:{width + 4:.0f}px" role="img" '
        f'aria-label="lineage of the stages">{marker}{"".join(parts)}</svg>'
    )


def _box(stage: Stage, x: float, y: float, height: float) -> str:
    lines = "".join(
        f'<text x="{x + 16}" y="{y + 66 + LINE * index}">{text}</text>' for index, text in enumerate(box_lines(stage))
    )
    return (
        f'<g class=box><rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{height}" rx="10"/>'
        f'<rect class="edge {esc(stage.name)}" x="{x}" y="{y + 12}" width="4" height="{height - 24}" rx="2"/>'
        f'<text class=box-title x="{x + 16}" y="{y + 25}">{esc(stage.title)}</text>'
        f'<text class=box-what x="{x + 16}" y="{y + 43}">{esc(WHAT.get(stage.name, ""))}</text>{lines}</g>'
    )


def _arrow(start: tuple[float, float], end: tuple[float, float], box: float, tall: bool, role: str) -> str:
    if tall:
        x1, y1, x2, y2 = start[0] + BOX_WIDTH / 2, start[1] + box, end[0] + BOX_WIDTH / 2, end[1] - 3
        middle = (y1 + y2) / 2
        path = f"M{x1} {y1}C{x1} {middle} {x2} {middle} {x2} {y2}"
        left = x1 < x2
        text: Any = (x1 - 8 if left else x1 + 8, y1 + 20, "end" if left else "start")
    else:
        x1, y1, x2, y2 = start[0] + BOX_WIDTH, start[1] + box / 2, end[0] - 3, end[1] + box / 2
        middle = (x1 + x2) / 2
        path = f"M{x1} {y1}C{middle} {y1} {middle} {y2} {x2} {y2}"
        text = (x1 + 8, y1 - 8 if y1 <= y2 else y1 + 18, "start")
    marker = "t" if tall else "w"
    return (
        f'<path class=arrow d="{path}" marker-end="url(#arrow-{marker})"/>'
        f'<text class=role x="{text[0]}" y="{text[1]}" text-anchor="{text[2]}">{esc(role)}</text>'
    )
