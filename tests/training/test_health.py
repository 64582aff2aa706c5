"""The warnings of a running training: each is provoked by a training that goes wrong; a healthy one is silent."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from pairs_for_tests import make_objective
from torch import nn
from transformers import TrainerState
from transformers.utils import ModelOutput

from mllm_vision.functional.geometry import participation_ratio, spread
from mllm_vision.objectives.base import Objective
from mllm_vision.training.callbacks.health import Health, expected_chance, level_name, patience
from mllm_vision.training.recipe.arguments import RecipeArguments
from mllm_vision.training.recipe.run import Run
from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer

N = 16


class Pairs(torch.utils.data.Dataset):
    """64 images of 16 kinds with their captions; `mixed` redraws the captions for each batch."""

    def __init__(self, mixed: bool = False, same: bool = False) -> None:
        from mllm_vision.data.records.sampling import text_id

        self.mixed, self.generator = mixed, torch.Generator().manual_seed(0)
        self.pixels, self.words, captions = columns()
        if same:
            self.pixels = self.pixels[:1].expand(len(self.pixels), -1, -1, -1)
        self.ids = torch.tensor([text_id(caption) for caption in captions])

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        text = int(torch.randint(len(self), (), generator=self.generator)) if self.mixed else index
        row = {"pixel_values": self.pixels[index], "input_ids": self.words["input_ids"][text]}
        row |= {"attention_mask": self.words["attention_mask"][text], "caption_ids": self.ids[text]}
        return row | {"image_ids": torch.tensor(index)}


@cache
def columns() -> tuple[torch.Tensor, dict[str, torch.Tensor], list[str]]:
    objective = make_objective("clip")
    drawn = [tiny.labelled_image(index) for index in range(64)]
    captions = [f"a {colour} {shape}" for _, colour, shape in drawn]
    pixels = objective.encoder.processor(images=[image for image, _, _ in drawn], return_tensors="pt")["pixel_values"]
    return pixels, objective.dual.tokenize(captions), captions


def train(
    kind: str, folder: Path, data: dict | None = None, config: dict | None = None, frozen: bool = False, **settings: Any
) -> tuple[ObjectiveTrainer, list[dict[str, Any]]]:
    """60 steps of 16 pairs; the trainer and the warnings that the run's record holds."""
    given = {
        "output_dir": str(folder), "use_cpu": True, "max_steps": 60, "per_device_train_batch_size": N,
        "save_strategy": "no", "logging_steps": 5, "learning_rate": 2e-3, "warmup_steps": 5, "disable_tqdm": True,
    }  # fmt: skip
    arguments = RecipeArguments(**{**given, **settings})
    run, objective = Run("stage_zero", arguments, {}).start(), make_objective(kind, **(config or {}))
    if frozen:
        objective.requires_grad_(False)
        objective.logit_scale.requires_grad_(True)
    trainer = ObjectiveTrainer(objective, arguments, train_dataset=Pairs(**(data or {})), run=run)
    trainer.train()
    return trainer, run.record.get("health", [])


def names(warnings: list[dict[str, Any]]) -> list[str]:
    return sorted(warning["name"] for warning in warnings)


# ---- trainings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_healthy_training_is_silent(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, warnings = train(kind, tmp_path)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]  # it is healthy
    assert warnings == [] and "step " not in caplog.text


@pytest.mark.parametrize(
    ("kind", "data", "settings"),
    [
        ("clip", {}, {"learning_rate": 1e-9}),
        ("siglip", {}, {"learning_rate": 1e-9, "config": {"initial_logit_bias": -2.7}}),
        ("clip", {"mixed": True}, {"config": {"initial_logit_scale": 3.0}}),
    ],
    ids=["no learning rate", "siglip, no learning rate", "captions of other images"],
)
def test_a_loss_that_stays_at_chance(kind: str, data: dict, settings: dict, tmp_path: Path, caplog: Any) -> None:
    _, warnings = train(kind, tmp_path, data, **settings)
    assert "chance" in names(warnings)
    (found,) = [warning for warning in warnings if warning["name"] == "chance"]
    assert found["step"] == 50 and f"for {N} pairs" in found["message"] and "belong together" in found["message"]
    assert caplog.text.count("nothing is learned") == 1  # once, not at every log


