"""Every flag of optimizer and schedule: it changes the trained weights, and resumed = uninterrupted, bit for bit."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.utils import ModelOutput

from mllm_vision.training.callbacks.ema import FILE, WeightAverage
from mllm_vision.training.recipe.arguments import RecipeArguments
from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer
from mllm_vision.training.trainer.recipe_trainer import RecipeTrainer


class Net(nn.Module):
    """Embeddings, two blocks, a BatchNorm, a head, a scale: something for every flag."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.patch_embedding = nn.Linear(4, 6)
            self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
            self.norm = nn.BatchNorm1d(6)
            self.head = nn.Linear(6, 3)
        self.dropout = nn.Dropout(0.2)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.clamped = 0

    def forward(self, x: torch.Tensor) -> ModelOutput:
        y = self.patch_embedding(x)
        for layer in self.layers:
            y = y + self.dropout(torch.tanh(layer(y)))
        y = self.head(self.norm(y)) * self.logit_scale
        return ModelOutput(loss=(y - x[:, :3].flip(1)).square().mean(), metrics={})

    def after_step(self, progress: float) -> None:
        with torch.no_grad():
            self.logit_scale.clamp_(max=1.0)


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(4, generator=generator)} for _ in range(24)]


def trainer(folder: Path, cls: type = RecipeTrainer, **settings: Any) -> RecipeTrainer:
    defaults = {
        "output_dir": str(folder), "use_cpu": True, "max_steps": 8, "per_device_train_batch_size": 4, "save_steps": 3,
        "save_total_limit": None, "logging_steps": 4, "learning_rate": 0.05, "weight_decay": 0.1, "disable_tqdm": True,
        "data_seed": 1, "max_grad_norm": 0.5, "optim": "adamw_torch",
    }  # fmt: skip
    evaluators = settings.pop("evaluators", ())
    args = RecipeArguments(**{**defaults, **settings})
    return cls(model=Net(), args=args, train_dataset=rows(), evaluators=evaluators)


BASE = {"learning_rate": None, "base_learning_rate": 0.05}
STEP = {"lr_scheduler_type": "step", "lr_scheduler_kwargs": {"milestones": [0.5, 0.75], "gamma": 0.5}}
CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "lars": {"optim": "lars", "learning_rate": 50.0},
    "lars, paper": {"optim": "lars", "learning_rate": 50.0, "optim_args": "variant=paper"},
    "lars, barlow": {"optim": "lars", "learning_rate": 50.0, "optim_args": "variant=barlow_twins,momentum=0.8"},
    "lamb": {"optim": "lamb"},
    "lamb, bert": {"optim": "lamb", "optim_args": "variant=bert"},
    "sgd, step, warm-up": {"optim": "sgd", "optim_args": "momentum=0.9", "warmup_steps": 2, **STEP},
    "cosine, warm-up": {"warmup_steps": 3},
    "layer decay": {"layer_decay": 0.5},
    "patch embedding": {"patch_embedding_lr_scale": 0.2},
    "biases": {"bias_learning_rate": 0.001},
    "muon, layer decay": {"muon_learning_rate": 0.02, "layer_decay": 0.5},
    "linear scaling": {"lr_scaling": "linear", "lr_scaling_batch_size": 16, **BASE},
    "sqrt scaling": {"lr_scaling": "sqrt", "lr_scaling_batch_size": 16, **BASE},
    "weight decay to 5": {"weight_decay_end": 5.0},
    "clipping": {"gradient_clipping": "per_parameter"},
    "clipping by module": {"gradient_clipping": "per_module"},
    "decay of everything": {"weight_decay_on": "all", "weight_decay": 0.5},
    "exact cosine": {"warmup_steps": 3, "lr_scheduler_type": "exact_cosine",
                     "lr_scheduler_kwargs": {"min_lr_rate": 0.1, "inclusive_warmup": True}},
    "average": {"ema_decay": 0.5},
    "all": {"optim": "lamb", "layer_decay": 0.5, "weight_decay_end": 1.0, "lr_scaling": "sqrt", "ema_decay": 0.9,
            **BASE, "gradient_clipping": "per_parameter", "warmup_steps": 2, "patch_embedding_lr_scale": 0.2, **STEP},
}  # fmt: skip


@pytest.fixture(scope="module")
def ends() -> dict[str, str]:
    return {}


def digest(model: nn.Module) -> str:
    return hashlib.sha256(b"".join(value.detach().numpy().tobytes() for value in model.parameters())).hexdigest()


