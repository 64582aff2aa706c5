"""Held-out images that a vision-language model captions, for people to read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mllm_vision.data.images import load_image
from mllm_vision.data.sampling import BadRow, judge
from mllm_vision.evaluation.base import evaluation_mode
from mllm_vision.evaluation.images import as_list, data_uri
from mllm_vision.vlm.measure import answer

logger = logging.getLogger(__name__)


def caption_samples(
    model: Any, processor: Any, records: Any, columns: Mapping[str, str], count: int
) -> list[dict[str, Any]]:
    """What the model says of the first ``count`` usable rows beside their own captions, for ``run.json["samples"]``.

    Args:
        model, processor: a LLaVA model and its processor, with a chat template.
        records: rows with an image and a caption or several.
        columns: roles ``image`` and ``caption`` to column names.
        count: rows wanted; those that cannot be used are passed over, counted and told.
    """
    samples: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    with evaluation_mode(model):
        for index in range(len(records)):
            if len(samples) == count:
                break
            found = judge(f"row {index}", _image_and_caption, records, index, columns)
            if isinstance(found, BadRow):
                reasons[found.reason] += 1
                continue
            image, caption = found
            said = answer(model, processor, [{"role": "user", "content": [{"type": "image"}]}], [image])
            samples.append(
                {
                    "evaluation": "captions",
                    "image": data_uri(image, 128),
                    "question": "",
                    "prediction": said,
                    "answer": caption,
                }
            )
    if reasons:
        told = ", ".join(f"{reason} ({number})" for reason, number in reasons.items())
        logger.warning("%d held-out rows were passed over for the sample captions: %s", reasons.total(), told)
    return samples


def _image_and_caption(records: Any, index: int, columns: Mapping[str, str]) -> tuple[Any, str]:
    row = records[index]
    images, captions = as_list(row[columns["image"]]), as_list(row[columns["caption"]])
    captions = [caption for caption in captions if isinstance(caption, str) and caption.strip()]
    if len(images) != 1:
        raise BadRow("not one image", f"{len(images)} images")
    if not captions:
        raise BadRow("no caption")
    return load_image(images[0]), captions[0]
