"""Every method's paper is in the model card."""

from __future__ import annotations

import re

import pytest

from mllm_vision.hub.citations import citations
from mllm_vision.objectives import list_objectives, load_objective


@pytest.mark.parametrize("objective", list_objectives())
def test_every_method_is_cited_once_beside_its_tower(objective):
    block = citations("encoder", {"model_type": "resnet"}, load_objective(objective).citation)
    keys = re.findall(r"@\w+\{(\w+),", block)
    assert len(keys) == len(set(keys)) == 2 and "he2015resnet" in keys
    assert all(re.search(r"arXiv:\d{4}\.\d{5}|doi = ", entry) for entry in block.split("\n\n"))
    assert block.count("{") == block.count("}")


@pytest.mark.parametrize(
    ("objective", "tower"), [("clip", "clip_vision_model"), ("siglip", "siglip"), ("dinov2", "dinov2")]
)
def test_a_paper_of_method_and_tower_is_cited_once(objective, tower):
    block = citations("encoder", {"model_type": tower}, load_objective(objective).citation)
    assert len(re.findall(r"@article\{", block)) == 1


def test_a_method_that_names_no_paper_is_not_cited():
    block = citations("encoder", {"model_type": "resnet"}, load_objective("simclr").__base__.citation)
    assert re.findall(r"@article\{(\w+),", block) == ["he2015resnet"]
