"""Saving and loading of models of stages one and two as plain LLaVA directories."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaProcessor

from mllm_vision.data.images.transforms import ImageTransform
from mllm_vision.encoder.files import read_json
from mllm_vision.errors import nearby, reading
from mllm_vision.vlm.model import VisionLanguageModel
from mllm_vision.vlm.tokens import check_vocabulary, pad_left, settle_ends

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)
ADAPTER = "adapter"


def merge_lora(model: Any) -> VisionLanguageModel:
    """``model`` with its LoRA adapters merged into the weights, in place; a model without adapters is unchanged."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def save_vlm(
    model: VisionLanguageModel | PeftModel, processor: LlavaProcessor, path: str | Path
) -> VisionLanguageModel:
    """Writes a directory that ``LlavaForConditionalGeneration`` and ``AutoProcessor`` load without this package.

    Both projectors are native: the linear one is written as Llava's two layers with a linear activation and an identity
    as the second layer. LoRA adapters are saved under ``path/adapter`` and then merged.

    Args:
        model: the model, or the peft model around it (merged in place; do not train it further).
        processor: from ``build_vlm`` or ``load_vlm``; its chat template is saved too.
        path: the directory to write.

    Returns:
        The merged model.
    """
    path = Path(path)
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(str(path / ADAPTER))
    merged = merge_lora(model)
    pad_left(processor.tokenizer)
    settle_ends(merged, processor)
    merged.save_pretrained(path)
    processor.save_pretrained(path)
    return merged


def load_vlm(
    path: str | Path, *, dtype: torch.dtype | str = torch.float32, token: str | None = None, revision: str | None = None
) -> tuple[VisionLanguageModel, LlavaProcessor]:
    """Loads a LLaVA checkpoint, of this package or any other, from disk or the Hub.

    Args:
        path: a directory written by ``save_vlm``, or the path or Hub id of any ``llava`` checkpoint.
        dtype: of the weights; "auto" keeps the checkpoint's.
        token, revision: for the Hub.

    Returns:
        The model in evaluation mode, and its processor.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: not a LLaVA model, missing weights, or a processor that does not fit the model.
    """
    folder = Path(path)
    if folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
        read_config(folder)
    hub: dict[str, Any] = {"token": token, "revision": revision}
    with reading(path):
        loaded: Any = VisionLanguageModel.from_pretrained(
            str(path), dtype=dtype, output_loading_info=True, use_safetensors=True, **hub
        )
        model, found = loaded
        processor = AutoProcessor.from_pretrained(str(path), **hub)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{path} lacks {len(missing)} weights of a LLaVA ({', '.join(missing[:3])}), which would be random; use "
            "the folder of a complete checkpoint"
        )
    fit_processor(model.eval(), processor, str(path))
    pad_left(processor.tokenizer)
    settle_ends(model, processor)
    if model.blind:
        logger.warning("%s was trained blind: images are replaced by zeros", path)
    return model.eval(), processor


def fit_processor(model: VisionLanguageModel, processor: Any, path: str) -> None:
    """Sets the number of tokens per image in config and processor to that of the tower; logs corrections.

    Older LLaVA checkpoints have an unused ``image_seq_length`` and processors without a patch size.

    Raises:
        ValueError: not a LLaVA processor; images of a different size than the tower's; an image token without
            embedding.
    """
    if not isinstance(processor, LlavaProcessor):
        raise ValueError(
            f"{path} has no LlavaProcessor (found: {type(processor).__name__}); save one into the folder with "
            "LlavaProcessor(image_processor, tokenizer, patch_size=..., vision_feature_select_strategy=...)"
        )
    check_vocabulary(processor.tokenizer, path)
    config: Any = model.config
    table: Any = model.get_input_embeddings().weight
    token, rows = processor.image_token_id, table.shape[0]
    if token >= rows:
        raise ValueError(
            f"{path}: the processor's image token {processor.image_token!r} has id {token}, beyond the {rows} "
            "embeddings of the language model; use the processor that was saved with the model"
        )
    blank = ImageTransform(processor.image_processor, train=False)([Image.new("RGB", (64, 64))])
    size = config.vision_config.image_size
    if tuple(blank.shape[-2:]) != ((size, size) if isinstance(size, int) else tuple(size)):
        raise ValueError(
            f"{path}: the processor gives images of {tuple(blank.shape[-2:])} pixels, but the vision tower takes "
            f"{size}; correct the size of the image processor in processor_config.json"
        )
    tower = next(model.model.vision_tower.parameters())
    with torch.no_grad():
        tokens = len(model.get_image_features(blank.to(tower.device, tower.dtype)).pooler_output[0])
    patch = config.vision_config.patch_size
    wanted = {
        "patch_size": patch,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": tokens
        - (blank.shape[-2] // patch) * (blank.shape[-1] // patch)
        + (config.vision_feature_select_strategy == "default"),
    }
    changed = []
    for holder, values in ((config, {"image_seq_length": tokens, "image_token_id": token}), (processor, wanted)):
        for name, value in values.items():
            if (was := getattr(holder, name)) != value:
                changed.append(f"{name}={was} -> {value}")
                setattr(holder, name, value)
    if changed:
        logger.warning("%s: corrected to the vision tower's output: %s", path, ", ".join(changed))


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a LLaVA folder; FileNotFoundError or ValueError naming what the folder contains instead."""
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
    if kind != "llava":
        raise ValueError(
            f"{folder} contains a {kind!r} model, not a vision-language model ('llava'); "
            "use the folder 'model' saved by recipes/align.py or recipes/instruct.py"
        )
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise ValueError(f"{folder} is quantised ({method}), which is not supported; use the original")
    return config
