"""What can be known of a contrastive training before it starts: batch, duplicates, chance, settings.

Every check returns `Finding`s; scripts/doctor.py runs them all on a config. The settings of the towers and what a step
takes are in doctor_settings.py.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch

from mllm_vision.data.images.files import first_image
from mllm_vision.data.pairs import captions_of, image_id
from mllm_vision.data.records.sampling import BadRow, draw_key, judge, text_id
from mllm_vision.training.callbacks.health import expected_chance

# (pairs of data, best batch): the larger the data, the larger the batch that was best
PUBLISHED_BATCHES = ((3e6, 16_384), (12e6, 32_768), (400e6, 262_144))
# Texts called positive before the first step, against those that are: within this the towers make up for it at once
# (on Flickr8k a bias of -10, which calls 1/150 of them so, learnt as fast as the one that fits).
START_RATIOS = (1e-3, 20.0)
IMAGES = 48  # how many of a sample are decoded


@dataclass(frozen=True)
class Finding:
    """One line of the report; "problem" is what should not be started with."""

    level: Literal["ok", "advice", "problem"]
    topic: str
    text: str


@dataclass
class PairSample:
    """Rows drawn from a data set of pairs: ids of their captions and images, and some images decoded."""

    rows: int | None
    captions: list[str] = field(default_factory=list)
    caption_ids: list[int] = field(default_factory=list)
    image_ids: list[int] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def related(self) -> float:
        """The share of all pairs of two rows that have a caption or an image in common."""
        count = len(self)
        both = list(zip(self.caption_ids, self.image_ids))
        common = _pairs_in_common(self.caption_ids) + _pairs_in_common(self.image_ids) - _pairs_in_common(both)
        return common / (count * (count - 1)) if count > 1 else 0.0

    def positives(self, pairs: int) -> float:
        """How many rows of a batch of `pairs` an anchor is expected to match, itself included."""
        return 1 + max(pairs - 1, 0) * self.related


def _pairs_in_common(ids: Sequence[Any]) -> int:
    return sum(count * (count - 1) for count in Counter(ids).values())


def sample_pairs(dataset: Any, count: int = 5000, *, rows: int | None = None, seed: int = 0) -> PairSample:
    """`count` rows of a `PairDataset` drawn at random (all of a smaller one), each with the caption of epoch 0.

    Ids are those of training. Only some images are decoded; what cannot be read is counted in `bad`.

    Args:
        dataset: a `PairDataset`.
        count: how many rows.
        rows: of the whole data, where the data set holds only a part of it (the head of a stream); None is unknown.
        seed: of the draw.
    """
    total = len(dataset)
    chosen = range(total) if total <= count else sorted(random.Random(seed).sample(range(total), count))
    drawn = set(random.Random(seed).sample(chosen, min(IMAGES, len(chosen))))
    sample = PairSample(rows)
    for index in chosen:
        found = judge(f"row {index}", _row, dataset, index, index in drawn)
        if isinstance(found, BadRow):
            sample.bad.append(str(found))
            continue
        text, identity, image = found
        sample.images += [] if image is None else [image]
        sample.captions.append(text)
        sample.caption_ids.append(text_id(text))
        sample.image_ids.append(identity)
    return sample


def _row(dataset: Any, index: int, decoded: bool) -> tuple[str, int, Any]:
    """(caption, id of the image, the image where it is to be decoded) of a row, as the training reads it."""
    record, key = dataset.records[index], draw_key(dataset.seed, 0, index)
    if decoded:
        row = dataset.read_record(record, key, index)
        return row["caption"], row["image_id"], row["image"]
    captions = captions_of(record[dataset.columns["caption"]])
    if not captions:
        raise BadRow("the caption is empty")
    return captions[key % len(captions)], _identity(record[dataset.columns["image"]]), None


def _identity(value: Any) -> int:
    return image_id(first_image(value))


# ---- batch, duplicates, chance -------------------------------------------------------------------------------


def published_batch(rows: float) -> tuple[int, bool]:
    """The batch size that was best on so many pairs, and whether that is beyond what was published.

    Between the published points straight in logarithms; below them with the square root of the data, as between
    the first two; above them the last.

    Reference:
        Cheng et al., 2024, "Breaking the Memory Barrier: Near Infinite Batch Size Scaling for Contrastive Loss",
        section on batch and data size (https://arxiv.org/abs/2410.17243).
    """
    first, last = PUBLISHED_BATCHES[0], PUBLISHED_BATCHES[-1]
    if rows < first[0]:
        return max(2, round(first[1] * math.sqrt(rows / first[0]))), True
    for (left, low), (right, high) in pairwise(PUBLISHED_BATCHES):
        if rows <= right:
            share = math.log(rows / left) / math.log(right / left)
            return round(low * (high / low) ** share), False
    return last[1], True


def check_batch(pairs: int, sample: PairSample, steps: int = 0, *, queue: int = 0) -> list[Finding]:
    """Negatives of an anchor that are negatives, passes over the data, and the batch for this much data.

    `queue` is how many embeddings of earlier batches the method keeps as further negatives.
    """
    if pairs < 2 and not queue:
        return [Finding("problem", "batch", "one pair a step has nothing to be told from: raise the batch size")]
    extra = sample.positives(pairs + queue) - 1
    kept = f" and {queue:,} of a queue" if queue else ""
    text = f"{pairs:,} pairs meet in a loss{kept}: {pairs - 1 + queue - extra:,.6g} effective negatives per anchor"
    text += f" (of {pairs - 1 + queue:,}, {extra:.2g} repeat its caption or image)" if extra >= 0.01 else ""
    found = [Finding("ok", "batch", text)]
    if sample.rows is None:
        return found
    if steps > 0:
        passes = f"{steps * pairs / sample.rows:.3g} passes over {sample.rows:,}"
        found.append(Finding("ok", "batch", f"{steps:,} steps take {steps * pairs:,} pairs: {passes}"))
    return [*found, _against_published(pairs, sample.rows, queue)]


def _against_published(pairs: int, rows: int, queue: int) -> Finding:
    best, beyond = published_batch(rows)
    if not beyond:
        told = f"about {best:,} for {rows:,} pairs of data"
    elif rows < PUBLISHED_BATCHES[0][0]:
        told = (
            f"about {best:,} for {rows:,} pairs of data, a hint: published is 16k at 3M, and the rest its square root"
        )
    else:
        told = f"{best:,} or more for {rows:,} pairs of data"
    if pairs * 4 < best and not queue:
        text = f"a batch of {pairs:,} is small (best: {told}); --embed_batch_size makes it larger in the same memory"
        return Finding("advice", "batch", text)
    if pairs > 4 * best:
        return Finding(
            "advice", "batch", f"a batch of {pairs:,} is large (best: {told}): few steps are left to learn in"
        )
    return Finding("ok", "batch", f"a batch of {pairs:,} is usual (best: {told})")


def check_duplicates(sample: PairSample, pairs: int, *, positives: bool = True) -> list[Finding]:
    """Captions and images that occur more than once; false negatives where the loss is not told of them."""
    count = len(sample)
    if count < 2:
        return [Finding("problem", "duplicates", f"only {count} usable rows were found: {'; '.join(sample.bad[:2])}")]
    texts, images = Counter(sample.captions), Counter(sample.image_ids)
    again, seen = count - len(set(sample.caption_ids)), count - len(images)
    whole = sample.rows is not None and sample.rows <= count + len(sample.bad)
    told = (
        f"of {'all' if whole else 'a sample of'} {count:,} rows {again:,} repeat a caption ({again / count:.2%}) and "
    )
    told += f"{seen:,} an image ({seen / count:.2%})"
    often = [(text, number) for text, number in texts.most_common(2) if number > 1]
    if often:
        told += "; most often " + ", ".join(f"{text[:50]!r} {number} times" for text, number in often)
    found = [Finding("ok", "duplicates", told)]
    false = sample.positives(pairs) - 1
    if not positives and false >= 0.01:
        found.append(
            Finding(
                "problem" if false >= 0.1 else "advice",
                "duplicates",
                f"{false:.2g} false negatives per anchor and step: duplicate_positives is off; turn it on",
            )
        )
    elif seen > 0.2 * count:
        text = "the same images stand in many rows: put the captions of an image into one row (a list), one is drawn"
        found.append(Finding("advice", "duplicates", f"{text} each epoch, and no batch holds an image twice"))
    if false > 0.1 * pairs:
        text = f"an anchor matches {false:.3g} of {pairs - 1} others: little is left to tell apart"
        found.append(
            Finding("advice", "duplicates", f"{text}; more varied captions or classes are worth more than rows")
        )
    if sample.bad:
        share = len(sample.bad) / (count + len(sample.bad))
        level: Any = "problem" if share > 0.01 else "advice"
        found.append(Finding(level, "duplicates", f"{share:.2%} of the rows cannot be used, such as {sample.bad[0]}"))
    return found


def check_chance(objective: Any, sample: PairSample, pairs: int) -> list[Finding]:
    """The loss of a model that knows nothing, with the duplicates that the sample lets expect."""
    positives = sample.positives(pairs)
    chance = expected_chance(objective, pairs, positives)
    if chance is None:
        return [Finding("ok", "loss", f"{type(objective).__name__} states no loss at chance")]
    beside = f" and {positives:.3g} positives of each" if positives >= 1.005 else ""
    return [Finding("ok", "loss", f"at chance the loss is {chance:.4f} for {pairs:,} pairs{beside}")]


@torch.no_grad()
def check_start(objective: Any, batch: Mapping[str, Any], pairs: int, sample: PairSample) -> list[Finding]:
    """The loss of one batch before the first step against chance, and whether the sigmoid loss's bias fits.

    Args:
        objective: an `ImageTextObjective` on its device; it is left as it was.
        batch: columns, as the collator makes them.
        pairs: of a step of the run.
        sample: for the duplicates to expect among them.
    """
    rows = len(next(iter(batch.values())))
    chance = expected_chance(objective, rows, sample.positives(rows))
    was_training = objective.training
    objective.eval()
    embeddings = objective.embed(**batch)
    loss = float(objective.loss(embeddings).loss)
    objective.train(was_training)
    found = []
    if chance:
        text = f"before the first step it is {loss:.4f} for {rows} pairs, and chance for them {chance:.4f}"
        if loss > 1.5 * chance:
            found.append(
                Finding("advice", "loss", f"{text}: it starts from confident mistakes and unlearns them first")
            )
        else:
            found.append(Finding("ok", "loss", text + ": the towers know such pairs" * (loss < 0.5 * chance)))
    loaded = getattr(objective.config, "initial_logit_bias", 0) is None  # a trained pair's own bias is not judged
    if getattr(objective.dual, "logit_bias", None) is None or loaded:
        return found
    bias, positives = objective.dual.logit_bias.item(), sample.positives(pairs)
    others = objective.dual.logits(embeddings["image"], embeddings["text"]) - bias
    others = others[~torch.eye(rows, dtype=torch.bool, device=others.device)].double()

    def said(value: float) -> float:
        """Texts of a whole step that are called positives of an image of theirs or of others."""
        return float((others + value).sigmoid().mean()) * (pairs - 1)

    low, high = -100.0, 100.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if said(middle) < positives else (low, middle)
    text = f"initial_logit_bias {bias:.4g} calls {said(bias):.3g} of {pairs - 1:,} other texts positives of an image, "
    text += f"{positives:.3g} would be right"
    most = min(START_RATIOS[1] * positives, pairs / 4)
    if START_RATIOS[0] * positives <= said(bias) <= max(most, 2 * positives):
        return [*found, Finding("ok", "loss", text)]
    return [*found, Finding("advice", "loss", f"{text}: {low:.3g} starts there")]


def check_leak(sample: PairSample, evaluated: Sequence[Any], read: Callable[[Any], int] = _identity) -> list[Finding]:
    """Images of the evaluation that the sample of the training data holds too."""
    ids = set(sample.image_ids)
    identities = []
    for value in evaluated:
        try:
            identities.append(read(value))
        except ValueError:
            continue
    common = sum(identity in ids for identity in identities)
    text = f"{common} of {len(identities)} evaluation images are among {len(ids):,} sampled training images"
    return [Finding("problem" if common else "ok", "evaluation", text + ": the result will flatter" * bool(common))]


def report(findings: Sequence[Finding]) -> str:
    """The findings as lines, by topic in the order they came."""
    topics = list(dict.fromkeys(finding.topic for finding in findings))
    lines = []
    for topic in topics:
        for finding in findings:
            if finding.topic == topic:
                lines.append(f"{finding.level:8} {topic:11} {finding.text}")
    count = Counter(finding.level for finding in findings)
    total = ", ".join(f"{name} {count[name]}" for name in ("problem", "advice", "ok"))
    return "\n".join([*lines, total])


def training_steps(arguments: Any, rows: int | None, pairs: int) -> int:
    """How many steps the arguments ask for; 0 when the length of the data is not known."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    return int(arguments.num_train_epochs * (rows // pairs)) if rows else 0
