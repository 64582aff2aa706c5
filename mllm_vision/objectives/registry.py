"""Which methods there are, by name."""

from __future__ import annotations

import importlib

from mllm_vision.errors import unknown_name
from mllm_vision.objectives.base import Objective

_CLASSES = {
    "barlow_twins": "BarlowTwins",
    "byol": "BYOL",
    "clip": "CLIP",
    "dino": "DINO",
    "dinov2": "DINOv2",
    "itc": "ITC",
    "mae": "MAE",
    "moco_v1": "MoCoV1",
    "moco_v2": "MoCoV2",
    "moco_v3": "MoCoV3",
    "pcl": "PCL",
    "siglip": "SigLIP",
    "simclr": "SimCLR",
    "simsiam": "SimSiam",
    "supcon": "SupCon",
    "vicreg": "VICReg",
}
OBJECTIVES = {name: f"mllm_vision.objectives.{name}:{attribute}" for name, attribute in _CLASSES.items()}


def list_objectives() -> list[str]:
    """Names that `load_objective` knows."""
    return sorted(OBJECTIVES)


def load_objective(name: str) -> type[Objective]:
    """A method's class.

    Args:
        name: one of `list_objectives()`, or `"package.module:Class"` for a method of your own.

    Raises:
        ValueError: an unknown name (the nearest known one is named), a module that cannot be imported, or a
            class that is no `Objective`.
    """
    path = OBJECTIVES.get(name.lower(), name)
    if ":" not in path:
        told = unknown_name("objective", name, list_objectives())
        raise ValueError(f"{told}. A method of your own is 'package.module:Class'")
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        where = f"; PYTHONPATH=. finds it, if it is {module}.py in this folder" * (
            isinstance(error, ModuleNotFoundError) and error.name == module
        )
        raise ValueError(f"cannot load objective {name!r}: {error}{where}") from error
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise ValueError(f"{name!r} is {found!r}, which is no subclass of mllm_vision.objectives.Objective")
    if not hasattr(found, "Config"):
        raise ValueError(f"objective {name!r} has no Config dataclass; its fields are the method's flags")
    return found
