"""Checks of a contrastive training before it starts: batch, duplicates, chance, towers, texts, memory.

Every check yields `Finding`s; scripts/doctor.py runs all of them on a config.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from mllm_vision.data.images.files import first_image
from mllm_vision.data.images.transforms import ImageTransform
from mllm_vision.data.pairs import captions_of, image_id
from mllm_vision.data.records.sampling import BadRow, draw_key, judge, text_id
from mllm_vision.data.text_length import cut_text
from mllm_vision.encoder.build import build_processor
from mllm_vision.encoder.text.tokenizers import CLIP_TEXT, SIGLIP_TEXT
from mllm_vision.encoder.text.towers import text_positions
from mllm_vision.training.callbacks.health import expected_chance
from mllm_vision.training.preflight.memory import FakeStep, available_memory, measure_step, show_bytes
from mllm_vision.utils import duration

# (pairs of data, best batch): the larger the data, the larger the batch that was best
PUBLISHED_BATCHES = ((3e6, 16_384), (12e6, 32_768), (400e6, 262_144))
# Predicted over actual positives before the first step, within which the bias does not slow the training
# (on Flickr8k a bias of -10, a ratio of 1/150, trained as fast as the fitting one).
START_RATIOS = (1e-3, 20.0)
IMAGES = 48  # how many of a sample are decoded


class Finding(NamedTuple):
    """One line of the report; a "problem" should be fixed before the start."""

    level: Literal["ok", "advice", "problem"]
    topic: str
    text: str


@dataclass
class PairSample:
    """Rows drawn from a data set of pairs; `rows` counts the whole data, None where unknown (a stream)."""

    rows: int | None
    captions: list[str] = field(default_factory=list)
    caption_ids: list[int] = field(default_factory=list)
    image_ids: list[int] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def positives(self, pairs: int) -> float:
        """The expected number of rows of a batch of `pairs` that match an anchor, itself included."""
        count, both = len(self.captions), list(zip(self.caption_ids, self.image_ids))
        if count < 2:
            return 1.0
        common = _repeated(self.caption_ids) + _repeated(self.image_ids) - _repeated(both)
        return 1 + max(pairs - 1, 0) * common / (count * (count - 1))


def _repeated(ids: Sequence[Any]) -> int:
    """Ordered pairs of two rows with the same id."""
    return sum(count * (count - 1) for count in Counter(ids).values())


def sample_pairs(dataset: Any, count: int = 5000, *, rows: int | None = None, seed: int = 0) -> PairSample:
    """`count` rows of a `PairDataset` drawn at random (all of a smaller one), each with the caption of epoch 0.

    Ids are those of training. `IMAGES` images are decoded; unreadable rows go to `bad`.
    """
    total = len(dataset)
    chosen = range(total) if total <= count else sorted(random.Random(seed).sample(range(total), count))
    decoded = set(random.Random(seed).sample(chosen, min(IMAGES, len(chosen))))
    sample = PairSample(rows)
    for index in chosen:
        found = judge(f"row {index}", _row, dataset, index, index in decoded)
        if isinstance(found, BadRow):
            sample.bad.append(str(found))
            continue
        sample.captions.append(found["caption"])
        sample.caption_ids.append(text_id(found["caption"]))
        sample.image_ids.append(found["image_id"])
        sample.images += [found["image"]] if "image" in found else []
    return sample


def _row(dataset: Any, index: int, decoded: bool) -> dict[str, Any]:
    record, key = dataset.records[index], draw_key(dataset.seed, 0, index)
    if decoded:
        return dataset.read_record(record, key, index)
    captions = captions_of(record[dataset.columns["caption"]])
    if not captions:
        raise BadRow("the caption is empty")
    image = first_image(record[dataset.columns["image"]])
    return {"caption": captions[key % len(captions)], "image_id": image_id(image)}


# ---- batch, duplicates, chance -------------------------------------------------------------------------------


def published_batch(rows: float) -> tuple[int, bool]:
    """The batch size that was best on so many pairs (straight in logarithms), and whether it is extrapolated.

    Reference:
        Cheng et al., 2024, "Breaking the Memory Barrier: Near Infinite Batch Size Scaling for Contrastive Loss",
        section on batch and data size (https://arxiv.org/abs/2410.17243).
    """
    data, batches = zip(*PUBLISHED_BATCHES)
    start = data[0] / batches[0] ** 2  # where the square root gives a batch of one
    best = math.exp(np.interp(math.log(rows), np.log([start, *data]), np.log([1, *batches])))
    return max(2, round(best)), not data[0] <= rows <= data[-1]


def check_batch(pairs: int, sample: PairSample, steps: int = 0, *, queue: int = 0) -> Iterator[Finding]:
    """Effective negatives of an anchor, passes over the data, and the published batch size for so much data.

    `queue` is the number of embeddings of earlier batches that the method keeps as negatives.
    """
    if pairs < 2 and not queue:
        yield Finding("problem", "batch", "one pair a step has no negatives: raise the batch size")
        return
    negatives, extra = pairs - 1 + queue, sample.positives(pairs + queue) - 1
    kept = f" and {queue:,} of a queue" if queue else ""
    text = f"{pairs:,} pairs meet in a loss{kept}: {negatives - extra:,.6g} effective negatives per anchor"
    text += f" (of {negatives:,}, {extra:.2g} repeat its caption or image)" if extra >= 0.01 else ""
    yield Finding("ok", "batch", text)
    if (rows := sample.rows) is None:
        return
    if rows < pairs:
        yield Finding("problem", "batch", f"{rows:,} rows are fewer than one batch of {pairs:,}")
    if steps > 0:
        text = f"{steps:,} steps use {steps * pairs:,} pairs: {steps * pairs / rows:.3g} passes over {rows:,}"
        yield Finding("ok", "batch", text)
    best, beyond = published_batch(rows)
    source = f"{'about ' if not beyond or rows < 3e6 else ''}{best:,} for {rows:,} pairs of data"
    source += ", extrapolated from published results" if beyond else ""
    if pairs * 4 < best and not queue:
        text = f"a batch of {pairs:,} is small (best: {source}); --embed_batch_size makes it larger in the same memory"
        yield Finding("advice", "batch", text)
    elif pairs > 4 * best:
        yield Finding("advice", "batch", f"a batch of {pairs:,} is large (best: {source}): few steps remain")
    else:
        yield Finding("ok", "batch", f"a batch of {pairs:,} is usual (best: {source})")


def check_duplicates(sample: PairSample, pairs: int, *, positives: bool = True) -> Iterator[Finding]:
    """Repeated captions and images, false negatives where the loss ignores them, unusable rows."""
    count, bad = len(sample.captions), len(sample.bad)
    if count < 2:
        text = f"only {count} usable rows were found: {'; '.join(sample.bad[:2])}"
        yield Finding("problem", "duplicates", text)
        return
    captions, images = count - len(set(sample.caption_ids)), count - len(set(sample.image_ids))
    whole = "all" if sample.rows is not None and sample.rows <= count + bad else "a sample of"
    text = f"of {whole} {count:,} rows {captions:,} repeat a caption ({captions / count:.2%}) and {images:,} an image "
    text += f"({images / count:.2%})"
    often = [(text, number) for text, number in Counter(sample.captions).most_common(2) if number > 1]
    text += "; most often " + ", ".join(f"{each[:50]!r} {number} times" for each, number in often) if often else ""
    yield Finding("ok", "duplicates", text)
    false = sample.positives(pairs) - 1
    if not positives and false >= 0.01:
        text = f"{false:.2g} false negatives per anchor and step: duplicate_positives is off; turn it on"
        yield Finding("problem" if false >= 0.1 else "advice", "duplicates", text)
    elif images > 0.2 * count:
        text = "many rows have the same image: put the captions of an image into one row (a list); each epoch draws one"
        yield Finding("advice", "duplicates", f"{text}, and no batch holds an image twice")
    if false > 0.1 * pairs:
        text = f"an anchor matches {false:.3g} of {pairs - 1} others: few negatives remain"
        yield Finding("advice", "duplicates", f"{text}; more varied captions or classes help more than more rows")
    if bad:
        text = f"{bad / (count + bad):.2%} of the rows cannot be used, such as {sample.bad[0]}"
        yield Finding("problem" if bad > 0.01 * (count + bad) else "advice", "duplicates", text)


@torch.no_grad()
def check_start(objective: Any, batch: Mapping[str, Any], pairs: int, sample: PairSample) -> Iterator[Finding]:
    """The loss at chance, the loss of one batch before the first step, and the fit of the sigmoid loss's bias.

    Args:
        objective: an `ImageTextObjective` on its device; it is not changed.
        batch: columns, as the collator makes them.
        pairs: of a step of the run.
        sample: for the duplicates to expect among them.
    """
    rows, positives = len(next(iter(batch.values()))), sample.positives(pairs)
    chance, here = (
        expected_chance(objective, pairs, positives),
        expected_chance(objective, rows, sample.positives(rows)),
    )
    beside = f" and {positives:.3g} positives of each" if positives >= 1.005 else ""
    text = f"at chance the loss is {chance:.4f} for {pairs:,} pairs{beside}" if chance is not None else ""
    yield Finding("ok", "loss", text or f"{type(objective).__name__} has no known loss at chance")
    was_training = objective.training
    objective.eval()
    embeddings = objective.embed(**batch)
    loss = float(objective.loss(embeddings).loss)
    objective.train(was_training)
    if here:
        text = f"before the first step it is {loss:.4f} for {rows} pairs, and chance for them {here:.4f}"
        if loss > 1.5 * here:
            yield Finding("advice", "loss", f"{text}: training starts from confident errors")
        else:
            yield Finding("ok", "loss", text + ": the towers already match such pairs" * (loss < 0.5 * here))
    loaded = getattr(objective.config, "initial_logit_bias", 0) is None  # the bias of a trained pair is not checked
    if getattr(objective.dual, "logit_bias", None) is None or loaded:
        return
    bias = objective.dual.logit_bias.item()
    others = objective.dual.logits(embeddings["image"], embeddings["text"]) - bias
    others = others[~torch.eye(rows, dtype=torch.bool, device=others.device)].double()

    def predicted(value: float) -> float:
        """Expected number of other texts of a step predicted as positives of an image."""
        return float((others + value).sigmoid().mean()) * (pairs - 1)

    low, high = -100.0, 100.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if predicted(middle) < positives else (low, middle)
    text = f"initial_logit_bias {bias:.4g} predicts {predicted(bias):.3g} of {pairs - 1:,} other texts as positives of "
    text += f"an image, {positives:.3g} would be right"
    most = max(min(START_RATIOS[1] * positives, pairs / 4), 2 * positives)
    if START_RATIOS[0] * positives <= predicted(bias) <= most:
        yield Finding("ok", "loss", text)
    else:
        yield Finding("advice", "loss", f"{text}: {low:.3g} starts there")


def check_leak(sample: PairSample, evaluated: Sequence[Any]) -> Iterator[Finding]:
    """Images of the evaluation that are also in the sample of the training data."""
    ids = set(sample.image_ids)
    found = [judge("", lambda value: image_id(first_image(value)), value) for value in evaluated]
    readable = [identity for identity in found if not isinstance(identity, BadRow)]
    common = sum(identity in ids for identity in readable)
    text = f"{common} of {len(readable)} evaluation images are among {len(ids):,} sampled training images"
    yield Finding("problem" if common else "ok", "evaluation", text + ": the result will be too good" * bool(common))


# ---- towers against processors and texts ----------------------------------------------------------------------


def check_images(
    vision: Any, sample: PairSample, *, crop_scale: Sequence[float] = (0.9, 1.0), trained_size: int | None = None
) -> Iterator[Finding]:
    """Image settings against the tower's: size, normalisation, crops, and statistics of the pixels.

    `trained_size` is the side of the images that a tower with weights was trained on, None for random weights.
    """
    processor, size = vision.processor, vision.image_size
    if trained_size and size and trained_size != size:
        text = f"the tower was trained at {trained_size} px and gets {size} px: its positions are interpolated"
        yield Finding("advice", "images", f"{text}; expect a higher loss at the start")
    for name in ("do_normalize", "do_rescale", "do_resize"):
        if getattr(processor, name, True) is False:
            yield Finding("problem", "images", f"the image processor has {name}=false; the tower expects true")
    usual = build_processor(vision.config, size or 224)
    own, common = (
        [[round(value, 3) for value in values or ()] for values in (each.image_mean, each.image_std)]
        for each in (processor, usual)
    )
    if trained_size and any(abs(a - b) > 0.01 for pair in zip(own, common) for a, b in zip(*pair)):
        text = f"mean {own[0]} and std {own[1]} are not those of {vision.config.model_type} ({common[0]}, {common[1]})"
        yield Finding("advice", "images", f"{text}: correct only if this tower was trained with them")
    if crop_scale[0] < 0.3:
        text = f"crop_scale {crop_scale[0]:g} may crop away what the caption describes; CLIP keeps 0.9"
        yield Finding("advice", "images", text)
    if not sample.images:
        yield Finding("problem", "images", "no image of the sample can be decoded")
        return
    pixels = ImageTransform(processor)(sample.images)
    mean, std = pixels.mean().item(), pixels.std().item()
    text = f"{size} px; {len(pixels)} images have mean {mean:.2f} and std {std:.2f}"
    fits = abs(mean) < 1.5 and 0.3 < std < 2.5
    text += "" if fits else ": about 0 and 1 is expected, so normalisation does not fit"
    yield Finding("ok" if fits else "problem", "images", text)
    small = sum(min(image.size) < (size or 0) for image in sample.images) / len(sample.images)
    if small > 0.1:
        yield Finding("advice", "images", f"{small:.0%} of the images are smaller than {size} px and are enlarged")


def check_texts(dual: Any, sample: PairSample, *, tower_tokenizer: Any = None) -> Iterator[Finding]:
    """Tokenizer settings against the text tower and the captions: length, unknown tokens, padding, vocabulary.

    `tower_tokenizer` is the one saved with the text tower, where it differs.
    """
    tokenizer, limit, config = dual.tokenizer, dual.max_text_length, dual.text.config
    captions = [cut_text(caption, tokenizer, 16 * limit) for caption in sample.captions[:2000]]
    encoded = list(tokenizer(captions, truncation=False, verbose=False)["input_ids"])
    lengths = sorted(len(ids) for ids in encoded)
    cut = sum(length > limit for length in lengths) / max(len(lengths), 1)
    text = f"captions have {statistics.median(lengths):.0f} tokens (median), {lengths[-1]} at most; limit {limit}"
    if cut > 0.01:
        text += f", which cuts {cut:.1%} of them"
        if (positions := text_positions(dual.text)) and positions > limit:
            text += f": the tower has positions for {positions} (--max_text_length)"
    yield Finding("ok" if cut <= 0.01 else "advice" if cut <= 0.2 else "problem", "texts", text)
    tokens, words = sum(lengths), sum(len(caption.split()) for caption in captions)
    unknown = sum(ids.count(tokenizer.unk_token_id) for ids in encoded) / max(tokens, 1)
    if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id, tokenizer.pad_token_id) and unknown > 0.005:
        text = f"{unknown:.1%} of the tokens are unknown: the tokenizer does not cover this language or alphabet"
        yield Finding("problem" if unknown > 0.05 else "advice", "texts", text)
    elif tokens > 4 * words:
        text = (
            f"{tokens / max(words, 1):.1f} tokens per word: the tokenizer does not fit these texts; train one on them"
        )
        yield Finding("advice", "texts", text)
    pad = getattr(config, "pad_token_id", None)
    unmasked = config.model_type == SIGLIP_TEXT and "attention_mask" not in tokenizer.model_input_names
    if unmasked and pad is not None and pad != tokenizer.pad_token_id:
        text = f"the tower attends to its padding, id {pad}, and the tokenizer pads with {tokenizer.pad_token_id}"
        yield Finding("problem", "texts", text)
    if tower_tokenizer is None:
        return
    ours, theirs = (each("a")["input_ids"][:1] for each in (tokenizer, tower_tokenizer))
    if config.model_type == CLIP_TEXT and tokenizer.bos_token_id is not None and ours != theirs:
        text = f"texts begin with id {ours}, and with {theirs} in the tower's own tokenizer"
        yield Finding("problem", "texts", text)
    if differ := len(set(tower_tokenizer.get_vocab().items()) - set(tokenizer.get_vocab().items())):
        text = f"{differ:,} entries of the vocabulary differ from the tower's own tokenizer: its embeddings "
        yield Finding("problem", "texts", f"{text}belong to other tokens; leave --tokenizer out")


# ---- memory and time -----------------------------------------------------------------------------------------


def check_step(
    build: Callable[[Any], Any],
    arguments: Any,
    batch: Mapping[str, Any],
    rows: int,
    embedded: int | None,
    *,
    real_rows: int = 0,
    steps: int = 0,
) -> Iterator[Finding]:
    """The memory of a step on fake tensors against the free memory, and time (on a GPU memory) of a real step.

    Args:
        build: makes the run's `ObjectiveTrainer` from arguments; the weights of its model change.
        arguments: the run's.
        batch: columns on the device, as the collator makes them.
        rows: of the batch, in a process.
        embedded: rows embedded at once, when fewer.
        real_rows: of the real step, 0 for none; skipped where it would use more than half of the free memory.
        steps: of the training, for its length.
    """
    limit, factor, measured = available_memory(arguments.device), 1.0, None
    chunk = f", {embedded} embedded at once" if embedded and embedded < rows else ""
    step = FakeStep.of_run(build, arguments, batch)
    try:
        whole = step.measure(rows, embedded)
        yield Finding("ok", "memory", f"{rows} rows a process{chunk}: {whole}")
        part = step.measure(real_rows, embedded) if real_rows not in (0, rows) else whole
    except RuntimeError as error:
        yield Finding("advice", "memory", f"a step cannot be counted on fake tensors: {error}")
        return
    if real_rows and part.total < 0.5 * limit:
        measured = measure_step(build, arguments, real_rows, embedded)
    if measured is not None and measured.peak:
        factor = measured.peak / part.total
        text = f"a real step of {real_rows} rows used {show_bytes(measured.peak)}, {factor:.2f} of the estimate"
        yield Finding("ok" if 0.5 < factor < 2 else "advice", "memory", text)
    need = max(factor, 1.0) * whole.total
    text, fits = f"{show_bytes(need)} of {show_bytes(limit)} free", need <= 0.9 * limit
    if not fits:
        halves = (1 << power for power in reversed(range((rows - 1).bit_length())))
        size = next((n for n in halves if max(factor, 1.0) * step.measure(rows, n).total < 0.7 * limit), None)
        remedy = f"--embed_batch_size {size} would fit" if size else "weights and optimizer do not fit by themselves"
        text = f"{text}: too little; {remedy}"
    yield Finding("ok" if fits else "problem", "memory", text)
    if measured is not None and measured.rate > 0:
        text = f"{measured.rate:.4g} rows a second in a step of {real_rows}"
        text += f"; {steps:,} steps of {rows} would take {duration(rows / measured.rate * steps)}" if steps > 0 else ""
        yield Finding("ok", "time", text)


def report(findings: Sequence[Finding]) -> str:
    """The findings as lines, by topic."""
    topics = list(dict.fromkeys(finding.topic for finding in findings))
    lines = [
        f"{level:8} {topic:11} {text}" for level, topic, text in sorted(findings, key=lambda f: topics.index(f.topic))
    ]
    count = Counter(finding.level for finding in findings)
    return "\n".join([*lines, ", ".join(f"{name} {count[name]}" for name in ("problem", "advice", "ok"))])