def test_a_scale_that_came_to_its_clamp(tmp_path: Path) -> None:
    limit = {"max_logit_scale": 5.1}
    trainer, warnings = train("clip", tmp_path / "a", config={**limit, "initial_logit_scale": 5.0})
    assert names(warnings) == ["scale"] and "at its clamp 5.1 after" in warnings[0]["message"]
    assert trainer.objective.logit_scale.exp().item() == pytest.approx(5.1)
    # a pair that comes with its scale there is no event of this training
    _, loaded = train("clip", tmp_path / "b", config={**limit, "initial_logit_scale": 5.1})
    assert loaded == []


def test_a_scale_at_its_lower_clamp(tmp_path: Path) -> None:
    """Captions of other images and only the scale to train: equal pairs are the optimum."""
    mixed = {"mixed": True}
    _, warnings = train("clip", tmp_path, mixed, {"initial_logit_scale": 1.05}, frozen=True, learning_rate=1e-2)
    assert "scale" in names(warnings)
    assert any("lower clamp 1:" in warning["message"] for warning in warnings)


@pytest.mark.parametrize("bias", [30.0, -30.0])
def test_a_bias_that_is_wrong(bias: float, tmp_path: Path) -> None:
    _, warnings = train("siglip", tmp_path, config={"initial_logit_bias": bias})
    assert "bias" in names(warnings)
    by_name = {warning["name"]: warning["message"] for warning in warnings}
    assert f"of the {N} texts of the batch" in by_name["bias"] and ("Lower" if bias > 0 else "Raise") in by_name["bias"]
    assert "is above chance" in by_name["chance"] and "see the warning of the bias" in by_name["chance"]


@pytest.mark.parametrize(
    ("data", "settings", "word"),
    [
        ({}, {"learning_rate": 0.3, "warmup_steps": 0}, "point in one direction"),
        ({"same": True}, {}, "point in one direction"),
        ({}, {"learning_rate": 0.03, "warmup_steps": 0}, "collapse"),
    ],
    ids=["rate far too high", "one image for all", "rate too high"],
)
def test_a_collapse(data: dict, settings: dict, word: str, tmp_path: Path) -> None:
    _, warnings = train("clip", tmp_path, data, **settings)
    found = {warning["name"]: warning["message"] for warning in warnings}
    assert "collapse" in found and word in found["collapse"] and "image" in found["collapse"]
    if "chance" in found:
        assert "have collapsed too" in found["chance"]


def test_warnings_are_in_run_json(tmp_path: Path) -> None:
    trainer, warnings = train("clip", tmp_path, learning_rate=1e-9)
    trainer.run.finish()
    assert json.loads((tmp_path / "run.json").read_text())["health"] == warnings != []


# ---- the rules by themselves ---------------------------------------------------------------------------------


class Known(nn.Module):
    """What the callback asks of an objective."""

    def __init__(self, scale: float = 14.0) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(scale).log())
        self.scale_limits = (1.0, 100.0)

    def chance_loss(self, batch_size: int, positives: float = 1.0) -> float:
        return math.log(batch_size)

    def forward(self) -> ModelOutput:
        return ModelOutput()


def watch(
    tmp_path: Path,
    logs: list[dict[str, float]],
    *,
    every: int = 10,
    max_steps: int = 200,
    scale: float = 14.0,
    objective: Any = None,
) -> Health:
    arguments = RecipeArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=max_steps, warmup_steps=0)
    health, state = Health(objective or Known(scale), lambda: 8), TrainerState(max_steps=max_steps)
    health.on_train_begin(arguments, state, None)
    for entry in logs:
        state.global_step += every
        health.on_log(arguments, state, None, {"loss": 1.0, **entry})
    return health


STUCK = {"loss": math.log(8)}


def test_every_training_starts_at_chance(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert watch(tmp_path, [STUCK] * 4).found == {}  # until step 50 of 200 there are no warnings
    with caplog.at_level("INFO"):
        assert list(watch(tmp_path, [STUCK] * 5 + [{}]).found) == ["chance"]
    assert "step 60: no longer" in caplog.text
    assert watch(tmp_path, [STUCK] * 3 + [{}] + [STUCK, {}] * 4, every=5).found == {}  # never for ten steps


def test_a_long_training_is_not_left_alone_for_a_fifth(tmp_path: Path) -> None:
    long = RecipeArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=100_000, warmup_steps=2000)
    assert patience(long, 100_000) == 3000 and patience(long, 400) == 80 and patience(long, 5) == 50


