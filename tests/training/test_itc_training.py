"""ITC through the Trainer: resumed = uninterrupted, in chunks = at once, the ramp over the first epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs_for_tests import make_objective, pair_batches
from transformers import TrainerCallback

from mllm_vision.training.recipe.arguments import RecipeArguments
from mllm_vision.training.recipe.run import Run
from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer


class Interrupt(TrainerCallback):
    """Pulls the plug after a step: nothing more is saved."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


def pairs(n: int = 32) -> list[dict[str, torch.Tensor]]:
    batch = pair_batches(1, n)[0]
    return [{name: value[row] for name, value in batch.items()} for row in range(n)]


def trainer(folder: Path, callbacks: Any = (), **settings: Any) -> ObjectiveTrainer:
    """Six steps of eight of 32 rows (an epoch is four), through a queue of 20."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "max_steps": 6, "per_device_train_batch_size": 8, "save_steps": 3,
        "logging_steps": 1, "learning_rate": 1e-2, "disable_tqdm": True, "data_seed": 1, "save_strategy": "steps",
    }  # fmt: skip
    args = RecipeArguments(**{**defaults, **settings})
    objective = make_objective("itc", queue_size=20, momentum=0.9)
    run = Run("stage_zero", args, {}).start()
    return ObjectiveTrainer(objective, args, train_dataset=pairs(), run=run, callbacks=list(callbacks))


@pytest.mark.parametrize("settings", [{}, {"embed_batch_size": 3}], ids=["at once", "in chunks"])
def test_resumed_is_bit_for_bit_uninterrupted(settings: dict, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "torn", [Interrupt()], **settings).train()
    torch.manual_seed(99)
    again = trainer(tmp_path / "torn", resume=True, **settings)
    again.train()
    expected, found = whole.model.state_dict(), again.model.state_dict()
    assert expected.keys() == found.keys() and {"queue.features", "queue.written", "alpha_share"} <= expected.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert int(found["queue.written"]) == 48 and len(again.objective.queue) == 20


def test_in_chunks_is_at_once_and_the_ramp_takes_the_first_epoch(tmp_path: Path) -> None:
    runs = {}
    for name, settings in {
        "whole": {},
        "chunks": {"embed_batch_size": 3},
        "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    }.items():
        runs[name] = trainer(tmp_path / name, optim="sgd", learning_rate=0.1, save_strategy="no", **settings)
        runs[name].train()
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        logged = [entry for entry in map(json.loads, lines) if "loss" in entry]
        assert [entry["alpha"] for entry in logged] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4], abs=1e-6)
        assert [entry["queue_rows"] for entry in logged] == [0, 8, 16, 20, 20, 20]
    expected = runs["whole"].model.state_dict()
    for name in ("chunks", "accumulated"):
        found = runs[name].model.state_dict()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
