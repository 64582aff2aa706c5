"""What stages one and two measure by themselves: the loss on held-out text, and an answer in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from mllm_vision.distributed import mean_over_ranks, rank, world_size

INPUTS = ("input_ids", "attention_mask", "position_ids", "labels", "pixel_values")
PICTURES = ("own", "shuffled", "blank")


@torch.no_grad()
def supervised_loss(model: Any, batches: Iterable[Mapping[str, Tensor]], pictures: str = "own") -> float:
    """Mean loss over all supervised tokens, in nats a token.

    Args:
        model: a ``VisionLanguageModel`` (or the peft model around it), already in evaluation mode.
        batches: what ``ConversationCollator`` gives; on several ranks each rank's share of it.
        pictures: "own"; "shuffled": each text beside the picture of another row of its batch; "blank": zeros.
            The distance from "own" to "shuffled" is what the model takes from the picture.

    Raises:
        ValueError: an unknown value of ``pictures``, or not one supervised token.
    """
    if pictures not in PICTURES:
        raise ValueError(f"pictures={pictures!r} is none of {', '.join(PICTURES)}")
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for batch in batches:
        inputs = {name: batch[name].to(device) for name in INPUTS if name in batch}
        if "pixel_values" in inputs and pictures != "own":
            values = inputs["pixel_values"]
            shuffled = pictures == "shuffled"
            inputs["pixel_values"] = values.roll(1, dims=0) if shuffled else torch.zeros_like(values)
        tokens = int((inputs["labels"][:, 1:] != -100).sum())
        if tokens:
            total += float(model(**inputs).loss) * tokens
            count += tokens
    sums = mean_over_ranks({"total": torch.tensor(total), "count": torch.tensor(float(count))})
    if not sums["count"]:
        raise ValueError("no supervised token in the evaluation data: nothing to measure")
    return float(sums["total"] / sums["count"])


class HeldOutLoss:
    """Evaluator: the loss on held-out texts, beside the same texts with another picture and with none.

    A callable ``(model, step) -> dict`` for ``RecipeTrainer``: ``loss``, and under ``baselines`` the primary metric
    with shuffled pictures ("shuffled") and with zeros in their place ("no_image").

    Args:
        name: of the evaluator; keys become ``eval_<name>_loss``...
        dataset: what the collator takes, one conversation an item; on several ranks each takes its share.
        collator: a ``ConversationCollator``.
        batch_size: rows at a time; at least 2, so that pictures can change places.

    Raises:
        ValueError: fewer than two rows, or no supervised token.
    """

    primary_metric = "loss"

    def __init__(self, name: str, dataset: Dataset, collator: Callable, batch_size: int) -> None:
        rows = len(dataset)  # type: ignore[arg-type]
        if rows < 2:
            raise ValueError(f"the evaluation set has {rows} rows; at least two are needed")
        self.name, self.dataset, self.collator, self.batch_size = name, dataset, collator, max(2, batch_size)

    def batches(self) -> DataLoader:
        """This rank's share of the rows."""
        share = range(rank(), len(self.dataset), world_size())  # type: ignore[arg-type]
        return DataLoader(Subset(self.dataset, share), batch_size=self.batch_size, collate_fn=self.collator)

    def __call__(self, model: Any, step: int = 0) -> dict[str, Any]:
        own, shuffled, blank = (supervised_loss(model, self.batches(), pictures) for pictures in PICTURES)
        return {"loss": own, "baselines": {"shuffled": shuffled, "no_image": blank}}


@torch.inference_mode()
def answer(
    model: Any,
    processor: Any,
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[Any] = (),
    *,
    max_new_tokens: int = 40,
) -> str:
    """The model's next turn, greedily.

    Args:
        model: a LLaVA model in evaluation mode.
        processor: its processor, with a chat template.
        messages: the dialogue so far in the ``messages`` format, ending with the user's turn.
        images: PIL pictures, as many as the messages have image parts.
        max_new_tokens: length limit.

    Raises:
        ValueError: no chat template; more or fewer pictures than image parts.
    """
    if not getattr(processor, "chat_template", None):
        raise ValueError("the processor has no chat template, so a question cannot be put; see CHAT_TEMPLATES")
    text = processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    places = text.count(processor.image_token)
    if places != len(images):
        raise ValueError(f"the dialogue holds {places} pictures ({processor.image_token}), {len(images)} were given")
    inputs = processor(text=text, images=list(images) or None, return_tensors="pt", add_special_tokens=False)
    inputs = inputs.to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
