"""Saving and loading of the models of stages one and two as plain directories of transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText

import mllm_vision.vlm.connectors  # noqa: F401  (makes their model types known to transformers)
from mllm_vision.encoder.files import read_json
from mllm_vision.errors import nearby, reading
from mllm_vision.vlm.systems import system_of
from mllm_vision.vlm.systems.registry import model_types
from mllm_vision.vlm.task import LanguageTask
from mllm_vision.vlm.tokens import check_vocabulary, pad_left, settle_ends

logger = logging.getLogger(__name__)
ADAPTER = "adapter"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def merge_adapters(task: LanguageTask) -> LanguageTask:
    """``task`` with its adapters merged into the weights, in place; without adapters it is unchanged."""
    if task.adapters is not None:
        task.adapters.merge_and_unload()
        object.__setattr__(task, "adapters", None)
    return task


def save_vlm(task: LanguageTask, processor: Any, path: str | Path) -> LanguageTask:
    """Writes a directory that ``AutoModelForImageTextToText`` and ``AutoProcessor`` load without this package.

    A linear connector is written as Llava's two layers with a linear activation and an identity as the second layer.
    Adapters are saved under ``path/adapter`` (with what was trained beside them in ``trained.safetensors``) and then
    merged.

    Args:
        task: from ``build_vlm`` or ``load_vlm`` (its adapters are merged in place; do not train it further).
        processor: from there too; its chat template is saved with it.
        path: the directory to write.

    Returns:
        The merged task.
    """
    path = Path(path)
    if task.adapters is not None:
        task.adapters.save_pretrained(str(path / ADAPTER))
        beside = {name: p for name, p in task.model.named_parameters() if p.requires_grad and "lora_" not in name}
        if beside:
            tensors = {name: p.detach().contiguous() for name, p in beside.items()}
            save_file(tensors, path / ADAPTER / "trained.safetensors", metadata={"format": "pt"})
    merge_adapters(task)
    pad_left(processor.tokenizer)
    settle_ends(task.model, processor)
    task.model.save_pretrained(path)
    processor.save_pretrained(path)
    return task


def load_vlm(
    path: str | Path, *, dtype: torch.dtype | str = torch.float32, token: str | None = None, revision: str | None = None
) -> tuple[LanguageTask, Any]:
    """Loads a checkpoint of any system, of this package or another origin, from disk or the Hub.

    Args:
        path: a directory written by ``save_vlm``, or the path or Hub id of any checkpoint of a system's class.
        dtype: of the weights; "auto" keeps the checkpoint's.
        token, revision: for the Hub.

    Returns:
        The task in evaluation mode, and its processor.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: not a model of a system, missing weights, or a processor that does not fit the model.
    """
    folder = Path(path)
    if folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
        read_config(folder)
        if not any((folder / name).is_file() for name in PROCESSOR_FILES):
            raise ValueError(
                f"{folder} has no processor ({' or '.join(PROCESSOR_FILES)}), which makes a model's inputs of images; "
                "copy it from where the model was made"
            )
    hub: dict[str, Any] = {"token": token, "revision": revision}
    with reading(path):
        system = system_of(AutoConfig.from_pretrained(str(path), **hub), str(path))
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            str(path), dtype=dtype, output_loading_info=True, use_safetensors=True, **hub
        )
        model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{path} lacks {len(missing)} weights of a {type(model).__name__} ({', '.join(missing[:3])}), which would "
            "be random; use the folder of a complete checkpoint"
        )
    with reading(path):
        processor = system.load_processor(model.eval(), str(path), **hub)
    check_vocabulary(processor.tokenizer, str(path))
    pad_left(processor.tokenizer)
    settle_ends(model, processor)
    task = LanguageTask(model, system)
    if task.blind:
        logger.warning("%s was trained blind: images are replaced by zeros", path)
    return task.eval(), processor


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model's folder; FileNotFoundError or ValueError naming what the folder contains instead."""
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{folder} contains LoRA adapters without their model: merge them (merge_and_unload of peft), or "
                "use the folder above, where recipes/instruct.py saved them merged"
            )
        found = sorted(entry.name for entry in folder.iterdir())[:8] if folder.is_dir() else None
        missing = f"no such folder{nearby(folder)}"
        inside = missing if found is None else f"it contains {', '.join(found) or 'nothing'}"
        raise FileNotFoundError(f"{folder} is not a saved model: no config.json ({inside}); use the folder with one")
    config = read_json(file)
    kind = config.get("model_type")
    if kind not in model_types() and not (config.get("mllm_vision") or {}).get("system"):
        raise ValueError(
            f"{folder} contains a {kind!r} model, not a vision-language model ({', '.join(sorted(model_types()))}); "
            "use the folder 'model' saved by recipes/align.py or recipes/instruct.py"
        )
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise ValueError(f"{folder} is quantised ({method}), which is not supported; use the original")
    return config
