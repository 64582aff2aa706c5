"""Captions that a vision-language model generates for held-out images, against those that people wrote."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch

from mllm_vision.data.chat.messages import from_pairs, image_parts
from mllm_vision.data.images.decoding import in_threads, load_image
from mllm_vision.data.records.forms import ConversationForm, Dialogue, bind_conversations
from mllm_vision.data.records.sampling import BadRow, judge
from mllm_vision.evaluation.base import Evaluation, Evaluator, agree_on_error, batches, gather_items, my_share
from mllm_vision.evaluation.images import data_uri, draw_rows, leave_out
from mllm_vision.evaluation.language.caption_scores import bleu, cider_d
from mllm_vision.evaluation.language.generation import AnswerGenerator

logger = logging.getLogger(__name__)
IMAGES_AT_ONCE = 256  # rows whose images are held in memory together


class CaptionQuestion(NamedTuple):
    """What a row asks: the dialogue up to the caption, its images, and the captions that it holds."""

    messages: list[dict[str, Any]]
    images: list[Any]
    references: list[str]


class Captioned(NamedTuple):
    """A row's caption by the model, and its references."""

    row: int
    text: str
    references: list[str]


@dataclass
class CaptionFlags:
    """How captions are asked for."""

    caption_prompt: str = field(
        default="", metadata={"help": "captioning: asked beside the image; default: the image alone, as in stage one."}
    )


class Captioning(Evaluator):
    """BLEU-4 and CIDEr-D of generated captions (`caption_scores`).

    Args:
        name: evaluator name.
        records: rows with an image and a caption or several, or conversations that begin with images, whose first
            answer is the reference.
        columns: role to column name, as ``bind_conversations`` gives it.
        processor: the model's processor (tokenizer, image processor, chat template).
        prompt: the question beside the image; "" asks with what the row asks: of a caption the image alone.
        batch_size: captions generated at once.
        max_new_tokens: length limit of a caption.
        limit: at most this many rows, drawn at random.
        blind: the model sees zeros instead of images.
        no_image_baseline: measure the same model blind as well, as baseline ``no_image``.
        sample_count: images shown with their captions.

    Metrics: ``cider`` (the mean over images), ``bleu4``, ``count``. Baselines: ``shuffled``, the same captions each
    with another image's references, which any text of the form of a caption reaches; ``no_image``. CIDEr's document
    frequencies are those of the evaluated references, so only figures of the same rows compare.

    Raises:
        ValueError: missing columns, no row that can be captioned, no chat template.
    """

    primary_metric = "cider"
    models = ("vlm",)
    Flags: ClassVar[type | None] = CaptionFlags

    @classmethod
    def from_flags(cls, name: str, records: Any, flags: Any, sources: Any) -> Captioning:
        roles = {role: column for role, column in sources.named.items() if role in ("image", "caption")}
        forms = [("caption",), ("conversations",), ("messages",)]
        return cls(
            name,
            records,
            bind_conversations(records, roles, forms=forms, report=False),
            sources.processor,
            prompt=flags.caption_prompt,
            batch_size=flags.batch_size,
            max_new_tokens=flags.max_new_tokens or 40,
            limit=flags.max_samples,
            blind=flags.blind,
            no_image_baseline=flags.no_image_baseline,
        )

    def __init__(
        self,
        name: str,
        records: Any,
        columns: Mapping[str, str],
        processor: Any,
        *,
        prompt: str = "",
        batch_size: int = 64,
        max_new_tokens: int = 40,
        limit: int | None = None,
        blind: bool = False,
        no_image_baseline: bool = True,
        sample_count: int = 8,
    ) -> None:
        super().__init__(name)
        self.records, self.processor, self.prompt = records, processor, prompt
        self.form = ConversationForm(records, dict(columns))
        self.rows = draw_rows(len(records), limit)
        self.batch_size, self.max_new_tokens, self.sample_count = batch_size, max_new_tokens, sample_count
        self.blind, self.no_image_baseline = blind, no_image_baseline

    def evaluate(self, model: Any) -> Evaluation:
        captioned = self._caption(model, self.blind)
        result = self._summary(captioned)
        result.baselines["shuffled"] = self._summary(shuffled(captioned)).metrics
        if self.no_image_baseline and not self.blind:
            result.baselines["no_image"] = self._summary(self._caption(model, True)).metrics
        result.samples = self._samples(captioned)
        return result

    def _summary(self, captioned: Sequence[Captioned]) -> Evaluation:
        texts, references = [each.text for each in captioned], [each.references for each in captioned]
        each = cider_d(texts, references)
        mean = sum(each) / len(each)
        error = math.sqrt(sum((score - mean) ** 2 for score in each)) / len(each)
        metrics = {"cider": mean, "bleu4": bleu(texts, references), "count": float(len(each))}
        if len(captioned) < len(self.rows):
            metrics["skipped"] = float(len(self.rows) - len(captioned))
        return Evaluation(self.primary_metric, metrics, errors={"cider": error})

    def _caption(self, model: Any, blind: bool) -> list[Captioned]:
        """The captions of all rows, on every rank."""
        found: list[tuple[int, Captioned]] = []
        error: Exception | None = None
        try:
            limits = {"batch_size": self.batch_size, "max_new_tokens": self.max_new_tokens}
            generator = AnswerGenerator(model, self.processor, blind=blind, **limits)
            for chunk in batches(my_share(len(self.rows)), IMAGES_AT_ONCE):
                found += self._chunk(generator, [self.rows[place] for place in chunk])
        except Exception as problem:
            error = problem
        agree_on_error(error)
        captioned = gather_items(found)
        if not captioned:
            reasons = ", ".join(sorted({bad.reason for bad in self.refused.values()}))
            raise ValueError(f"captioning {self.name!r}: none of {len(self.rows)} rows can be captioned ({reasons})")
        return captioned

    def _chunk(self, generator: AnswerGenerator, rows: Sequence[int]) -> list[tuple[int, Captioned]]:
        # the rows are read here, one after the other: not every kind of records may be read from several threads
        read = [judge(f"row {row}", self._read, row) for row in rows]
        images: list[Any] = []
        questions: list[tuple[list[int], list[dict[str, Any]]]] = []
        kept: list[tuple[int, list[str]]] = []
        for row, found in zip(rows, in_threads(_decoded, list(zip(rows, read, strict=True))), strict=True):
            if not isinstance(found, BadRow):
                sizes = [(image.height, image.width) for image in found.images]
                fits = judge(f"row {row}", generator.prompt, found.messages, sizes)
                found = fits if isinstance(fits, BadRow) else found
            if isinstance(found, BadRow):
                leave_out(self.refused, row, found)
                continue
            questions.append((list(range(len(images), len(images) + len(found.images))), found.messages))
            images += found.images
            kept.append((row, found.references))
        texts = generator.answer(images, questions)
        return [(row, Captioned(row, text, given)) for (row, given), text in zip(kept, texts, strict=True)]

    def _read(self, row: int) -> CaptionQuestion:
        return caption_question(self.form(self.records[row]), self.prompt)

    def _samples(self, captioned: Sequence[Captioned]) -> list[dict[str, Any]]:
        return [
            {
                "image": data_uri(load_image(self.form(self.records[each.row]).images[0]), 128),
                "question": self.prompt,
                "prediction": each.text,
                "answer": each.references[0],
                "references": each.references,
            }
            for each in captioned[: self.sample_count]
        ]