def test_evaluations_and_other_logs_are_passed_over(tmp_path: Path) -> None:
    health = Health(Known(), lambda: 8)
    arguments = RecipeArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=100)
    state = TrainerState(max_steps=100, global_step=90)
    health.on_train_begin(arguments, TrainerState(max_steps=100), None)
    health.on_log(arguments, state, None, {"eval_loss": 9.0, "image_spread": 0.0})
    health.on_log(arguments, state, None, None)
    assert health.found == {}


def test_the_upper_clamp_is_usual_late_in_a_training(tmp_path: Path) -> None:
    low, high = {"logit_scale": 60.0}, {"logit_scale": 100.0}
    assert list(watch(tmp_path, [low] * 5 + [high] * 4).found) == ["scale"]
    assert watch(tmp_path, [low] * 11 + [high] * 9).found == {}
    assert watch(tmp_path, [high] * 20, scale=100.0).found == {}  # a trained pair comes with it
    assert watch(tmp_path, [high, {"logit_scale": 97.0}, high, high], scale=100.0).found == {}
    assert list(watch(tmp_path, [high, low, high, high], scale=100.0).found) == ["scale"]  # it left, and came back


def test_numbers_that_are_none_are_not_judged(tmp_path: Path) -> None:
    nothing = {"loss": math.nan, "image_spread": math.nan, "predicted_positives": math.nan, "positives": 1.0}
    assert watch(tmp_path, [nothing] * 20).found == {}


def test_chance_counts_the_duplicates() -> None:
    """The least loss over all models that give every pair one and the same logit, by search."""
    siglip = make_objective("siglip")
    for pairs, positives in ((16, 1.0), (16, 1.8), (64, 3.0)):
        logits = torch.linspace(-8, 2, 20001, dtype=torch.float64)
        losses = -positives * nn.functional.logsigmoid(logits) - (pairs - positives) * nn.functional.logsigmoid(-logits)
        assert expected_chance(siglip, pairs, positives) == pytest.approx(losses.min().item(), rel=1e-6)
    assert expected_chance(make_objective("clip"), 64, 3.0) == pytest.approx(math.log(64))
    assert expected_chance(siglip, 1) is None and expected_chance(nn.Linear(1, 1), 8) is None


# ---- images alone --------------------------------------------------------------------------------------------


class Alone:
    """A method on images alone: what its loss is at chance, and the settings that determine its name."""

    views = "simclr"

    def __init__(self, chance: float | None, **settings: Any) -> None:
        self.config = SimpleNamespace(**settings)
        if chance is not None:
            self.chance_loss = lambda batch_size, positives=1.0: chance


@pytest.mark.parametrize(
    ("name", "level", "settings"),
    [
        ("ln(2N-1)", math.log(15), {"temperature": 0.5}),
        ("ln N", math.log(8), {}),
        ("ln(K+1)", math.log(65), {"queue_size": 64, "temperature": 0.5}),
        ("2 ln(K+1)", 2 * math.log(65), {"queue_size": 64}),
        ("ln(out_dim)", math.log(1024), {"out_dim": 1024}),
        ("4 T ln N", 0.8 * math.log(8), {"temperature": 0.2}),
        ("the margin", 0.3, {"margin": 0.3}),
    ],
)
def test_a_loss_at_a_known_level_is_named(name: str, level: float, settings: dict, tmp_path: Path) -> None:
    objective = Alone(None if name == "the margin" else level, **settings)
    found = watch(tmp_path, [{"loss": 0.995 * level}] * 8, objective=objective).found
    assert f"sits at chance ({name} = {level:.4f} for 8 images)" in found["chance"]
    assert "the views (too strong?)" in found["chance"] and "caption" not in found["chance"]
    assert watch(tmp_path, [{"loss": 0.9 * level}] * 8, objective=objective).found == {}
    assert level_name(objective, 8, 1.01 * level) == ""


def test_a_method_that_states_no_chance_is_watched_at_its_margin(tmp_path: Path) -> None:
    """A triplet loss of the user's own: what it inherits states none."""

    class Triplet(Alone):
        def chance_loss(self, batch_size: int, positives: float = 1.0) -> float | None:
            return Objective.chance_loss(self, batch_size, positives)

    objective = Triplet(1.0, margin=0.2)
    del objective.chance_loss  # the instance's own
    assert objective.chance_loss(8) is None and expected_chance(objective, 8, 2.0) == 0.2
    found = watch(tmp_path, [{"loss": 0.2}] * 8, objective=objective).found
    assert "sits at chance (the margin = 0.2000 for 8 images)" in found["chance"]
    assert watch(tmp_path, [{"loss": 0.2}] * 8, objective=Alone(None)).found == {}


