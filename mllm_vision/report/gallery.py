"""The parts of the page with images in them: maps over images and sample answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllm_vision.report.chain import as_dict, as_list
from mllm_vision.report.markup import esc, image, png


def veil(grid: Sequence[Sequence[float]]) -> str:
    """A white veil over what does not matter; where the map is strong, the image shines through.

    Only what speaks for the text counts (negative values are as unimportant as zero); the strongest square is
    fully clear.
    """
    values = [max(float(value), 0.0) for row in grid for value in row]
    top = max(values, default=0.0) or 1.0
    return png(
        [[(255, 255, 255, round(228 * max(0.0, 1 - 1.5 * max(float(v), 0.0) / top))) for v in row] for row in grid]
    )


def maps_gallery(maps: Any) -> str:
    """Images in rows: the image as the model sees it, then one veiled copy a text."""
    rows = []
    for entry in as_list(maps):
        entry = as_dict(entry)
        source = entry.get("image", "")
        base = image(source, "pixels")
        items = [as_dict(item) for item in as_list(entry.get("items"))]
        if not base or not items:
            continue
        cells = [f"<figure>{base}<figcaption class=muted>image</figcaption></figure>"]
        for item in items:
            grid = as_list(item.get("grid"))
            if not grid or not all(as_list(row) for row in grid):
                continue
            text = esc(item.get("text", ""))
            empty = all(not isinstance(v, (int, float)) or v <= 0 for row in grid for v in row)
            if item.get("kind") == "answer":
                text += f"<br><b>{esc(item.get('answer', ''))}</b>"
            elif item.get("kind") == "occlusion":
                text = f"&ldquo;{text}&rdquo;"
                if isinstance(item.get("score"), (int, float)):
                    text += f" <span class=muted>{item['score']:.2f}</span>"
            if empty:
                text += "<br><span class=muted>no single square matters</span>"
            cells.append(
                f"<figure><div class=veiled>{base}{image(veil(grid), 'veil')}</div>"
                f"<figcaption>{text}</figcaption></figure>"
            )
        rows.append(f"<div class=map-row>{''.join(cells)}</div>")
    if not rows:
        return ""
    return (
        "<p class=note>White covers what does not matter. For a text or an answer, a square counts by how much the "
        "score falls when that square is painted over in the image's own ground colour; attention is the last "
        f"layer's, as it is.</p><div class=maps>{''.join(rows)}</div>"
    )


def sample_cards(samples: Sequence[dict[str, Any]], most: int = 12) -> str:
    """Right and wrong answers, each with its image."""
    parts = []
    for wanted, title in ((True, "Answered right"), (False, "Answered wrong"), (None, "What it says")):
        chosen = [sample for sample in samples if judged(sample) is wanted][:most]
        cards = "".join(_card(sample) for sample in chosen)
        short = all(len(spoken(each)) < 24 and not each.get("question") and each.get("image") for each in chosen)
        small = " small" if short else ""
        if cards:
            parts.append(f"<h4>{title}</h4><div class='cards{small}'>{cards}</div>")
    return "".join(parts)


def judged(sample: dict[str, Any]) -> bool | None:
    """Whether a sample is right; None where nobody judged (a caption beside its reference)."""
    value = sample.get("correct")
    return None if value is None else bool(value)


def spoken(sample: dict[str, Any]) -> str:
    """What the model said: an answer, or a language model's continuation of a prompt."""
    return str(sample.get("prediction") or sample.get("continuation") or "")


def clipped(text: Any, most: int = 150) -> str:
    """Text cut at a word, so that one long sample does not stretch the page."""
    text = str(text)
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " …"


def _card(sample: dict[str, Any]) -> str:
    right = judged(sample)
    css = {True: "right", False: "wrong", None: "open"}[right]
    question, kind = sample.get("question") or sample.get("prompt"), sample.get("question_type")
    answer = clipped(sample.get("answer") or sample.get("reference") or "")
    said = f"<b class={css}>{esc(clipped(spoken(sample)) or '(nothing)')}</b>"
    word = {False: "right: ", None: "reference: "}
    truth = f"<div class=muted>{word[right]}{esc(answer)}</div>" if right in word and answer else ""
    tag = f"<span class=tag>{esc(str(kind).replace('_', ' '))}</span>" if kind else ""
    asked = f"<div class=question>{esc(question)}</div>" if question else ""
    return (
        f"<div class='card is-{css}'>{image(sample.get('image', ''), 'pixels')}"
        f"<div class=words>{asked}<div>{said}</div>{truth}{tag}</div></div>"
    )