def shuffled(captioned: Sequence[Captioned]) -> list[Captioned]:
    """Every caption with the references of another image, always the same one."""
    order = torch.randperm(len(captioned), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = zip(order, order[1:] + order[:1], strict=True)
    return [Captioned(captioned[a].row, captioned[b].text, captioned[a].references) for a, b in pairs]


def caption_question(dialogue: Dialogue, prompt: str = "") -> CaptionQuestion:
    """How a row asks for its caption, or with ``prompt``.

    Raises:
        BadRow: no image; the first question is not about all images, or has no answer.
    """
    if not dialogue.images:
        raise BadRow("no image")
    [first, *others] = dialogue.samples()[0]
    end = next((place for place, turn in enumerate(first) if turn["role"] == "assistant"), None)
    if end is None or len(image_parts(first[:end])) != len(image_parts(first)):
        raise BadRow("no answer to a question about all images")
    references = [messages[end]["content"] for messages in (first, *others)]
    messages = from_pairs([(prompt, "")], len(dialogue.images))[:1] if prompt else first[:end]
    return CaptionQuestion(messages, dialogue.images, references)


def _decoded(pair: tuple[int, CaptionQuestion | BadRow]) -> CaptionQuestion | BadRow:
    row, asked = pair
    if isinstance(asked, BadRow):
        return asked
    images = judge(f"row {row}", lambda: list(map(load_image, asked.images)))
    return images if isinstance(images, BadRow) else asked._replace(images=images)
