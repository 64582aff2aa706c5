"""Vision backbones from scratch: a config in, random weights and a matching image processor out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.efficientnet.modeling_efficientnet import round_filters

from mllm_vision.encoder.families import COMPOSITES, FAMILIES, _side, family_of
from mllm_vision.encoder.files import read_json
from mllm_vision.encoder.presets import ALIASES, config_fields, list_encoders
from mllm_vision.encoder.sizes import check_image_size, resize_processor
from mllm_vision.encoder.stems import check_stem, set_stem, stem_of
from mllm_vision.errors import unknown_name


def build_backbone(
    spec: dict[str, Any] | str | Path, *, image_size: int | None = None, **overrides: Any
) -> tuple[PreTrainedModel, Any]:
    """A vision backbone with random weights, and an image processor of its size.

    Args:
        spec: a name of `list_encoders()`, such as the preset `"vit_small"` or the model type `"clip_vision_model"`,
            a config as a dict with `model_type`, or the path of a `config.json` or its directory.
        image_size: side of the square image.
        **overrides: fields of the config (`hidden_size`, `num_hidden_layers`, `num_attention_heads`,
            `intermediate_size`, `patch_size`, ...); of a ResNet also `stem="cifar"` (`encoder.stems.set_stem`).

    Returns:
        (backbone, processor): feed them to `VisionEncoder.from_backbone`.

    Raises:
        ValueError: unknown model type or field (the nearest known one is named), a size that the patches do not
            divide, heads that do not divide the width.
        FileNotFoundError: no such config file.
    """
    fields = _read_spec(spec)
    model_type = fields.pop("model_type")
    config_class = type(AutoConfig.for_model(model_type))
    known = config_class().to_dict()
    stem = overrides.pop("stem", None) or stem_of(fields)
    if stem != "imagenet":
        check_stem(stem, model_type)
    for name in overrides:
        if name not in known:
            raise ValueError(unknown_name(f"{model_type} config field", name, known))
    fields.update(overrides)
    if image_size is not None and "image_size" in known:
        fields["image_size"] = image_size
    width, heads = ({**known, **fields}.get(name) for name in ("hidden_size", "num_attention_heads"))
    if isinstance(width, int) and isinstance(heads, int) and (heads < 1 or width % heads):
        raise ValueError(f"hidden_size={width} is not divisible by num_attention_heads={heads}")
    try:
        config: Any = config_class(**fields)
        if model_type == "efficientnet":
            # transformers defaults to B7's width for any coefficient, which fails at run time
            fits = round_filters(config, 1280)
            if fields.setdefault("hidden_dim", fits) != fits:
                raise ValueError(f"hidden_dim={fields['hidden_dim']} must be {fits} with this width_coefficient")
            config.hidden_dim = fits
    except Exception as error:  # transformers' strict configs raise several types; all mean a wrong value
        raise ValueError(f"{model_type}: {error}") from error

    size = image_size or _side(getattr(config, "image_size", None) or 224)
    patch_size = getattr(config, "patch_size", None)
    check_image_size(size, None if patch_size is None else _side(patch_size))
    backbone = AutoModel.from_config(config)
    if model_type == "efficientnet":
        _initialise_efficientnet(backbone)
    if stem != "imagenet":
        set_stem(backbone, stem)
    return backbone, build_processor(config, size)


@torch.no_grad()
def _initialise_efficientnet(backbone: PreTrainedModel) -> None:
    """The paper's initialisation: transformers draws the norms' gains around zero, which blocks the signal."""
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels / module.groups
            module.weight.normal_(0, (2 / fan_out) ** 0.5)


def build_processor(config: Any, image_size: int) -> Any:
    """The image processor of a family at one size. Square images are only resized, others as the family does."""
    family = family_of(config)
    # The PIL backend gives the same pixels with or without torchvision, and its config loads with either.
    name = family.processor + ("Pil" if hasattr(transformers, family.processor + "Pil") else "")
    return resize_processor(getattr(transformers, name)(), image_size)


def _read_spec(spec: dict[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(spec, dict):
        fields = dict(spec)
    elif named := config_fields(str(spec)):
        fields = named
    else:
        path = Path(spec)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            message = unknown_name("model type", str(spec), list_encoders())
            raise FileNotFoundError(f"{spec} is neither a config file nor a model type: {message}")
        fields = read_json(path)
    model_type = fields.get("model_type")
    if model_type in COMPOSITES and isinstance(fields.get("vision_config"), dict):
        fields = {"model_type": f"{model_type}_vision_model", **fields["vision_config"]}
        model_type = fields["model_type"]
    model_type = ALIASES.get(str(model_type), model_type)
    if model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type!r} cannot be built as a vision backbone; use {', '.join(FAMILIES)}")
    # Class and version of the writer are not part of the architecture.
    for name in ("architectures", "transformers_version", "dtype", "torch_dtype"):
        fields.pop(name, None)
    return {**fields, "model_type": model_type}