def same_state(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_state(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same_state(a, b) for a, b in zip(left, right, strict=True))
    return left == right


@pytest.mark.parametrize("name", CASES)
def test_resumed_is_uninterrupted(name: str, ends: dict[str, str], tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", **CASES[name])
    whole.train()
    resumed = trainer(tmp_path / "resumed", **CASES[name])
    resumed.train(str(tmp_path / "whole" / "checkpoint-3"))
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    assert same_state(whole.optimizer.state_dict(), resumed.optimizer.state_dict())
    assert whole.lr_scheduler.state_dict() == resumed.lr_scheduler.state_dict()
    end = digest(whole.model)
    assert all(torch.isfinite(value).all() for value in whole.model.parameters())
    assert end not in ends.values(), f"{name} trained as {[key for key in ends if ends[key] == end]} did"
    ends[name] = end


def test_scaling_is_a_rate_written_out(tmp_path: Path) -> None:
    """4 rows at 16 a linear rate of a quarter: as if it had been given so."""
    for rule, factor in (("linear", 0.25), ("sqrt", 0.5)):
        base = {**BASE, "base_bias_learning_rate": 0.01}
        scaled = trainer(tmp_path / f"{rule}-1", lr_scaling=rule, lr_scaling_batch_size=16, **base)
        scaled.learning_rates = {"head": 0.02}  # a rate that is given is used as given
        scaled.train()
        plain = trainer(tmp_path / f"{rule}-2", learning_rate=0.05 * factor, bias_learning_rate=0.01 * factor)
        plain.learning_rates = {"head": 0.02}
        plain.train()
        assert digest(scaled.model) == digest(plain.model)
        logged = [[entry.get("learning_rate"), entry.get("learning_rate_head")] for entry in scaled.state.log_history]
        assert logged == [[e.get("learning_rate"), e.get("learning_rate_head")] for e in plain.state.log_history]
        assert logged[0][1] == pytest.approx(0.4 / factor * logged[0][0])  # the weights' 0.02, not that of biases


def test_step_schedule_in_the_trainer(tmp_path: Path) -> None:
    each = trainer(tmp_path, **CASES["sgd, step, warm-up"], logging_steps=1)
    each.train()
    found = [entry["learning_rate"] for entry in each.state.log_history if "learning_rate" in entry]
    # logged is the rate of the step just taken: 0 and half in the warm-up, milestones at steps 4 and 6
    assert found == pytest.approx([0.0, 0.025, 0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125])


def test_groups_that_an_optimizer_makes_itself_take_no_flags(tmp_path: Path) -> None:
    each = trainer(tmp_path, layer_decay=0.5)
    each.optimizer_cls_and_kwargs = (torch.optim.AdamW, {"params": [], "lr": 0.1})
    with pytest.raises(ValueError, match="makes its own groups and ignores layer_decay"):
        each.train()


# ---- the average -----------------------------------------------------------------------------------------------


class Watch:
    """An evaluator that keeps what it saw."""

    name, primary_metric = "watch", "weight"

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, torch.Tensor]] = {}

    def __call__(self, model: Any, step: int) -> dict[str, float]:
        self.seen[step] = {key: value.clone() for key, value in model.state_dict().items()}
        return {"weight": -float(step if step < 6 else 0)}  # the best is seen at step 6


def test_the_average_by_hand(tmp_path: Path) -> None:
    """Evaluations and the model at the end are the average of the weights that the checkpoints hold."""
    plain = trainer(tmp_path / "plain", save_steps=1)
    plain.train()
    watch = Watch()
    settings = {"ema_decay": 0.3, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "optim": "adamw_torch"}
    averaged = trainer(tmp_path / "averaged", evaluators=[watch], **settings)
    initial = {key: value.clone() for key, value in averaged.model.state_dict().items()}
    averaged.train()
    expected = initial
    for step in range(1, 9):
        weights = load_file(tmp_path / "averaged" / f"checkpoint-{step}" / "model.safetensors")
        raw = load_file(tmp_path / "plain" / f"checkpoint-{step}" / "model.safetensors")
        assert all(torch.equal(weights[key], raw[key]) for key in raw)  # the training itself is left alone
        decay = min(0.3, (1 + step) / (10 + step))
        expected = {
            key: value if value.dtype != torch.float32 else decay * expected[key] + (1 - decay) * value
            for key, value in weights.items()
        }
        kept = load_file(tmp_path / "averaged" / f"checkpoint-{step}" / FILE)
        assert "frozen" not in kept and "norm.running_mean" in kept
        for key, value in kept.items():
            torch.testing.assert_close(value, expected[key], msg=key)
        if step in watch.seen:
            assert all(torch.equal(watch.seen[step][key], value) for key, value in kept.items())
    assert sorted(watch.seen) == [2, 4, 6, 8]
    assert all(torch.equal(averaged.model.state_dict()[key], value) for key, value in kept.items())


def test_the_best_model_is_its_average_and_after_step_comes_first(tmp_path: Path) -> None:
    watch = Watch()
    settings = {
        "ema_decay": 0.9, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True,
        "metric_for_best_model": "watch_weight", "greater_is_better": True, "save_only_model": True,
    }  # fmt: skip
    each = trainer(tmp_path, ObjectiveTrainer, evaluators=[watch], **settings)
    each.train()
    best = load_file(tmp_path / "checkpoint-6" / FILE)
    assert each.state.best_global_step == 6
    assert all(torch.equal(each.model.state_dict()[key], value) for key, value in best.items())
    assert not torch.equal(best["head.weight"], load_file(tmp_path / "checkpoint-8" / FILE)["head.weight"])
    assert best["logit_scale"] <= 1.0  # clamped by after_step at every step: so is the average


def test_what_the_average_refuses(tmp_path: Path) -> None:
    trainer(tmp_path / "without").train()
    with pytest.raises(FileNotFoundError, match=r"was started without --ema_decay; resume it without"):
        trainer(tmp_path / "with", ema_decay=0.9).train(str(tmp_path / "without" / "checkpoint-3"))
    average = WeightAverage(Net(), 0.9)
    average.on_train_begin(None, type("State", (), {"global_step": 0}), None)
    average.save(tmp_path)
    with pytest.raises(ValueError, match="average of other weights: 15 differ"):
        WeightAverage(nn.Linear(2, 2), 0.9).resume(tmp_path)


def test_the_average_is_kept_in_fp32() -> None:
    """A thousandth of a bf16 step would be lost in bf16; and `applied` gives the weights back, also after an error."""
    model = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    average, state = WeightAverage(model, 0.999), type("State", (), {"global_step": 0})
    average.on_train_begin(None, state, None)
    state.global_step = 100_000
    with torch.no_grad():
        model.weight.fill_(2.0)
    for _ in range(400):
        average.on_step_end(None, state, None)
    with pytest.raises(RuntimeError, match="out"), average.applied():
        assert model.weight[0, 0].item() == pytest.approx(2 - 0.999**400, abs=0.01)
        raise RuntimeError("out")
    assert (model.weight == 2.0).all()
