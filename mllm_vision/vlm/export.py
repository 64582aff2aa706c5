"""Saving and loading: what stages one and two leave behind is a plain LLaVA directory."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoProcessor, LlavaProcessor

from mllm_vision.vlm.model import VisionLanguageModel
from mllm_vision.vlm.tokens import pad_left, settle_ends

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)
ADAPTER = "adapter"


def merge_lora(model: VisionLanguageModel | PeftModel) -> VisionLanguageModel:
    """``model`` with its LoRA adapters folded into the weights, in place; a model without adapters as it is."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def save_vlm(
    model: VisionLanguageModel | PeftModel, processor: LlavaProcessor, path: str | Path
) -> VisionLanguageModel:
    """Write a directory that ``LlavaForConditionalGeneration`` and ``AutoProcessor`` load without this package.

    Both projectors are native: the linear one is written as Llava's two layers with a linear activation between
    and an identity as the second. LoRA adapters are saved as they are under ``path/adapter`` and then merged.

    Args:
        model: the model, or the peft model around it (merged in place: train no further with it).
        processor: from ``build_vlm`` or ``load_vlm``; its chat template goes along.
        path: the directory to write.

    Returns:
        The merged model, as it was saved.
    """
    path = Path(path)
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(path / ADAPTER)
    merged = merge_lora(model)
    pad_left(processor.tokenizer)
    settle_ends(merged, processor)
    merged.save_pretrained(path)
    processor.save_pretrained(path)
    return merged


def load_vlm(
    path: str | Path, *, dtype: torch.dtype | str = torch.float32, token: str | None = None, revision: str | None = None
) -> tuple[VisionLanguageModel, LlavaProcessor]:
    """Read a LLaVA checkpoint, ours or any other on disk or on the Hub.

    Args:
        path: a directory written by ``save_vlm``, or the path or Hub id of any ``llava`` checkpoint.
        dtype: of the weights; "auto" keeps the checkpoint's.
        token, revision: for the Hub.

    Returns:
        The model in evaluation mode, and its processor.

    Raises:
        FileNotFoundError: a folder that is not there or has no config.json.
        ValueError: a folder that holds something else than a LLaVA model.
    """
    folder = Path(path)
    if folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
        read_config(folder)
    hub: dict[str, Any] = {"token": token, "revision": revision}
    model = VisionLanguageModel.from_pretrained(str(path), dtype=dtype, **hub)
    processor = AutoProcessor.from_pretrained(str(path), **hub)
    pad_left(processor.tokenizer)
    settle_ends(model, processor)
    if model.blind:
        logger.warning("%s was trained blind: it sees zeros instead of pictures", path)
    return model.eval(), processor


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a LLaVA folder; FileNotFoundError or ValueError saying what is there instead."""
    file = folder / "config.json"
    if not file.is_file():
        found = sorted(entry.name for entry in folder.iterdir())[:8] if folder.is_dir() else None
        inside = f"it holds {', '.join(found) or 'nothing'}" if found is not None else "there is no such folder"
        raise FileNotFoundError(f"{folder} is no saved model: no config.json ({inside}); give the folder that has one")
    config = json.loads(file.read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if kind != "llava":
        raise ValueError(
            f"{folder} holds a {kind!r} model, not a vision-language model ('llava'); "
            "give what recipes/align.py or recipes/instruct.py saved under 'model'"
        )
    return config
