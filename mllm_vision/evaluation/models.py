"""Loading what is to be measured, whatever it is, and its untrained counterpart."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mllm_vision.encoder.files import read_json
from mllm_vision.errors import nearby
from mllm_vision.vlm.systems.registry import model_types

PAIRS = {"clip", "siglip", "siglip2", "vision-text-dual-encoder", "mllm_vision_dual"}


class Loaded(NamedTuple):
    """A model with its kind ("encoder", "dual" or "vlm") and, for a VLM, its processor."""

    kind: str
    model: Any
    processor: Any = None


def model_kind(path_or_id: str) -> str:
    """ "encoder", "dual" or "vlm", from the model type in config.json.

    Raises:
        FileNotFoundError: a folder without config.json.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        file = folder / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no config.json; --model takes a saved encoder, dual or VLM folder")
    else:
        if folder.suffix or str(path_or_id).count("/") > 1 or str(path_or_id).startswith((".", "/")):
            raise FileNotFoundError(
                f"{path_or_id} does not exist; --model takes a saved model's folder or a Hub id{nearby(path_or_id)}"
            )
        from huggingface_hub import hf_hub_download

        file = Path(hf_hub_download(str(path_or_id), "config.json"))
    kind = str(read_json(file).get("model_type", ""))
    if kind in model_types():
        return "vlm"
    return "dual" if kind in PAIRS else "encoder"


def load_model(path_or_id: str, device: str | torch.device = "cpu") -> Loaded:
    """Load an encoder, an image-text pair or a vision-language model for evaluation."""
    kind = model_kind(path_or_id)
    if kind == "vlm":
        from mllm_vision.vlm import load_vlm

        model, processor = load_vlm(path_or_id)
        return Loaded(kind, model.to(device).eval(), processor)
    if kind == "dual":
        from mllm_vision.encoder.dual import DualEncoder

        return Loaded(kind, DualEncoder.from_pretrained(path_or_id).to(device).eval())
    from mllm_vision.encoder import VisionEncoder

    return Loaded(kind, VisionEncoder.from_pretrained(path_or_id).to(device).eval())


@torch.no_grad()
def reinitialise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every weight of ``model`` a fresh random value, as its own config initialises it; in place.

    The untrained baseline: same architecture, same processing, nothing learnt. The caller's random state is
    kept.
    """
    from transformers import PreTrainedModel

    from mllm_vision.encoder.stems import set_stem, stem_of

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        done: set[int] = set()
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and id(module) not in done:
                fresh = type(module)(module.config)
                if (stem := stem_of(module.config)) != "imagenet":
                    set_stem(fresh, stem)
                given = fresh.state_dict()  # may hold more than the module: a ViT's pooler that was taken out
                module.load_state_dict({name: given[name] for name in module.state_dict()})
                done.update(id(part) for part in module.modules())
            elif isinstance(module, nn.Linear) and id(module) not in done:
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return model
