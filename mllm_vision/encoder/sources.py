"""Resolves `--encoder`: a checkpoint by path or Hub id, or a preset or model type with random weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mllm_vision.encoder.build import build_backbone
from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.encoder.families import FAMILIES
from mllm_vision.encoder.files import Source, read_json
from mllm_vision.encoder.presets import config_fields, list_encoders
from mllm_vision.errors import unknown_name


def is_model_type(source: str | Path) -> bool:
    """Whether `--encoder` is one of `list_encoders()`, built with random weights, and not a checkpoint.

    Any other bare name must be a path, in the Hub's cache or, unless offline, on the Hub.

    Raises:
        FileNotFoundError: it is not; the nearest model type is named.
    """
    if config_fields(str(source)):
        return True
    _refuse_misspelt(os.fspath(source))
    return False


def is_convolutional(source: str | Path) -> bool:
    """Whether a name of `list_encoders()`, or the config of a folder or Hub id, is a convolutional network.

    False without a readable config, which loading reports.
    """
    fields = config_fields(str(source))
    if fields is None:
        try:
            fields = read_json(Source(source).file("config.json"))
        except (OSError, ValueError):
            return False
    family = FAMILIES.get(str(fields.get("model_type")))
    return family is not None and family.convolutional


def _refuse_misspelt(name: str) -> None:
    """Raises FileNotFoundError for a misspelt model type, which would otherwise be taken for a Hub id."""
    if "/" in name or os.path.exists(os.path.expanduser(name)):
        return
    import huggingface_hub
    from huggingface_hub import constants, errors

    if (Path(constants.HF_HUB_CACHE) / f"models--{name}").is_dir():
        return
    place = "in the Hub's cache (HF_HUB_OFFLINE is set)"
    if not constants.HF_HUB_OFFLINE:
        place = "on the Hub that this token may read"
        try:
            if huggingface_hub.repo_exists(name):
                return
        except errors.HFValidationError:  # not a valid repository name
            pass
        except Exception:  # the Hub cannot be reached, which loading reports
            return
    raise FileNotFoundError(
        f"{unknown_name('model type', name, list_encoders())}; {name!r} is neither a path (working folder: "
        f"{Path.cwd()}) nor a repository {place}"
    )


def build_encoder(
    source: str | Path,
    *,
    image_size: int | None = None,
    overrides: dict[str, Any] | None = None,
    pooler: bool = True,
) -> VisionEncoder:
    """An encoder by path, by Hub id, or with random weights by model type.

    Args:
        source: path or Hub id of an encoder, or a name of `list_encoders()` such as `"vit_small"`.
        image_size: side of the square image.
        overrides: config fields of an encoder built here.
        pooler: False builds a ViT without BERT's tanh layer; its pooled vector is the normalised class token.

    Raises:
        ValueError: overrides for a checkpoint; see also `build_backbone` and `VisionEncoder.from_pretrained`.
        FileNotFoundError: a path or Hub id that does not exist.
    """
    if is_model_type(source):
        backbone, processor = build_backbone(source, image_size=image_size, **(overrides or {}))
        if not pooler and backbone.config.model_type == "vit":
            backbone.pooler = None  # type: ignore[assignment]
        return VisionEncoder.from_backbone(backbone, processor)
    if overrides:
        names = ", ".join(sorted(overrides))
        raise ValueError(
            f"encoder overrides ({names}) only apply to a model type, not to the checkpoint {str(source)!r}"
        )
    return VisionEncoder.from_pretrained(source, image_size=image_size)
