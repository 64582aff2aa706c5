"""The trainers on two processes: metrics are means over both, one folder is written, resuming is exact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
from torch import nn
from transformers.utils import ModelOutput
from mllm_vision.training.recipe.arguments import RecipeArguments
from mllm_vision.training.recipe.run import Run
from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        loss = (self.dropout(self.layer(x)) - 1).square().mean()
        return ModelOutput(loss=loss, metrics={{"mean_x": x.mean()}})

    def after_step(self, progress):
        pass

    def save_pretrained(self, path):
        from safetensors.torch import save_file
        save_file(self.state_dict(), path / "model.safetensors")


generator = torch.Generator().manual_seed(0)
rows = [{{"x": torch.randn(4, generator=generator)}} for _ in range(16)]


def train(folder, **settings):
    args = RecipeArguments(output_dir=folder, use_cpu=True, per_device_train_batch_size=2, save_steps=2,
                           logging_steps=4, learning_rate=1e-2, disable_tqdm=True, **settings)
    run = Run("stage_zero", args, {{}}).start()
    trainer = ObjectiveTrainer(Toy(), args, train_dataset=rows, run=run)
    assert trainer.negatives_batch == 4, trainer.negatives_batch
    trainer.train()
    run.save_artifact(trainer.objective.save_pretrained, "encoder", "encoder")
    run.finish()


train(sys.argv[1] + "/whole", max_steps=4)
train(sys.argv[1] + "/whole", max_steps=4, overwrite=True)
import shutil
if int(__import__("os").environ["RANK"]) == 0:
    shutil.copytree(sys.argv[1] + "/whole", sys.argv[1] + "/again")
    shutil.rmtree(sys.argv[1] + "/again/checkpoint-4")
torch.distributed.barrier()
train(sys.argv[1] + "/again", max_steps=4, resume=True)
"""


def test_two_processes(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT), tests=str(ROOT / "tests")), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(program), str(tmp_path)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randn(4, generator=generator) for _ in range(16)])
    logged = [entry for entry in record["history"] if "loss" in entry]
    assert [entry["step"] for entry in logged] == [4]  # one process writes
    assert logged[0]["mean_x"] == pytest.approx(rows.mean().item(), abs=1e-6)  # every row once, on either process
    assert record["machine"]["processes"] == 2
    whole, again = (load_file(tmp_path / name / "encoder" / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
