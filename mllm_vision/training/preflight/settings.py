"""What a contrastive training is set to, against its towers; and what a step takes, against the machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from mllm_vision.data.images.transforms import ImageTransform
from mllm_vision.data.text_length import cut_text
from mllm_vision.encoder.build import build_processor
from mllm_vision.encoder.text.towers import CLIP_TEXT, SIGLIP_TEXT, text_positions
from mllm_vision.training.preflight.doctor import Finding, PairSample
from mllm_vision.training.preflight.memory import show_bytes


def check_images(
    vision: Any,
    sample: PairSample,
    *,
    crop_scale: tuple[float, float] = (0.9, 1.0),
    trained_size: int | None = None,
    built: bool = False,
) -> list[Finding]:
    """Image settings against the tower's: size, normalisation, crops, and what the pixels come out as.

    Args:
        vision: a `VisionEncoder`.
        sample: with decoded images.
        crop_scale: of training crops.
        trained_size: side of the images the tower was trained on, where it is known.
        built: the tower has random weights: nothing was trained on other settings.
    """
    found, processor, size = [], vision.processor, vision.image_size
    family = vision.config.model_type
    if trained_size and size and trained_size != size:
        text = f"the tower was trained on {trained_size} px and gets {size} px: its positions are interpolated"
        found.append(Finding("advice", "images", f"{text}; expect a dip that some training makes up for"))
    for name in ("do_normalize", "do_rescale", "do_resize"):
        if getattr(processor, name, True) is False:
            found.append(Finding("problem", "images", f"the image processor has {name}=false; the tower expects it on"))
    usual = build_processor(vision.config, size or 224)
    own, common = ((list(each.image_mean or ()), list(each.image_std or ())) for each in (processor, usual))
    if not built and any(abs(a - b) > 0.01 for left, right in zip(own, common) for a, b in zip(left, right)):
        text = f"mean {_rounded(own[0])} and std {_rounded(own[1])} are not those of {family}"
        text += f" ({_rounded(common[0])}, {_rounded(common[1])}): right only if this tower was trained so"
        found.append(Finding("advice", "images", text))
    if crop_scale[0] < 0.3:
        text = f"crop_scale {crop_scale[0]:g} keeps less of an image than its caption tells of; CLIP keeps 0.9"
        found.append(Finding("advice", "images", text))
    if not sample.images:
        return [*found, Finding("problem", "images", "no image of the sample can be decoded")]
    pixels = ImageTransform(processor)(sample.images)
    mean, std = pixels.mean().item(), pixels.std().item()
    text = f"{size} px; {len(pixels)} images come out with mean {mean:.2f} and std {std:.2f}"
    if not (abs(mean) < 1.5 and 0.3 < std < 2.5):
        text += ": about 0 and 1 is expected, so normalisation does not fit"
        found.append(Finding("problem", "images", text))
    else:
        found.append(Finding("ok", "images", text))
    small = sum(min(image.size) < (size or 0) for image in sample.images) / len(sample.images)
    if small > 0.1:
        text = f"{small:.0%} of the images are smaller than {size} px and are enlarged: tokens without detail"
        found.append(Finding("advice", "images", text))
    return found


def check_texts(dual: Any, sample: PairSample, *, tower_tokenizer: Any = None) -> list[Finding]:
    """Tokenizer settings against the text tower's and the captions: length, unknown words, padding, vocabulary.

    Args:
        dual: a `DualEncoder`.
        sample: with captions.
        tower_tokenizer: the one that was saved with the text tower, where that is another.
    """
    found, tokenizer, limit = [], dual.tokenizer, dual.max_text_length
    config = dual.text.config
    captions = [cut_text(caption, tokenizer, 16 * limit) for caption in sample.captions[:2000]]
    encoded = list(tokenizer(captions, truncation=False, verbose=False)["input_ids"])
    lengths = sorted(len(ids) for ids in encoded)
    cut = sum(length > limit for length in lengths) / max(len(lengths), 1)
    text = f"captions have {statistics.median(lengths):.0f} tokens in the middle, {lengths[-1]} at most; limit {limit}"
    positions = text_positions(dual.text)
    if cut > 0.01:
        text += f", which cuts {cut:.1%} of them"
        if positions and positions > limit:
            text += f": the tower has positions for {positions} (--max_text_length)"
        found.append(Finding("problem" if cut > 0.2 else "advice", "texts", text))
    else:
        found.append(Finding("ok", "texts", text))
    tokens, words = sum(lengths), sum(len(caption.split()) for caption in captions)
    unknown = sum(ids.count(tokenizer.unk_token_id) for ids in encoded) / max(tokens, 1)
    if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id, tokenizer.pad_token_id) and unknown > 0.005:
        text = f"{unknown:.1%} of the tokens are unknown: the tokenizer does not know this language or alphabet"
        found.append(Finding("problem" if unknown > 0.05 else "advice", "texts", text))
    elif tokens > 4 * words:
        text = f"{tokens / max(words, 1):.1f} tokens a word: the tokenizer was made for other texts; train one on these"
        found.append(Finding("advice", "texts", text))
    pad = getattr(config, "pad_token_id", None)
    unmasked = config.model_type == SIGLIP_TEXT and "attention_mask" not in tokenizer.model_input_names
    if unmasked and pad is not None and pad != tokenizer.pad_token_id:
        text = f"the tower attends to its padding, id {pad}, and the tokenizer pads with {tokenizer.pad_token_id}"
        found.append(Finding("problem", "texts", text))
    if config.model_type == CLIP_TEXT and tokenizer.bos_token_id is not None and tower_tokenizer is not None:
        ours, theirs = (each("a")["input_ids"][:1] for each in (tokenizer, tower_tokenizer))
        if ours != theirs:
            text = f"texts begin with id {ours}, and the tower's own tokenizer begins them with {theirs}"
            found.append(Finding("problem", "texts", text))
    if tower_tokenizer is not None and (differ := _different(tokenizer, tower_tokenizer)):
        text = (
            f"{differ:,} entries of the vocabulary differ from those of the tower's own tokenizer: its embeddings stand"
        )
        found.append(Finding("problem", "texts", f"{text} for other words; leave --tokenizer out"))
    return found


def _different(left: Any, right: Any) -> int:
    """Entries that one vocabulary has at another id, or not at all."""
    return len(set(right.get_vocab().items()) - set(left.get_vocab().items()))


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), 3) for value in values]


# ---- what a step takes ---------------------------------------------------------------------------------------


def check_step(
    cost: Any, measured: Any, rows: int, embedded: int | None, limit: int | None, steps: int
) -> list[Finding]:
    """The memory estimate for the whole batch, held against a measured step and against what there is.

    Args:
        cost: `StepCost`.
        measured: `MeasuredStep`, or None when no step was run.
        rows: of the batch, in a process.
        embedded: rows embedded at once, when fewer.
        limit: bytes there are, or None.
        steps: of the training, for its length.
    """
    whole = cost.at(rows, embedded)
    chunk = f", {whole.embedded} embedded at once" if whole.embedded < rows else ""
    found = [Finding("ok", "memory", f"estimate for {rows} rows a process{chunk}: {whole}")]
    need = float(whole.total)
    if measured is not None and measured.peak:
        part = cost.at(measured.rows, embedded)
        factor = measured.peak / part.total
        told = f"a measured step of {measured.rows} rows took {show_bytes(measured.peak)}, {factor:.2f} of its estimate"
        told += f" ({show_bytes(part.total)})" if measured.rows < rows else ""
        need *= max(factor, 1.0)
        if measured.rows < rows:
            told += f"; so expect {show_bytes(need)} for {rows}"
        found.append(Finding("ok" if 0.5 < factor < 2 else "advice", "memory", told))
    elif measured is not None:
        found.append(
            Finding("advice", "memory", "this system does not tell a process's peak: the estimate is unchecked")
        )
    if limit:
        text = f"{show_bytes(need)} of {show_bytes(limit)} that are free"
        if need > 0.9 * limit:
            chunk_size = cost.rows_within(int(0.7 * limit * whole.total / need), rows)
            remedy = (
                f"--embed_batch_size {chunk_size} would fit"
                if chunk_size
                else "weights and optimizer alone are too much"
            )
            found.append(Finding("problem", "memory", f"{text}: too little; {remedy}"))
        else:
            found.append(Finding("ok", "memory", text))
    if measured is not None and measured.seconds > 0:
        length = measured.seconds * rows / measured.rows * steps
        text = (
            f"{measured.seconds:.3g} s for a step of {measured.rows} rows, {measured.rows / measured.seconds:.4g} rows "
        )
        text += "a second" + (f"; {steps:,} steps of {rows} would take {_duration(length)}" if steps > 0 else "")
        found.append(Finding("ok", "time", text))
    return found


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"
