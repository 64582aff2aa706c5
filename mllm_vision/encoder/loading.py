"""Loads a backbone, its processor and its stored selection from a directory or a Hub id."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoImageProcessor, AutoModel, PreTrainedModel, ViTModel

from mllm_vision.encoder.build import build_processor
from mllm_vision.encoder.families import COMPOSITES, FAMILIES, OWN, SYSTEMS, _side, accepted_types, family_of
from mllm_vision.encoder.files import Source, read_json
from mllm_vision.encoder.stems import stem_of, with_stem
from mllm_vision.errors import reading

logger = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Image processors that make several tiles or an image's own size; an encoder takes one square.
TILING = ("LlavaNext", "LlavaOnevision", "GotOcr2", "Idefics2", "Idefics3", "SmolVLM")


@dataclass
class Tower:
    """The parts of an encoder found in a directory or repository."""

    backbone: PreTrainedModel
    processor: Any
    select_layer: int | None
    select_feature: str | None
    lineage: dict[str, Any] | None
    directory: Path | None


def load_tower(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    processor: Any = None,
    dtype: torch.dtype | str = torch.float32,
) -> Tower:
    """Loads the parts of an encoder; see `VisionEncoder.from_pretrained` for accepted checkpoints and errors."""
    with reading(path_or_id):
        return _load_tower(Source(path_or_id, revision=revision, token=token), processor, dtype)


def _load_tower(source: Source, processor: Any, dtype: torch.dtype | str) -> Tower:
    fields = read_json(source.file("config.json"))
    model_type = fields.get("model_type")
    if model_type == "mllm_vision_dual":  # a pair without a transformers class: each tower has its own folder
        inner = source.folder("vision_model")
        return load_tower(inner, processor=processor, dtype=dtype)
    if model_type == "siglip2":
        raise ValueError(
            f"{source}: model_type='siglip2' is the NaFlex variant, which takes patches of any aspect ratio instead of "
            "images; use a SigLIP 2 checkpoint of fixed size (model_type='siglip' in its config)"
        )
    if model_type not in FAMILIES and model_type not in COMPOSITES:
        raise ValueError(f"{source} is not a vision model: model_type={model_type!r}; accepted are {accepted_types()}")

    vision = fields
    prefixes: tuple[str, ...] = ("",)
    if model_type in COMPOSITES:
        prefixes = COMPOSITES[model_type]
        # transformers fills in the defaults that composite configs omit (LLaVA 1.5)
        known = model_type not in OWN  # those of this package are written in full
        vision = (
            CONFIG_MAPPING[model_type].from_dict(fields).vision_config.to_dict() if known else fields["vision_config"]
        )
        if vision.get("model_type") not in FAMILIES and not _converts(vision.get("model_type")):
            raise ValueError(
                f"{source}: its image tower has model_type={vision.get('model_type')!r}; accepted are "
                f"{', '.join(FAMILIES)}"
            )
    backbone = _load_backbone(source, vision, prefixes, dtype)
    if processor is None:
        processor = _load_processor(source, backbone)
    layer, feature = _remembered(fields, vision, backbone)
    lineage = None
    if model_type in FAMILIES:  # a pair's or a VLM's lineage describes more than this tower
        lineage = source.lineage()
    return Tower(backbone, processor, layer, feature, lineage, source.directory)


def _load_backbone(
    source: Source, vision: dict[str, Any], prefixes: tuple[str, ...], dtype: torch.dtype | str
) -> PreTrainedModel:
    config = CONFIG_MAPPING[vision["model_type"]].from_dict(vision)
    optional: tuple[str, ...] = ()
    if config.model_type in FAMILIES:
        optional = family_of(config).optional_weights
        plain_class = _model_class(config)
    else:
        from mllm_vision.encoder.convert import TOWERS

        plain_class = TOWERS[config.model_type]
    model_class = with_stem(plain_class, stem_of(vision))
    state = _read_weights(source, prefixes)
    # Older files lack BatchNorm's batch counter, which does not affect the results.
    optional = (*optional, ".num_batches_tracked")
    # ViTs of classifiers or trained here have no pooler, and some SigLIP towers no head: transformers must not replace
    # them by random ones.
    parts = {part for name in state for part in name.split(".")}
    arguments: dict[str, Any] = (
        {"add_pooling_layer": False} if model_class is ViTModel and "pooler" not in parts else {}
    )
    if config.model_type == "siglip_vision_model" and "head" not in parts:
        config.vision_use_head = False
    try:
        loaded: Any = model_class.from_pretrained(
            None, config=config, state_dict=dict(state), dtype=dtype, output_loading_info=True, **arguments
        )
        model, info = loaded
    except RuntimeError as error:
        raise ValueError(f"{source}: weights do not fit their config.json: {error}") from error
    missing = set(info["missing_keys"])
    missing = {name for name in missing if not name.startswith(optional) and not name.endswith(optional)}
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} weights of the {config.model_type} are missing, such as {sorted(missing)[0]!r}; "
            f"found {len(state)} under {' or '.join(prefix or 'the root' for prefix in prefixes)}"
        )
    model.__class__ = plain_class
    if config.model_type not in FAMILIES:
        return _plain_tower(source, model.eval())
    return model.eval()


def _converts(model_type: Any) -> bool:
    """Whether this is a tower type of one system, which `encoder.convert` turns into a plain encoder's."""
    from mllm_vision.encoder.convert import TOWERS

    return model_type in TOWERS


