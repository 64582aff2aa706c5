"""Resumed with other flags or other data: what was given takes effect, or is refused in words; nothing is only told."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file

from mllm_vision.data.pairs import PairDataset
from mllm_vision.data.streams.streams import Stream, StreamDataset
from mllm_vision.errors import IncompleteRun
from mllm_vision.training.checkpoint.changed_flags import changed_flags
from mllm_vision.training.checkpoint.continuity import ROWS, data_identity
from mllm_vision.training.recipe.arguments import RecipeArguments
from mllm_vision.training.recipe.parser import recipe_dict
from mllm_vision.training.recipe.run import Run

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))
import resume_work

BASE = {"max_steps": 8, "save_steps": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "weight_decay": 0.1}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps, stopped dead after its checkpoint at 4."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    resume_work.seen(folder, None, 5, **BASE)
    return folder


def resumed(begun: Path, folder: Path, **changed: Any) -> Any:
    """A trainer that went on from the checkpoint with other settings."""
    shutil.copytree(begun, folder)
    trainer = resume_work.trainer_of(folder, None, resume=True, **{**BASE, **changed})
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("changed", "key", "value"),
    [
        ({"learning_rate": 1e-3}, "lr", 1e-3),
        ({"weight_decay": 0.5}, "weight_decay", 0.5),
        ({"adam_beta2": 0.9}, "betas", (0.9, 0.9)),
        ({"adam_epsilon": 1e-3}, "eps", 1e-3),
    ],
)
def test_what_is_given_anew_is_trained_with(
    changed: dict, key: str, value: Any, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the very next step: the optimizer is asked, not the flags."""
    used: list[Any] = []
    original = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        used.append([group[key] for group in self.param_groups])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    trainer = resumed(begun, tmp_path / "run", **changed)
    expected = value if key != "weight_decay" else 0.0  # the one parameter here is a scalar
    assert used == [[expected]] * 4
    saved = torch.load(tmp_path / "run" / "checkpoint-8" / "optimizer.pt", weights_only=True)["param_groups"][0]
    assert saved[key] == expected
    assert trainer.state.global_step == 8


@pytest.mark.parametrize("changed", [{"lr_scheduler_type": "cosine"}, {"max_steps": 16}, {"warmup_steps": 6}])
def test_another_schedule_holds_from_the_next_step_on(changed: dict, begun: Path, tmp_path: Path) -> None:
    before = {**BASE, "lr_scheduler_type": "linear"}
    resume_work.seen(tmp_path / "linear", None, 5, **before)
    trainer = resumed(
        tmp_path / "linear", tmp_path / "run", **{"lr_scheduler_type": "linear", "logging_steps": 1, **changed}
    )
    rates = {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}
    steps, warmup = changed.get("max_steps", 8), changed.get("warmup_steps", 0)
    cosine = "cosine" in changed.values()

    def expected(step: int) -> float:  # of the step that was counted last before it
        if step < warmup:
            return 1e-2 * step / warmup
        share = (step - warmup) / (steps - warmup)
        return 1e-2 * ((1 + math.cos(math.pi * share)) / 2 if cosine else 1 - share)

    assert {step: rate for step, rate in rates.items() if step > 4} == {
        step: pytest.approx(expected(step - 1)) for step in range(5, steps + 1)
    }


def test_another_rhythm_of_saving_holds(begun: Path, tmp_path: Path) -> None:
    resumed(begun, tmp_path / "run", save_steps=3, save_total_limit=None)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
        "checkpoint-4", "checkpoint-6", "checkpoint-8"
    ]  # fmt: skip


def test_nothing_is_touched_where_nothing_was_changed(begun: Path, tmp_path: Path) -> None:
    whole = resume_work.trainer_of(tmp_path / "whole", None, **BASE)
    whole.train()
    trainer = resumed(begun, tmp_path / "run")
    assert torch.equal(trainer.model.weight, whole.model.weight)
    one, two = (torch.load(folder / "checkpoint-8" / "optimizer.pt", weights_only=True)["param_groups"] for folder in
                (tmp_path / "whole", tmp_path / "run"))  # fmt: skip
    assert one == two


