"""Images of what a model looks at: attention, and what changes when a piece of the image is taken away.

Occlusion asks the whole model instead of one layer's weights, so it means the same for every backbone: the
value of a square is how much the score falls when the square is painted over in the image's own median
colour (on a plain background, that removes what lies there). Source: Zeiler and Fergus 2014, section 4.2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_vision.data.pairs import captions_of
from mllm_vision.evaluation.base import Evaluation, Evaluator, dual_model, image_model, unwrap
from mllm_vision.evaluation.images import check_columns, data_uri, displayed, draw_rows, rounded, usable_images
from mllm_vision.evaluation.language.generation import AnswerGenerator
from mllm_vision.evaluation.maps.attention import attention_map

IMAGE_SIZE = 224  # longest side of an image embedded in the report


def occluded(pixel_values: Tensor, grid: int, stretch: float = 1.5) -> Tensor:
    """Copies ``[grid * grid, 3, H, W]`` of one image ``[3, H, W]``, each with one square painted over.

    The painted square is ``stretch`` times as wide as a cell: an object on a border of two cells still
    disappears.
    """
    _, height, width = pixel_values.shape
    fill = pixel_values.flatten(1).median(dim=1).values[:, None, None]
    copies = pixel_values.repeat(grid * grid, 1, 1, 1)
    for cell in range(grid * grid):
        bounds = []
        for place, length in ((cell // grid, height), (cell % grid, width)):
            middle, half = (place + 0.5) * length / grid, stretch * length / grid / 2
            bounds.append((max(0, round(middle - half)), min(length, round(middle + half))))
        (top, bottom), (left, right) = bounds
        copies[cell, :, top:bottom, left:right] = fill
    return copies


def occlusion_map(pixel_values: Tensor, score: Callable[[Tensor], Tensor], grid: int, batch_size: int = 64) -> Tensor:
    """How much each score falls when a square is painted over.

    Args:
        pixel_values: one preprocessed image ``[3, H, W]``.
        score: preprocessed images ``[B, 3, H, W]`` to scores ``[B, K]``.
        grid: squares a side.
        batch_size: copies scored at once.

    Returns:
        ``[K, grid, grid]``; positive where the square speaks for the score.
    """
    base = score(pixel_values[None])[0]
    rows = [score(chunk) for chunk in occluded(pixel_values, grid).split(batch_size)]
    return (base - torch.cat(rows)).T.reshape(-1, grid, grid)


def text_maps(dual: Any, pixel_values: Tensor, texts: Sequence[str], grid: int) -> tuple[Tensor, Tensor]:
    """Occlusion maps ``[T, grid, grid]`` of the cosine between an image ``[3, H, W]`` and texts, and the
    cosines ``[T]``.
    """
    words = F.normalize(dual.encode_texts(list(texts)).float(), dim=-1)

    def score(pixels: Tensor) -> Tensor:
        return F.normalize(dual.image_features(pixels).float(), dim=-1) @ words.to(pixels.device).T

    return occlusion_map(pixel_values, score, grid), score(pixel_values[None])[0]


def answer_maps(generator: AnswerGenerator, pixel_values: Tensor, question: str, answer: str, grid: int) -> Tensor:
    """How much the log-probability of ``answer`` falls when a square is painted over: ``[grid, grid]``."""
    words = generator.tokenizer(answer, add_special_tokens=False)["input_ids"]
    height, width = pixel_values.shape[-2:]
    ids = torch.tensor([*generator.prompt(question, [(height, width)]), *words], device=pixel_values.device)
    targets = torch.tensor(words, device=pixel_values.device)

    def score(pixels: Tensor) -> Tensor:
        logits = generator.task(input_ids=ids.expand(len(pixels), -1), pixel_values=pixels).logits
        chances = logits[:, -len(words) - 1 : -1].float().log_softmax(dim=-1)
        return chances.gather(2, targets.expand(len(pixels), -1)[..., None]).sum(dim=(1, 2))[:, None]

    return occlusion_map(pixel_values, score, grid)[0]


class Maps(Evaluator):
    """Maps over a few images, kept as small arrays in ``arrays["maps"]`` of the result for the report.

    For an image-text model: the class token's attention and one occlusion map a text. For an encoder alone:
    attention only. For a vision-language model (``processor`` given): one occlusion map a question, for the
    model's own answer.

    Args:
        name: evaluator name.
        records: rows with an image and captions (or questions).
        columns: roles ``image`` and, as needed, ``caption`` or ``question``.
        processor: of a vision-language model.
        texts: for each row the texts to map; None takes the first captions of the ``caption`` column.
        count: images.
        texts_each: texts or questions an image.
        grid: squares a side; None takes the patches, at most 12.

    Metrics: ``count``. Every rank computes the same few images.

    Raises:
        ValueError: missing columns, nothing to map.
    """

    primary_metric = "count"
    has_figures = False

    @classmethod
    def from_flags(cls, name: str, records: Any, flags: Any, sources: Any) -> Maps:
        if sources.kind == "vlm":
            columns = sources.columns(records, "image", "question")
            return cls(name, records, columns, sources.processor, count=flags.map_count)
        columns = sources.columns(records, "image", "caption?", "label?")
        names = getattr(records.features.get(columns.get("label", "")), "names", None)

        def texts(row: dict[str, Any]) -> list[str]:
            return map_texts(row, flags.map_texts, names, columns.get("caption"))

        return cls(name, records, columns, texts=texts, count=flags.map_count)

    def __init__(
        self,
        name: str,
        records: Any,
        columns: dict[str, str] | None = None,
        processor: Any = None,
        *,
        texts: Callable[[dict[str, Any]], Sequence[str]] | None = None,
        count: int = 6,
        texts_each: int = 2,
        grid: int | None = None,
    ) -> None:
        super().__init__(name)
        self.records, self.processor, self.texts = records, processor, texts
        self.columns = columns or {"image": "image"}
        check_columns(records, self.columns, ("image",), f"Maps {name!r}")
        self.count, self.texts_each, self.grid = count, texts_each, grid

    def evaluate(self, model: Any) -> Evaluation:
        wanted = draw_rows(len(self.records), self.count)
        images, kept = usable_images(self.records, self.columns["image"], wanted, self.refused)
        draw = self._answers if self.processor is not None else self._encoder
        maps = [draw(model, image, self.records[row]) for image, row in zip(images, kept, strict=True)]
        return Evaluation("count", {"count": float(len(maps))}, arrays={"maps": maps})

    def _grid_for(self, size: int, patch: int) -> int:
        return self.grid or max(2, min(12, size // patch))

    def _row_texts(self, row: dict[str, Any]) -> list[str]:
        if self.texts is not None:
            return list(self.texts(row))[: self.texts_each]
        column = self.columns.get("caption")
        return captions_of(row[column])[: self.texts_each] if column else []

    def _encoder(self, model: Any, image: Any, row: dict[str, Any]) -> dict[str, Any]:
        from mllm_vision.data.images.transforms import ImageTransform

        encoder = image_model(model)
        device = next(encoder.parameters()).device
        pixels = ImageTransform(encoder.processor, train=False)([image]).to(device)
        items: list[dict[str, Any]] = []
        looking = attention_map(encoder, pixels)
        if looking is not None:
            items.append({"kind": "attention", "text": "attention", "grid": rounded(looking[0])})
        texts = self._row_texts(row)
        try:
            dual = dual_model(model)
        except ValueError:
            dual = None
        if dual is not None and texts:
            grid = self._grid_for(encoder.image_size, encoder.patch_size)
            grids, scores = text_maps(dual, pixels[0], texts, grid)
            for text, one, score in zip(texts, grids, scores.tolist(), strict=True):
                items.append({"kind": "occlusion", "text": text, "score": round(score, 3), "grid": rounded(one)})
        return {"image": data_uri(displayed(pixels[0], encoder.processor), IMAGE_SIZE), "items": items}

    def _answers(self, model: Any, image: Any, row: dict[str, Any]) -> dict[str, Any]:
        generator = AnswerGenerator(unwrap(model), self.processor, batch_size=64, max_new_tokens=12)
        column = self.columns.get("question")
        questions = captions_of(row[column])[: self.texts_each] if column else []
        vision = generator.model.config.vision_config
        tensors = generator.layout([image])
        if set(tensors) != {"pixel_values"} or not generator.layout.fixed:
            raise ValueError(f"maps of answers need one square image; {generator.system.name} cuts images into several")
        pixels = tensors["pixel_values"].to(generator.task.device)
        grid = self._grid_for(pixels.shape[-1], getattr(vision, "patch_size", pixels.shape[-1] // 8))
        items = []
        for question, answer in zip(questions, generator.answer([image], [(0, q) for q in questions]), strict=True):
            if answer:
                one = answer_maps(generator, pixels[0], question, answer, grid)
                items.append({"kind": "answer", "text": question, "answer": answer, "grid": rounded(one)})
        return {
            "image": data_uri(displayed(pixels[0], self.processor.image_processor), IMAGE_SIZE),
            "items": items,
        }


def map_texts(row: dict[str, Any], given: list[str], names: list[str] | None, caption: str | None) -> list[str]:
    """What to look for in one image: the texts given, each object of a generated scene, its class, its captions."""
    if given:
        return given
    if isinstance(row.get("scene"), str):
        objects = json.loads(row["scene"])
        return list(dict.fromkeys(f"a {item['colour']} {item['shape']}" for item in objects))
    label = row.get("label")
    if names and isinstance(label, int) and 0 <= label < len(names):
        return [f"a {names[label]}"]
    return captions_of(row[caption]) if caption else []
