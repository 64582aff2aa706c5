"""Evaluation of stages one and two: the loss on held-out text, and generated answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import GenerationConfig

from mllm_vision.data.chat.prompts import prompt_ids
from mllm_vision.data.records.sampling import BadRow, EpochDataset, OwnRows
from mllm_vision.distributed import agree_on_error, rank, total_over_ranks, world_size
from mllm_vision.vlm.tokens import stop_ids

logger = logging.getLogger(__name__)
IMAGES = ("own", "shuffled", "blank")


@torch.no_grad()
def supervised_loss(model: Any, batches: Iterable[Mapping[str, Tensor]], images: str = "own") -> float:
    """Mean loss over all supervised tokens, in nats a token.

    Args:
        model: a ``LanguageTask``, already in evaluation mode.
        batches: from ``ConversationCollator``; on several ranks each rank's share.
        images: "own"; "shuffled": each text with the image of another row of its batch; "blank": zeros. The
            difference between "own" and "shuffled" shows how much the model uses the image.

    Raises:
        ValueError: an unknown value of ``images``, or no supervised token.
    """
    if images not in IMAGES:
        raise ValueError(f"images={images!r} must be one of {', '.join(IMAGES)}")
    sums, error = (0.0, 0), None
    try:
        sums = _own_loss(model, batches, images)
    except Exception as problem:  # otherwise the other ranks would wait for this one
        error = problem
    agree_on_error(error)
    loss, tokens = total_over_ranks(sums)
    if not tokens:
        raise ValueError("the evaluation data contain no supervised token")
    return loss / tokens


def _own_loss(model: Any, batches: Iterable[Mapping[str, Tensor]], images: str) -> tuple[float, int]:
    """(the sum of the loss over this rank's supervised tokens, their number)."""
    device = next(model.parameters()).device
    # summed on the device, so that batches do not wait for each other, in double (which MPS does not support)
    kind = torch.float32 if device.type == "mps" else torch.float64
    total, count = torch.zeros((), dtype=kind, device=device), 0
    for batch in batches:
        tokens = int((batch["labels"][:, 1:] != -100).sum())  # on the CPU
        inputs = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        for name in inputs:
            if name.endswith("pixel_values") and images != "own":
                shuffled = images == "shuffled"
                inputs[name] = inputs[name].roll(1, dims=0) if shuffled else torch.zeros_like(inputs[name])
        if tokens:
            total += model(**inputs).loss.to(kind) * tokens
            count += tokens
    return float(total), count


class HeldOutLoss:
    """Evaluator: the loss on held-out texts, and on the same texts with another image and without image.

    A callable ``(model, step) -> dict`` for ``RecipeTrainer``: ``loss`` (nats a supervised token) and ``perplexity``,
    its exponential, and under ``baselines`` both with shuffled images ("shuffled") and with zeros in their place
    ("no_image").

    Args:
        name: of the evaluator; keys become ``eval_<name>_loss``...
        dataset: conversations for the collator; on several ranks each evaluates its share.
        collator: a ``ConversationCollator``.
        batch_size: rows at a time; at least 2, so that images can be shuffled.

    A row that cannot be used (a broken image) is left out and reported once; ``skipped`` is their number.

    Raises:
        ValueError: fewer than two rows, or no supervised token.
    """

    primary_metric = "loss"

    def __init__(self, name: str, dataset: Dataset, collator: Callable, batch_size: int) -> None:
        rows = len(dataset)  # type: ignore[arg-type]
        if rows < 2:
            raise ValueError(f"the evaluation set has {rows} rows; at least two are needed")
        self.name, self.dataset, self.collator, self.batch_size = name, dataset, collator, max(2, batch_size)
        self.refused: dict[str, BadRow] = {}

    def batches(self) -> Iterator[Mapping[str, Tensor]]:
        """This rank's share of the rows."""
        dataset = OwnRows(self.dataset) if isinstance(self.dataset, EpochDataset) else self.dataset
        share = range(rank(), len(dataset), world_size())  # type: ignore[arg-type]
        for samples in DataLoader(Subset(dataset, share), batch_size=self.batch_size, collate_fn=list):
            for bad in (each for each in samples if isinstance(each, BadRow)):
                if str(bad) not in self.refused:
                    logger.warning("%s: left out of the held-out rows: %s", self.name, bad)
                self.refused[str(bad)] = bad
            if kept := [each for each in samples if not isinstance(each, BadRow)]:
                yield self.collator(kept)

    def __call__(self, model: Any, step: int = 0) -> dict[str, Any]:
        losses = [supervised_loss(model, self.batches(), images) for images in IMAGES]
        own, shuffled, blank = ({"loss": loss, "perplexity": math.exp(min(loss, 700.0))} for loss in losses)
        (skipped,) = total_over_ranks([len(self.refused)])
        counts = {"skipped": float(skipped)} if skipped else {}
        return {**own, **counts, "baselines": {"shuffled": shuffled, "no_image": blank}}


@torch.inference_mode()
def answer(
    model: Any,
    processor: Any,
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[Any] = (),
    *,
    max_new_tokens: int = 40,
) -> str:
    """The model's next turn, decoded greedily.

    Args:
        model: a `LanguageTask` in evaluation mode.
        processor: its processor, with a chat template.
        messages: the dialogue so far in the ``messages`` format, ending with the user's turn.
        images: PIL images, as many as the messages have image parts.
        max_new_tokens: length limit.

    Raises:
        ValueError: no chat template; more or fewer images than image parts; no room for an answer.
    """
    ids = torch.tensor([prompt_ids(processor, messages)])
    image_token = model.config.image_token_id
    places = int((ids == image_token).sum())
    if places != len(images):
        raise ValueError(f"the dialogue contains {places} images ({processor.image_token}), {len(images)} were given")
    tokens = None
    if images:
        layout = model.system.layout(model.model, processor)
        pixels = {name: value.to(model.device) for name, value in layout(list(images)).items()}
        tokens = model.image_tokens(pixels)
        ids = spell_out(layout, ids[0], images)[None]
    check_room(model, ids.shape[1], max_new_tokens)
    ends = stop_ids(model.model, processor)
    config = greedy(processor.tokenizer, ends, max_new_tokens)
    output = model.generate(ids.to(model.device), image_tokens=tokens, generation_config=config)
    return said(processor.tokenizer, output[0, ids.shape[1] :].tolist(), ends)


def spell_out(layout: Any, ids: Tensor, images: Sequence[Any]) -> Tensor:
    """``ids [T]`` with each image token replaced by the tokens of its image."""
    spelt, _ = layout.expand(ids.numpy(), [(image.height, image.width) for image in images])
    return torch.from_numpy(spelt)


def check_room(model: Any, tokens: int, max_new_tokens: int) -> None:
    """Raises ValueError (a `BadRow`) if prompt and answer exceed the language model's positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and tokens + max_new_tokens > limit:
        raise BadRow(
            "the prompt leaves no room for the answer",
            f"{tokens} tokens, image tokens included, and {max_new_tokens} new ones, but the language model has "
            f"{limit} positions; use fewer new tokens (max_new_tokens), or begin a new dialogue",
        )


def greedy(tokenizer: Any, ends: Sequence[int], max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding until one of ``ends``."""
    padding = tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(ends) or None,
        pad_token_id=padding if padding is not None else (min(ends) if ends else 0),
    )


def said(tokenizer: Any, ids: Sequence[int], ends: Collection[int]) -> str:
    """Generated ids as text, up to the first end."""
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return tokenizer.decode(ids[:stop], skip_special_tokens=True).strip()
