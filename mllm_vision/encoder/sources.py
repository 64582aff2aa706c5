"""What `--encoder` names: a checkpoint by path or Hub id, or a preset or model type to be built with random weights."""

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
    """Whether `--encoder` is one of `list_encoders()`, to be built with random weights, and not a checkpoint.

    The Hub is asked (unless offline) about a bare name that is not one, not a path and not in the Hub's cache.

    Raises:
        FileNotFoundError: a bare name that is none of these; the nearest model type is named.
    """
    if config_fields(str(source)):
        return True
    _refuse_misspelt(os.fspath(source))
    return False


def is_convolutional(source: str | Path) -> bool:
    """Whether a name of `list_encoders()`, or the config of a folder or Hub id, is of a convolutional network.

    False where there is no config: loading the encoder reports what is wrong.
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
    """Said here, or "vitt" would be told of as a parent on the Hub, and its overrides be refused as a checkpoint's."""
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
        except errors.HFValidationError:  # nothing that could be a repository's name
            pass
        except Exception:  # no answer (of whichever transport the client has): loading says what is wrong with the Hub
            return
    raise FileNotFoundError(
        f"{unknown_name('model type', name, list_encoders())}; {name!r} is no path either (working folder: "
        f"{Path.cwd()}), and no repository {place}"
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
        pooler: False leaves a ViT that is built here without BERT's tanh layer: its pooled vector is then the
            normalised class token.

    Raises:
        ValueError: overrides for a checkpoint, or what `build_backbone` or `VisionEncoder.from_pretrained` refuse.
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
