"""Which methods there are, by name. A method is its file and one line here; everything else comes from its class."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from mllm_vision.errors import unknown_name

if TYPE_CHECKING:
    from mllm_vision.objectives.base import Objective

IMAGES = {  # recipes/pretrain_images.py trains them
    "barlow_twins": "BarlowTwins",
    "byol": "BYOL",
    "contrastive": "Contrastive",
    "dino": "DINO",
    "dinov2": "DINOv2",
    "mae": "MAE",
    "moco_v1": "MoCoV1",
    "moco_v2": "MoCoV2",
    "moco_v3": "MoCoV3",
    "pcl": "PCL",
    "simclr": "SimCLR",
    "simsiam": "SimSiam",
    "supcon": "SupCon",
    "triplet": "Triplet",
    "vicreg": "VICReg",
}
IMAGE_TEXT = {  # recipes/pretrain.py trains them
    "clip": "CLIP",
    "itc": "ITC",
    "siglip": "SigLIP",
}


def method_homes() -> dict[str, str]:
    """Class name -> module below `mllm_vision`, of the methods of this package."""
    known = {**IMAGES, **IMAGE_TEXT}
    return {attribute: f"objectives.{name}" for name, attribute in known.items() if ":" not in attribute}


def list_objectives(data: str | None = None) -> list[str]:
    """Names that `load_objective` knows.

    Args:
        data: `"images"` or `"image_text"` names only the methods that learn from such data.

    Raises:
        ValueError: other data.
    """
    kinds = {"images": IMAGES, "image_text": IMAGE_TEXT}
    if data is None:
        return sorted({**IMAGES, **IMAGE_TEXT})
    if data not in kinds:
        raise ValueError(unknown_name("data", data, kinds))
    return sorted(kinds[data])


def load_objective(name: str) -> type[Objective]:
    """A method's class.

    Args:
        name: one of `list_objectives()`, or `"package.module:Class"` for a method of your own.

    Raises:
        ValueError: an unknown name (the nearest known one is named), a module that cannot be imported, or a
            class that is not an `Objective`.
    """
    from mllm_vision.objectives.base import Objective

    known = {**IMAGES, **IMAGE_TEXT}.get(name.lower())
    path = known if known and ":" in known else f"mllm_vision.objectives.{name.lower()}:{known}" if known else name
    if ":" not in path:
        message = unknown_name("objective", name, list_objectives())
        raise ValueError(f"{message}. A method of your own is 'package.module:Class'")
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        where = f"; PYTHONPATH=. finds it, if it is {module}.py in this folder" * (
            isinstance(error, ModuleNotFoundError) and error.name == module
        )
        raise ValueError(f"cannot load objective {name!r}: {error}{where}") from error
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise ValueError(f"{name!r} is {found!r}, not a subclass of mllm_vision.objectives.Objective")
    if not hasattr(found, "Config"):
        raise ValueError(f"objective {name!r} has no Config dataclass; its fields are the method's flags")
    return found


if __name__ == "__main__":  # for shell scripts: python -m mllm_vision.objectives.registry images
    print(*list_objectives(*sys.argv[1:2]))
