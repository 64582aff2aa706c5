"""Whether a language model can be trained on packed conversations, tested numerically."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllm_vision.data.chat.collate import IGNORED, ConversationCollator

_TRIED = 48  # tokens of a conversation in the trial, unless a window needs more
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_HALF = 0.1  # of 16-bit logits; models that cannot be packed differ by a multiple of it


def check_packing(model: Any, longest: int, row: int | None = None, *, flag: str = "pack_turns") -> None:
    """Refuses packing if packed conversations do not give the logits of separate ones.

    Conversations of random ids are run packed and separately: two, or enough to exceed every window. For "pack_turns"
    they share a prefix and are kept apart by a mask (as by ``PackedConversations``), for "packing" by positions that
    begin again (as by ``PackedSamples``), in two rows, one of them padded. Attention by mask and positions is exact.
    Sliding windows (shorter than a conversation), ALiBi, recurrent and convolutional layers and an active cache are
    not.

    Args:
        model: a ``LanguageTask``.
        longest: tokens of the longest conversation to be packed.
        row: maximal tokens of a packed row; None: no more than the trial's.
        flag: "pack_turns" or "packing".

    Raises:
        ValueError: the logits differ, or the language model does not accept the mask.
    """
    if flag == "packing":
        _check_positions(model)
    windows = _windows(model.config.get_text_config())
    size = max([_TRIED, *(window + _TRIED // 2 for window in windows if window < longest)])
    size = max(min(longest, size), 6)
    tail = size - size // 3 if flag == "pack_turns" else size
    count = max([2, *(-(-window // tail) + 1 for window in windows if window < (row or 0))])
    was_training = model.training
    model.eval()
    model.packing_checked = model.packing_checked | {flag}  # the trial's own passes need none
    try:
        with torch.no_grad():
            packed, separate = (_trial if flag == "pack_turns" else _trial_of_rows)(model, size, count)
    except Exception as error:
        model.packing_checked = model.packing_checked - {flag}
        if f"--{flag}" in str(error):
            raise
        raise _refusal(model, flag, f"it does not accept the mask ({type(error).__name__}: {error})") from error
    finally:
        model.train(was_training)
    tolerance = _TOLERANCE.get(packed.dtype, _HALF)
    difference, scale = (packed - separate).float(), separate.float()
    off = float((difference.norm(dim=-1) / scale.norm(dim=-1).mean().clamp(min=1e-12)).max())
    if not off <= tolerance:
        model.packing_checked = model.packing_checked - {flag}
        raise _refusal(model, flag, f"the logits differ by up to {off:.1%} in conversations of {size} tokens")


def _refusal(model: Any, flag: str, why: str) -> ValueError:
    kind = getattr(model.config.get_text_config(), "model_type", "the language model")
    return ValueError(
        f"{flag}: packed conversations are not equivalent to separate ones with {kind!r}: {why}. Its layers depend "
        "on neighbours in the sequence (a sliding window, ALiBi, recurrent or convolutional layers, or attention that "
        f"takes no mask of one conversation each); train without --{flag}"
    )


def _check_positions(model: Any) -> None:
    """Refuses what cannot keep conversations apart by positions alone, without a trial."""
    if model.system.bidirectional:
        raise _refusal(model, "packing", f"the prompts of {model.system.name!r} attend in both directions")
    implementation = model.config.get_text_config()._attn_implementation
    if implementation == "flex_attention":  # torch 2.13 ends the process on a CPU
        raise _refusal(model, "packing", "flex_attention does not read positions; use attn_implementation='sdpa'")


def _windows(config: Any) -> list[int]:
    """Every setting that may be the length of a layer's window."""
    words = ("window", "chunk", "local")
    settings = config.to_dict().items()
    return [v for k, v in settings if type(v) is int and v > 0 and any(word in k for word in words)]


def _trial(model: Any, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Logits ``[S, V]`` of the same tokens, packed and separate."""
    device = model.device
    shared = size // 3
    tail = size - shared
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size - 1, (shared + count * tail,), generator=draw)
    ids += ids >= model.config.image_token_id  # any token but the image's
    labels = ids.clone()
    # A conversation's first token is not predicted, in the data as here.
    labels[:shared] = labels[shared::tail] = IGNORED
    turns = torch.cat([torch.zeros(shared, dtype=torch.int64), torch.arange(1, count + 1).repeat_interleave(tail)])
    inputs = ConversationCollator.separate([{"input_ids": ids, "turns": turns}], len(ids))
    inputs |= {"input_ids": ids[None], "labels": labels[None]}
    packed = model(**{name: value.to(device) for name, value in inputs.items()}, return_logits=True).logits
    rows = [torch.cat([torch.arange(shared), torch.arange(shared, shared + tail) + tail * k]) for k in range(count)]
    apart = {"input_ids": torch.stack([ids[row] for row in rows]), "labels": torch.stack([labels[row] for row in rows])}
    apart["attention_mask"] = torch.ones_like(apart["input_ids"])
    return packed, model(**{name: value.to(device) for name, value in apart.items()}, return_logits=True).logits


def _trial_of_rows(model: Any, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Logits ``[S, V]`` of the same tokens: two rows of several conversations each, and the conversations alone."""
    draw = torch.Generator().manual_seed(0)
    sizes = [[size] * count, [size // 2 + 1, size // 3 + 1]]  # the second row is padded
    found: dict[str, list[Any]] = {"rows": [], "alone": []}
    for row in sizes:
        parts = [torch.randint(model.config.get_text_config().vocab_size - 1, (each,), generator=draw) for each in row]
        parts = [part + (part >= model.config.image_token_id) for part in parts]  # any token but the image's
        labels = [torch.cat([torch.full((1,), IGNORED), part[1:]]) for part in parts]
        found["alone"] += [{"input_ids": part[None], "labels": part[None]} for part in parts]
        segments = torch.arange(len(row)).repeat_interleave(torch.tensor(row))
        found["rows"].append({"input_ids": torch.cat(parts), "labels": torch.cat(labels), "segments": segments})
    packed = ConversationCollator.pad(found["rows"], max(sum(row) for row in sizes), pad_id=0)
    alone = [model(**_moved(batch, model.device), return_logits=True).logits for batch in found["alone"]]
    return model(**_moved(packed, model.device), return_logits=True).logits, torch.cat(alone)


def _moved(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}
