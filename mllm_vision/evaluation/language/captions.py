"""Held-out images that a vision-language model captions, for people to read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mllm_vision.data.chat.messages import image_parts
from mllm_vision.data.images.transforms import load_image
from mllm_vision.data.records.forms import ConversationForm
from mllm_vision.data.records.sampling import BadRow, judge
from mllm_vision.evaluation.base import evaluation_mode
from mllm_vision.evaluation.images import data_uri
from mllm_vision.vlm.measure import answer

logger = logging.getLogger(__name__)


def caption_samples(
    model: Any, processor: Any, records: Any, columns: Mapping[str, str], count: int
) -> list[dict[str, Any]]:
    """What the model says of the first ``count`` usable rows beside their own captions, for ``run.json["samples"]``.

    Args:
        model, processor: a LLaVA model and its processor, with a chat template.
        records: rows with an image and a caption or several, or conversations that begin with the image.
        columns: role to column name, as ``bind_conversations`` gives it.
        count: rows wanted; those that cannot be used are skipped, counted and logged.
    """
    samples: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    form = ConversationForm(records, dict(columns))
    with evaluation_mode(model):
        for index in range(len(records)):
            if len(samples) == count:
                break
            found = judge(f"row {index}", _images_and_caption, form, records, index)
            if isinstance(found, BadRow):
                reasons[found.reason] += 1
                continue
            question, images, caption = found
            said = answer(model, processor, question, images)
            samples.append(
                {
                    "evaluation": "captions",
                    "image": data_uri(images[0], 128),
                    "question": "",
                    "prediction": said,
                    "answer": caption,
                }
            )
    if reasons:
        counts = ", ".join(f"{reason} ({number})" for reason, number in reasons.items())
        logger.warning("%d held-out rows were passed over for the sample captions: %s", reasons.total(), counts)
    return samples


def _images_and_caption(
    form: ConversationForm, records: Any, index: int
) -> tuple[list[dict[str, Any]], list[Any], str]:
    """What is asked, about which images, and what the row itself answers first."""
    dialogue = form(records[index])
    if not dialogue.images:
        raise BadRow("no image")
    messages = dialogue.samples()[0][0]
    first = next((place for place, turn in enumerate(messages) if turn["role"] == "assistant"), None)
    asked = image_parts(messages[:first])
    if first is None or len(asked) != len(image_parts(messages)):
        raise BadRow("no answer to a question about all images")
    caption = messages[first]["content"]
    return messages[:first], [load_image(image) for image in dialogue.images], caption
