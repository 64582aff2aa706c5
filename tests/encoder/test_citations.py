"""Every method's paper is in the model card."""

from __future__ import annotations

import re

import pytest

from mllm_vision.hub.citations import citations
from mllm_vision.objectives import list_objectives


@pytest.mark.parametrize("objective", list_objectives())
def test_every_method_is_cited_once_beside_its_tower(objective):
    block = citations("encoder", {"model_type": "resnet"}, {"objective": objective})
    keys = re.findall(r"@article\{(\w+),", block)
    assert len(keys) == len(set(keys)) == 2 and "he2015resnet" in keys
    assert all(re.search(r"arXiv:\d{4}\.\d{5}", entry) for entry in block.split("\n\n"))


def test_a_method_of_ones_own_is_not():
    block = citations("encoder", {"model_type": "resnet"}, {"objective": "lejepa:LeJepa"})
    assert re.findall(r"@article\{(\w+),", block) == ["he2015resnet"]
