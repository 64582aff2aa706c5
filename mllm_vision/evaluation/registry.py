"""Which evaluators there are, by name. An evaluator is its file and one line here; the rest comes from its class."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mllm_vision.errors import unknown_name

if TYPE_CHECKING:
    from mllm_vision.evaluation.base import Evaluator

LABELLED = {  # learn from labelled images: --evaluators and --final_evaluators of pretrain_images.py too
    "knn": ".labelled.knn:KnnAccuracy",
    "probe": ".labelled.linear_probe:LinearProbe",
}
EVALUATORS = {
    "zero_shot": ".zero_shot:ZeroShot",
    "retrieval": ".retrieval:Retrieval",
    "geometry": ".geometry:Geometry",
    "maps": ".maps.maps:Maps",
    "vqa": ".language.question_answering:QuestionAnswering",
    "yes_no": ".language.yes_no:YesNo",
    "captioning": ".language.captions:Captioning",
    **LABELLED,
    "board": ".geometry:Board",
    "attention": ".maps.attention:Attention",
}


def evaluator_homes() -> dict[str, str]:
    """Class name -> module below `mllm_vision`, of the evaluators of this package."""
    found = (path[1:].split(":") for path in EVALUATORS.values() if path.startswith("."))
    return {attribute: f"evaluation.{module}" for module, attribute in found}


def list_evaluators() -> list[str]:
    """Names that `load_evaluator` and `--task` of scripts/evaluate.py know."""
    return list(EVALUATORS)


def load_evaluator(name: str) -> type[Evaluator]:
    """The class of an evaluator.

    Raises:
        ValueError: an unknown name (the nearest known one is named).
    """
    known = {**EVALUATORS, **LABELLED}
    if name not in known:
        raise ValueError(unknown_name("evaluator", name, known))
    module, _, attribute = known[name].rpartition(":")
    return getattr(importlib.import_module(module, __package__), attribute)