def _plain_tower(source: Source, model: PreTrainedModel) -> PreTrainedModel:
    from mllm_vision.encoder.convert import plain_tower

    try:
        return plain_tower(model)
    except ValueError as error:
        raise ValueError(f"{source}: its image tower is not a plain encoder: {error}") from error


def _model_class(config: Any) -> type[PreTrainedModel]:
    with torch.device("meta"):
        return type(AutoModel.from_config(config))


def _read_weights(source: Source, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Tensors under the prefixes, which are removed from their names; only files with such tensors are downloaded."""
    index = source.file(INDEX, optional=True)
    if index is not None:
        places: dict[str, str] = read_json(index)["weight_map"]
        names = sorted({file for key, file in places.items() if key.startswith(prefixes)})
    else:
        weights = source.file(WEIGHTS, optional=True)
        if weights is None:
            raise FileNotFoundError(
                f"{source} has no {WEIGHTS} (only safetensors are read, because pickles can run code); convert with "
                "AutoModel.from_pretrained(...).save_pretrained(...), or try revision='refs/pr/1', often the Hub's "
                "conversion"
            )
        names = [WEIGHTS]
    state: dict[str, torch.Tensor] = {}
    for name in names:
        try:
            with safe_open(source.file(name), framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                    prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
                    if prefix is not None:
                        state[key.removeprefix(prefix)] = file.get_tensor(key)
        except Exception as error:
            if isinstance(error, OSError):
                raise
            raise ValueError(f"{source}: {name} cannot be read and may be truncated: {error}") from error
    if not state:
        raise ValueError(f"{source}: no weights under {' or '.join(prefixes)}")
    return state


def _load_processor(source: Source, backbone: PreTrainedModel) -> Any:
    found = source.file("preprocessor_config.json", optional=True) or source.file(
        "processor_config.json", optional=True
    )
    if found is None:
        family = family_of(backbone)
        raise FileNotFoundError(
            f"{source} has no image processor (preprocessor_config.json); save one there, or pass processor=, "
            f"for example transformers.{family.processor}.from_pretrained(<the model it was trained from>)"
        )
    settings = read_json(found)
    settings = settings.get("image_processor", settings)
    if settings.get("image_processor_type") == "JoinedImageProcessor":  # of several towers (vlm.connectors)
        return processor_of(settings["processors"][0])
    kind = str(settings.get("image_processor_type", ""))
    if kind.startswith("DINOv3ViT"):
        logger.info("%s: DINOv3's image processor requires torchvision; using a ViT processor of its settings", source)
        return _plain_processor(settings, backbone, settings["size"]["height"])
    if kind.startswith(TILING):
        config: Any = backbone.config
        return _plain_processor(settings, backbone, _side(config.image_size))
    try:
        return AutoImageProcessor.from_pretrained(source.directory)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source}: {found.name} does not describe an image processor; pass processor= ({error})"
        ) from error


def processor_of(settings: dict[str, Any]) -> Any:
    """The image processor that a dict from its `to_dict` describes, on the PIL backend (which needs no torchvision)."""
    fields = dict(settings)
    name = str(fields.pop("image_processor_type")).removesuffix("Fast").removesuffix("Pil")
    return getattr(transformers, f"{name}Pil" if hasattr(transformers, f"{name}Pil") else name).from_dict(fields)


def _plain_processor(settings: dict[str, Any], backbone: PreTrainedModel, image_size: int) -> Any:
    """The processor of the backbone's family for one size, with the scaling and normalisation of `settings`."""
    processor = build_processor(backbone.config, image_size)
    names = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    kept = {name: settings[name] for name in names if settings.get(name) is not None}
    sizes = {name: getattr(processor, name) for name in ("size", "crop_size") if getattr(processor, name, None)}
    return type(processor)(**sizes, **kept)


def _remembered(
    fields: dict[str, Any], vision: dict[str, Any], backbone: PreTrainedModel
) -> tuple[int | None, str | None]:
    """The selection stored in a checkpoint: this package's key, or a system's `vision_feature_*`."""
    own = vision.get("mllm_vision") or {}
    layer, feature = own.get("select_layer"), own.get("select_feature")
    if fields.get("model_type") in SYSTEMS:
        usual, strategy = SYSTEMS[fields["model_type"]]
        stored = (fields.get("vision_feature_layers") or [fields.get("vision_feature_layer", usual)])[0]
        if isinstance(stored, int):
            layer = stored  # the language model was trained on it
        else:
            logger.warning("vision_feature_layer=%s is a list; using the default layer, or pass select_layer=", stored)
        if feature is None:
            full = fields.get("vision_feature_select_strategy", strategy) == "full"
            feature = "cls_patch" if full and family_of(backbone).has_cls else "patch"
    return layer, feature


def carry_lineage(lineage: dict[str, Any] | None, source: Path | None, directory: Path) -> None:
    """Copies lineage.json and recipe.yaml from `source` if the weights in `directory` are those they describe."""
    if lineage is None or source is None:
        return
    from mllm_vision.hub.lineage import hash_weights

    stated = lineage.get("weights_sha256")
    if stated is None or hash_weights(directory) != stated:
        return
    for name in ("lineage.json", "recipe.yaml"):
        if (source / name).is_file():
            shutil.copy2(source / name, directory / name)
