"""Barlow Twins, VICReg, SupCon, MAE and the method of docs/add_a_method.md: ranks and chunks compute what one does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import views_work

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add_a_method.md"
HEAD = {"head_hidden": 24, "head_out": 8}
SECOND = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
METHODS = {
    "barlow_twins": {**HEAD},
    "vicreg": {**HEAD},
    "vicreg, two networks": {
        **HEAD, "second_encoder": "siglip", "second_encoder_overrides": {**SECOND, "patch_size": 16},
    },
    "supcon": {"head_out": 8, "temperature": 0.2},
    "mae": {"decoder_width": 16, "decoder_layers": 1, "decoder_heads": 2},
    "lejepa:LeJepa": {**HEAD, "slices": 16},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the page's file lies."""
    folder = tmp_path_factory.mktemp("lejepa")
    name, code = re.search(r"```python\n# file: (\w+\.py)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S).groups()
    (folder / name).write_text(code, encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("method", METHODS)
def test_ranks_and_chunks_compute_what_one_process_does(gloo, folder, method):
    name, config = method.partition(",")[0], METHODS[method]
    close = 1e-5 if ":" in name else 1e-9  # the page's method computes its loss in fp32
    folder = folder if ":" in name else None
    losses, state = views_work.trained(name, config, [7], folder=folder)
    for chunk in (None, 2):
        for told, reached in gloo.run(2, views_work.trained, name, config, [4, 3], chunk, folder):
            assert told == pytest.approx(losses, rel=close), (method, chunk)
            for key, value in state.items():
                torch.testing.assert_close(
                    reached[key], value, rtol=10 * close, atol=close, msg=f"{method} {chunk} {key}"
                )
