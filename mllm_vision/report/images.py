"""The parts of a stage with images in them: views, maps over images, sample answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllm_vision.report.chain import Stage, as_dict, as_list
from mllm_vision.report.format import clipped, embedded, veil


def views(stage: Stage) -> list[dict[str, Any]]:
    """Images, each beside the random views that the method compared."""
    rows = []
    for entry in map(as_dict, as_list(stage.array("views"))):
        image = embedded(entry.get("image"))
        made = [(n, embedded(each)) for n, each in enumerate(as_list(entry.get("views")), 1) if embedded(each)]
        if image and made:
            rows.append({"image": image, "views": made})
    return rows


def maps(stage: Stage) -> list[dict[str, Any]]:
    """Images in rows: the image as the model sees it, then one veiled copy a text."""
    rows = []
    for entry in map(as_dict, as_list(stage.array("maps"))):
        image = embedded(entry.get("image"))
        items = [_map(item) for item in map(as_dict, as_list(entry.get("items")))]
        items = [item for item in items if item]
        if image and items:
            rows.append({"image": image, "items": items})
    return rows


def _map(item: dict[str, Any]) -> dict[str, Any] | None:
    grid = as_list(item.get("grid"))
    if not grid or not all(as_list(row) for row in grid):
        return None
    score = item.get("score")
    return {
        "veil": veil(grid),
        "text": str(item.get("text", "")),
        "kind": item.get("kind"),
        "answer": item.get("answer", ""),
        "score": f"{score:.2f}" if isinstance(score, (int, float)) else "",
        "empty": not any(isinstance(value, (int, float)) and value > 0 for row in grid for value in row),
    }


def sample_cards(samples: Sequence[dict[str, Any]], most: int = 12) -> list[dict[str, Any]]:
    """Right and wrong answers, each with its image; answers that nobody judged stand beside their reference."""
    groups = []
    for css, wanted, title, before in (
        ("right", True, "Correct answers", ""),
        ("wrong", False, "Wrong answers", "correct: "),
        ("open", None, "Outputs", "reference: "),
    ):
        cards = [_card(sample, before) for sample in samples if _judged(sample) is wanted][:most]
        small = all(len(card["said"]) < 24 and not card["question"] and card["image"] for card in cards)
        if cards:
            groups.append({"title": title, "css": css, "small": small, "cards": cards})
    return groups


def _judged(sample: dict[str, Any]) -> bool | None:
    value = sample.get("correct")
    return None if value is None else bool(value)


def _card(sample: dict[str, Any], before: str) -> dict[str, Any]:
    answer = sample.get("answer") or sample.get("reference") or ""
    truths = [clipped(each, 100) for each in as_list(sample.get("references"))[:3]]
    return {
        "image": embedded(sample.get("image")),
        "question": sample.get("question") or sample.get("prompt") or "",
        "said": clipped(sample.get("prediction") or sample.get("continuation") or "") or "(nothing)",
        "truth": before + " / ".join(truths or [clipped(answer)]) if before and (truths or answer) else "",
        "tag": str(sample.get("question_type") or "").replace("_", " "),
    }
