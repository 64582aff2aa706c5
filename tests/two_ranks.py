"""A recipe on two processes by torchrun from the command line, and what tells its run from that of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]


def torchrun(recipe: str, words: list[str], timeout: float = 280) -> str:
    """What "recipes/x.py" says on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(ROOT / recipe), *words], capture_output=True, text=True, timeout=timeout, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr + done.stdout


def assert_same_run(one: Path, two: Path, artifact: str, steps: int) -> None:
    """Losses of every step and the weights that are left, up to what rounding in fp32 grows to."""
    losses = []
    for folder in (one, two):
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == steps
    wanted, found = (load_file(folder / artifact / "model.safetensors") for folder in (one, two))
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