def test_another_optimizer_is_refused(begun: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds the state of AdamW, and --optim asks for SGD: resume with the flags"):
        resumed(begun, tmp_path / "run", optim="sgd")


def test_other_groups_are_refused(begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun, tmp_path / "run")
    trainer = resume_work.trainer_of(tmp_path / "run", None, resume=True, **BASE)
    trainer.model.extra = torch.nn.Parameter(torch.zeros(2, 2))
    trainer._issue_warnings_after_load = lambda result: None
    with pytest.raises(ValueError, match=r"the parameters that train, .* \(1 groups there, 2 here"):
        trainer.train()


def test_a_rate_that_lies_in_the_state_of_the_schedule_is_refused(tmp_path: Path) -> None:
    plateau = {**BASE, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 4}
    plateau |= {"metric_for_best_model": "one_loss"}

    class One:
        name, primary_metric = "one", "loss"

        def __call__(self, model: Any, step: int) -> dict[str, float]:
            return {"loss": 1.0}

    resume_work.trainer_of(tmp_path, None, evaluators=[One()], **{**plateau, "max_steps": 4}).train()
    again = {**plateau, "learning_rate": 1e-3}
    with pytest.raises(ValueError, match="another learning rate: ReduceLROnPlateau keeps its rate"):
        resume_work.trainer_of(tmp_path, None, evaluators=[One()], resume=True, **again).train()


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_without_its_state_is_refused_unless_asked_for(missing: str, begun: Path, tmp_path: Path) -> None:
    """As the stock Trainer leaves it: without a manifest."""
    shutil.copytree(begun, tmp_path / "run")
    for name in (missing, "complete.json"):
        (tmp_path / "run" / "checkpoint-4" / name).unlink()
    with pytest.raises(
        ValueError, match=f"has no {missing}: only its weights could be resumed.*--accept_missing_state"
    ):
        resume_work.seen(tmp_path / "run", None, resume=True, **BASE)
    rows = resume_work.seen(tmp_path / "run", None, resume=True, accept_missing_state=True, **BASE)
    assert len(rows) == 4


def test_a_best_checkpoint_with_a_flipped_bit_is_not_the_result(tmp_path: Path) -> None:
    class Falling:
        name, primary_metric = "one", "loss"

        def __call__(self, model: Any, step: int) -> dict[str, float]:
            if step == 8:
                file = tmp_path / "checkpoint-4" / "model.safetensors"
                file.write_bytes(file.read_bytes()[:-1] + b"x")
            return {"loss": float(step)}

    settings = {**BASE, "eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "one_loss", "greater_is_better": False}
    with pytest.raises(
        ValueError, match="checkpoint-4 is damaged: the content of model.safetensors .*last step are kept"
    ):
        resume_work.trainer_of(tmp_path, None, evaluators=[Falling()], **settings).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    shutil.rmtree(tmp_path / "checkpoint-8")
    trainer = resume_work.trainer_of(tmp_path, None, evaluators=[Falling()], **settings)
    trainer.run = run = Run("stage_zero", trainer.args, {}).start()
    trainer.train()  # a run is not lost for it: its last weights are the result, and it says so
    run.save_artifact(
        lambda folder: save_file(trainer.model.state_dict(), folder / "model.safetensors"), "model", "encoder"
    )
    last = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    assert all(torch.equal(value, last[name]) for name, value in trainer.model.state_dict().items())
    with pytest.raises(IncompleteRun, match="loading the best checkpoint"):
        run.finish()
    assert "damaged" in json.loads((tmp_path / "run.json").read_text())["missing"][0]["cause"]


# ---- data ----------------------------------------------------------------------------------------------------


def test_other_data_are_noticed(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fewer(resume_work.Rows):
        def __init__(self) -> None:
            super().__init__(37)

    monkeypatch.setattr(resume_work, "Rows", Fewer)
    with pytest.raises(ValueError, match=r"differ from those the run .* \(38 rows then, 37 now\).*--accept_changed"):
        resumed(begun, tmp_path / "run")
    trainer = resume_work.trainer_of(tmp_path / "run", None, resume=True, accept_changed_data=True, **BASE)
    assert trainer.train().global_step == 8


def test_the_identity_of_data_is_their_content(tmp_path: Path) -> None:
    """Wherever it lies; every value of a small set counts, and of a large one the rows that are read."""
    from mllm_vision.data.records.records import load_records

    tiny.write_pairs_parquet(tmp_path / "a" / "train.parquet", 6)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    tiny.write_pairs_parquet(tmp_path / "more" / "train.parquet", 7)
    one, copy, more = (
        data_identity(PairDataset(load_records(str(tmp_path / name / "train.parquet")), None))
        for name in ("a", "copy", "more")
    )
    assert one == copy != more and one["rows"] == 6
    rows = [{"image": {"bytes": bytes([i]), "path": None}, "caption": f"number {i}"} for i in range(5)]
    base = data_identity(PairDataset(rows, None))
    for place, other in ((2, {"caption": "another"}), (4, {"image": {"bytes": b"x", "path": None}})):
        changed = [{**row, **other} if number == place else row for number, row in enumerate(rows)]
        assert data_identity(PairDataset(changed, None)) != base
    assert data_identity(PairDataset(rows[::-1], None)) != base
    moved = [{**row, "image": {**row["image"], "path": "/elsewhere/x.png"}} for row in rows]
    assert data_identity(PairDataset(moved, None)) == base
    many = [{"image": {"bytes": b"", "path": None}, "caption": str(i)} for i in range(3 * ROWS)]
    assert data_identity(PairDataset(many, None)) != data_identity(PairDataset([*many[:-3], *many[:3]], None))


def test_a_shard_of_another_size_is_noticed(tmp_path: Path) -> None:
    def identity() -> dict[str, Any]:
        stream = Stream.open(tmp_path / "shards")
        return data_identity(StreamDataset(stream, PairDataset(stream.head(), None)))

    tiny.write_pairs_parquet(tmp_path / "shards" / "0.parquet", 6)
    before = identity()
    assert identity() == before
    tiny.write_pairs_parquet(tmp_path / "shards" / "0.parquet", 7)
    assert identity() != before


# ---- flags ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "before", "now"),
    [
        ("seed", 0, 1),
        ("optim", "adamw_torch", "sgd"),
        ("encoder", "vit", "resnet"),
        ("image_size", 32, 64),
        ("temperature", 0.1, 0.2),
        ("ema_decay", None, 0.9),
        ("dataset_split", "train", "test"),
        ("metric_for_best_model", "knn_accuracy", "probe_accuracy"),
    ],
)
def test_a_flag_that_could_not_be_obeyed_is_refused(name: str, before: Any, now: Any) -> None:
    with pytest.raises(ValueError, match=f"--resume with another {name}: {now!r}, the run was started with {before!r}"):
        changed_flags({name: before}, {name: now})


def test_flags_that_take_effect_and_paths_that_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "encoder").mkdir()
    monkeypatch.chdir(tmp_path)
    before = {"learning_rate": 1e-3, "eval_steps": 5, "encoder": "./encoder", "output_dir": "a", "max_eval_samples": 3}
    now = {**before, "learning_rate": 1e-5, "eval_steps": 7, "encoder": str(tmp_path / "encoder"), "output_dir": "b"}
    found = {"learning_rate": (1e-3, 1e-5), "eval_steps": (5, 7), "max_eval_samples": (3, None)}
    assert changed_flags(before, {**now, "max_eval_samples": None, "of_a_later_release": 1}) == found


def test_recipe_yaml_says_what_was_done_and_from_when(tmp_path: Path) -> None:
    """Also through two changes, and without one that was given up with the steps after it."""

    def start(rate: float, step: int, **more: Any) -> list[str]:
        arguments = RecipeArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=rate, **more)
        run = Run("stage_zero", arguments, recipe_dict(arguments)).start()
        run.begin(step)
        (tmp_path / f"checkpoint-{step + 4}").mkdir(exist_ok=True)
        (tmp_path / f"checkpoint-{step + 4}" / "trainer_state.json").write_text("{}")
        text = (tmp_path / "recipe.yaml").read_text()
        assert yaml.safe_load(text)["learning_rate"] == rate and "accept_changed_data" not in text
        return [line for line in text.splitlines() if line.startswith("#")]

    assert start(1e-3, 0) == []
    first = "# from step 5 on learning_rate: 1e-05; before 0.001"
    assert start(1e-5, 4, resume=True) == [first]
    assert start(1e-5, 8, resume=True) == [first]
    second = "# from step 9 on learning_rate: 0.01; before 1e-05"
    assert start(1e-2, 8, resume=True) == [first, second]
    assert start(1e-5, 4, resume=True) == ["# from step 5 on learning_rate: 1e-05; before 0.01"]
    with pytest.raises(ValueError, match="another seed: 3, the run was started with 42"):
        RecipeArguments(output_dir=str(tmp_path), use_cpu=True, seed=3, resume=True)
        start(1e-5, 4, resume=True, seed=3)


def test_nothing_is_refused_where_nothing_was_trained_yet(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps({"seed": 1}))
    (tmp_path / "metrics.jsonl").write_text("")
    Run("stage_zero", RecipeArguments(output_dir=str(tmp_path), use_cpu=True, resume=True), {"seed": 2}).start()