def test_the_two_collapses_of_self_distillation(tmp_path: Path) -> None:
    objective = Alone(math.log(64), out_dim=64)
    one = watch(tmp_path, [{"prototype_entropy": 0.01, "teacher_entropy": 0.01}] * 8, objective=objective).found
    assert list(one) == ["prototypes"] and "to one prototype" in one["prototypes"]
    even = {"prototype_entropy": math.log(64), "teacher_entropy": 0.99 * math.log(64)}
    assert "to all prototypes equally" in watch(tmp_path, [even] * 8, objective=objective).found["prototypes"]
    sound = {"prototype_entropy": math.log(64), "teacher_entropy": 1.0}
    assert watch(tmp_path, [sound] * 8, objective=objective).found == {}


def test_a_collapse_without_captions_speaks_of_none(tmp_path: Path) -> None:
    found = watch(tmp_path, [{"h_spread": 0.01, "h_rank": 3.0}] * 8, objective=Alone(9.0)).found
    assert "all h embeddings point in one direction" in found["collapse"] and "caption" not in found["collapse"]
    found = watch(tmp_path, [{"h_spread": 0.5, "h_rank": 1.05}] * 8, objective=Alone(9.0)).found
    assert "the h embeddings vary along a line (h_rank 1.05 directions)" in found["collapse"]


def test_an_offset_that_the_head_takes_off_is_no_collapse(tmp_path: Path) -> None:
    seen = {"h_spread": 0.05, "h_rank": 2.8, "loss": 4.0}
    for behind in ({"z_spread": 0.99, "z_rank": 6.0}, {"query_spread": 0.4, "query_rank": 3.0}):
        found = watch(tmp_path, [seen | behind] * 8, objective=Alone(9.0)).found
        assert list(found) == ["offset"] and "share one direction (h_spread 0.05)" in found["offset"]
    for behind in ({"z_spread": 0.05, "z_rank": 6.0}, {"z_spread": 0.99, "z_rank": 1.05}):  # a line behind a BatchNorm
        found = watch(tmp_path, [seen | behind] * 8, objective=Alone(9.0)).found
        assert list(found) == ["collapse"] and "all h embeddings point in one direction" in found["collapse"]
    at_chance = seen | {"z_spread": 0.99, "z_rank": 6.0, "loss": 9.0}
    found = watch(tmp_path, [at_chance] * 8, objective=Alone(9.0)).found
    assert sorted(found) == ["chance", "offset"] and "collapsed" not in found["chance"]


# ---- the figures it reads ------------------------------------------------------------------------------------


def test_spread_and_rank_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 12, generator=generator)
    unit = nn.functional.normalize(features, dim=-1)
    cosines = unit @ unit.T
    mean = (cosines.sum() - 40) / (40 * 39)
    assert spread(features).item() == pytest.approx(math.sqrt(1 - mean), rel=1e-5)
    for part in (features, features[:8]):  # more rows than columns, and fewer
        unit = nn.functional.normalize(part, dim=-1)
        values = torch.linalg.svdvals(unit - unit.mean(0)).square()
        expected = values.sum().square() / values.square().sum()
        assert participation_ratio(part).item() == pytest.approx(expected.item(), rel=1e-4)
    one = torch.ones(6, 5)
    assert spread(one).item() == pytest.approx(0, abs=1e-3) and participation_ratio(one * 2).item() == 0.0
    line = torch.stack([torch.ones(6), torch.linspace(-1, 1, 6) * 1e-2, torch.zeros(6)], dim=1)
    assert participation_ratio(line).item() == pytest.approx(1.0, abs=1e-2)


def test_the_positives_of_siglip_by_hand() -> None:
    """Against the gradient of the bias, which is predicted minus given positives, and against counted ids."""
    objective = make_objective("siglip", initial_logit_bias=-1.0)
    data = Pairs()
    batch = torch.utils.data.default_collate([data[index] for index in range(24)])
    output = objective(**batch)
    output.loss.backward()
    metrics, gradient = output.metrics, objective.dual.logit_bias.grad.item()
    same = (batch["caption_ids"][:, None] == batch["caption_ids"][None]).sum().item()
    assert metrics["positives"].item() == pytest.approx(same / 24)
    assert (metrics["predicted_positives"] - metrics["positives"]).item() == pytest.approx(gradient, rel=1e-4)
