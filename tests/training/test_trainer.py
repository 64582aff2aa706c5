"""The trainers: resumed = uninterrupted, a full disk, evaluators, objectives, no network."""

from __future__ import annotations

import collections
import errno
import json
import logging
import math
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import EarlyStoppingCallback, LlavaConfig, LlavaForConditionalGeneration, TrainerCallback
from transformers.utils import ModelOutput

from mllm_vision.errors import IncompleteRun
from mllm_vision.hub.lineage import hash_weights
from mllm_vision.training.checkpoint.checkpoints import is_whole, last_checkpoint
from mllm_vision.training.recipe.arguments import RecipeArguments
from mllm_vision.training.recipe.run import Run
from mllm_vision.training.trainer import recipe_trainer as trainer_module
from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer
from mllm_vision.training.trainer.recipe_trainer import RecipeTrainer


def arguments(folder: Path, **settings: Any) -> RecipeArguments:
    defaults = {
        "output_dir": str(folder), "use_cpu": True, "max_steps": 8, "per_device_train_batch_size": 2, "save_steps": 4,
        "logging_steps": 2, "learning_rate": 1e-2, "weight_decay": 0.1, "disable_tqdm": True, "data_seed": 1,
    }  # fmt: skip
    return RecipeArguments(**{**defaults, **settings})


# ---- models and data -----------------------------------------------------------------------------------------


class Toy(nn.Module):
    """An objective by the contract: named arguments, a ModelOutput with loss and metrics, after_step."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.layer.weight  # tied copies must survive saving
        self.dropout = nn.Dropout(0.2)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("queue", torch.zeros(4))
        self.progress: list[float] = []

    def forward(self, x: torch.Tensor) -> ModelOutput:
        y = self.tied(self.dropout(self.layer(x))) * self.logit_scale + self.queue
        loss = (y - 1).square().mean()
        return ModelOutput(loss=loss, metrics={"mean_x": x.mean(), "one": torch.tensor(1.0)})

    def after_step(self, progress: float) -> None:
        self.progress.append(progress)
        self.queue += 0.01  # state of the method: must be in the checkpoint

    def chance_loss(self, batch_size: int) -> float:
        return math.log(batch_size)


def toy_rows(n: int = 12) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(4, generator=generator)} for _ in range(n)]


def llama(**settings: Any) -> Any:
    return tiny.tiny_llama(64, attention_dropout=0.1, **settings)


def text_rows(n: int = 12) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(5, 64, (n, 6), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def llava() -> Any:
    """Its checkpoints are written by stock transformers under other names than those in memory."""
    config = LlavaConfig(
        vision_config=tiny.tiny_clip_vision().config, text_config=tiny.tiny_llama(64).config,
        image_token_index=4, image_seq_length=16, vision_feature_layer=-2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config)


CASES: dict[str, tuple[Callable[[], Any], Callable[[], list], type]] = {
    "llama": (llama, text_rows, RecipeTrainer),
    "tied": (lambda: llama(tie_word_embeddings=True), text_rows, RecipeTrainer),
    "llava": (llava, text_rows, RecipeTrainer),
    "objective": (Toy, toy_rows, ObjectiveTrainer),
}


class Interrupt(TrainerCallback):
    """Pulls the plug after a step, as a power cut would: nothing more is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different


# ---- resuming ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "settings", [{}, {"gradient_accumulation_steps": 2, "max_steps": 6, "save_steps": 2}], ids=["", "ga"]
)
def test_resumed_is_bit_for_bit_uninterrupted(case: str, settings: dict, tmp_path: Path) -> None:
    build, rows, kind = CASES[case]
    if settings and case in ("tied", "llava"):
        pytest.skip("accumulation is covered by the other two")
    whole_args = arguments(tmp_path / "whole", **settings)
    whole = kind(build(), whole_args, train_dataset=rows(), run=Run("stage_zero", whole_args, {}).start())
    whole.train()

    torn_args = arguments(tmp_path / "torn", **settings)
    run = Run("stage_zero", torn_args, {}).start()
    torn = kind(build(), torn_args, train_dataset=rows(), run=run, callbacks=[Interrupt(torn_args.max_steps - 1)])
    with pytest.raises(KeyboardInterrupt):
        torn.train()

    again_args = arguments(tmp_path / "torn", resume=True, **settings)
    again_run = Run("stage_zero", again_args, {}).start()
    torch.manual_seed(99)  # whatever state the new process happens to be in
    again = kind(build(), again_args, train_dataset=rows(), run=again_run)
    again.train()
    assert again.state.global_step == whole.state.global_step
    assert_same(state_of(again.model), state_of(whole.model))

    def losses(folder: str) -> list:
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return [(entry["step"], entry["loss"]) for entry in map(json.loads, lines) if "loss" in entry]

    assert losses("torn") == losses("whole")


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """What transformers warned of; it says each warning once, and keeps its records from pytest."""
    transformers_logger = logging.getLogger("transformers")
    type(transformers_logger).warning_once.cache_clear()
    transformers_logger.addHandler(caplog.handler)
    yield lambda: "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    transformers_logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("changed", "warned"),
    [
        ({}, None),
        ({"max_steps": 12}, r"eval_steps: 3 .from args. != 2 .from trainer_state"),  # the checkpoint's 2 stay
        ({"eval_steps": 0.5}, r"eval_steps: 4 .from args. != 2 .from trainer_state"),
        ({"logging_steps": 3}, r"logging_steps: 3 .from args. != 2 .from trainer_state"),
    ],
)
def test_a_ratio_of_steps_is_the_number_it_came_to(
    changed: dict, warned: str | None, tmp_path: Path, warnings: Callable[[], str]
) -> None:
    settings = {"eval_steps": 0.25, "save_steps": 0.25, "logging_steps": 0.25}
    begun = RecipeTrainer(llama(), arguments(tmp_path, **settings), train_dataset=text_rows(), callbacks=[Interrupt(5)])
    with pytest.raises(KeyboardInterrupt):
        begun.train()
    args = arguments(tmp_path, resume=True, **{**settings, **changed})
    given = (args.eval_steps, args.save_steps, args.logging_steps)
    trainer = RecipeTrainer(llama(), args, train_dataset=text_rows())
    trainer.train()
    assert trainer.state.global_step == args.max_steps
    assert (args.eval_steps, args.save_steps, args.logging_steps) == given
    if warned is None:
        assert "do not match" not in warnings()
    else:
        assert re.search(warned, warnings())


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    RecipeTrainer(llama(), arguments(tmp_path, max_steps=4), train_dataset=text_rows()).train()
    other = RecipeTrainer(llama(num_hidden_layers=3), arguments(tmp_path, resume=True), train_dataset=text_rows())
    with pytest.raises(ValueError, match=r"does not fit this model: 9 weights are missing \(model.layers.2"):
        other.train()


def test_a_checkpoint_loads_in_plain_transformers(tmp_path: Path) -> None:
    model = llava()
    RecipeTrainer(model, arguments(tmp_path, max_steps=4), train_dataset=text_rows()).train()
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-4")
    assert_same(state_of(loaded), state_of(model))


def test_a_damaged_checkpoint_is_skipped(tmp_path: Path) -> None:
    RecipeTrainer(llama(), arguments(tmp_path), train_dataset=text_rows()).train()
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()  # it is written last
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="checkpoint-8 is damaged"):
        arguments(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-8")).checkpoint_to_resume()


# ---- a full disk ---------------------------------------------------------------------------------------------


def no_space(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def torch_no_space(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598")


@pytest.mark.parametrize(
    ("target", "failure"),
    [("save_model", no_space), ("_save_optimizer_and_scheduler", torch_no_space), ("_save_rng_state", no_space)],
)
def test_a_full_disk_leaves_the_previous_checkpoint_whole(
    target: str, failure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RecipeTrainer(llama(), arguments(tmp_path / "whole"), train_dataset=text_rows())
    whole.train()
    trainer = RecipeTrainer(llama(), arguments(tmp_path / "a", save_total_limit=1), train_dataset=text_rows())
    original = getattr(trainer, target)

    def save(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 8:
            failure()
        return original(*args, **kwargs)

    monkeypatch.setattr(trainer, target, save)
    with pytest.raises(OSError, match="free some space") as refusal:
        trainer.train()
    message = str(refusal.value)
    assert (
        str(tmp_path / "a" / "checkpoint-8") in message and "checkpoint-4 is whole" in message and "--resume" in message
    )
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["checkpoint-4"]
    assert is_whole(tmp_path / "a" / "checkpoint-4")
    again = RecipeTrainer(llama(), arguments(tmp_path / "a", resume=True), train_dataset=text_rows())
    again.train()  # room was made
    assert_same(state_of(again.model), state_of(whole.model))


def test_another_error_while_saving_stays_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = RecipeTrainer(llama(), arguments(tmp_path), train_dataset=text_rows())
    monkeypatch.setattr(trainer, "_save_rng_state", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert list(tmp_path.iterdir()) == []


# ---- evaluators ----------------------------------------------------------------------------------------------


class Counter:
    name, primary_metric = "counter", "score"

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, model: Any, step: int) -> dict:
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(100)  # draws from the random state that training uses
        self.steps.append(step)
        result: dict[str, Any] = {
            "score": step / 10,
            "count": 50,
            "samples": [{"step": step}],
            "arrays": {"m": [[step]]},
        }
        return {**result, "baselines": {"chance": 0.1}}


def test_evaluators_run_on_steps_and_at_the_end(tmp_path: Path) -> None:
    args = arguments(tmp_path / "a", max_steps=7, eval_strategy="steps", eval_steps=3, save_strategy="no")
    run, counter = Run("stage_zero", args, {}).start(), Counter()
    trainer = RecipeTrainer(llama(), args, train_dataset=text_rows(), run=run, evaluators=[counter])
    trainer.measure_before("untrained")
    trainer.train()
    assert run.record["evaluations"] == {}  # nothing was saved yet that it could be of
    run.save_artifact(trainer.model.save_pretrained, "model", "language_model")
    trainer.final_evaluation(artifact="model")
    assert counter.steps == [0, 3, 6, 7]
    assert [e["eval_counter_score"] for e in run.record["history"] if "eval_counter_score" in e] == [0.3, 0.6, 0.7]
    kept = run.record["evaluations"]["counter"]
    assert kept["score"] == 0.7 and kept["primary_metric"] == "score"
    assert kept["baselines"] == {"untrained": 0.0, "chance": 0.1}
    assert (kept["step"], kept["artifact"], kept["weights_sha256"]) == (7, "model", hash_weights(trainer.model))
    assert run.record["samples"] == [{"evaluation": "counter", "step": 7}]
    assert run.record["arrays"] == {"counter/m": [[7]]}

    alone = RecipeTrainer(
        llama(), arguments(tmp_path / "b", max_steps=7, save_strategy="no"), train_dataset=text_rows()
    )
    alone.train()
    assert_same(state_of(trainer.model), state_of(alone.model))  # looking changes nothing


def test_the_best_checkpoint_is_chosen_by_an_evaluator(tmp_path: Path) -> None:
    class Peak(Counter):
        def __call__(self, model: Any, step: int) -> dict:
            return {"score": -abs(step - 4)}

    args = arguments(
        tmp_path, save_steps=2, eval_steps=2, eval_strategy="steps", load_best_model_at_end=True,
        metric_for_best_model="counter_score", greater_is_better=True,
    )  # fmt: skip
    trainer = RecipeTrainer(llava(), args, train_dataset=text_rows(), evaluators=[Peak()])
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best = LlavaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-4")
    assert_same(state_of(trainer.model), state_of(best))


class Moody(Counter):
    """Fails at the given steps."""

    name = "moody"

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.bad = steps

    def __call__(self, model: Any, step: int) -> dict:
        if step in self.bad:
            raise KeyError(f"no row {step}")
        return super().__call__(model, step)


def test_an_evaluator_that_fails_on_the_way_costs_its_figure_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = arguments(tmp_path, max_steps=5, eval_strategy="steps", eval_steps=1, save_strategy="no")
    run, moody, counter = Run("stage_zero", args, {}).start(), Moody(2, 3), Counter()
    trainer = RecipeTrainer(llama(), args, train_dataset=text_rows(), run=run, evaluators=[moody, counter])
    trainer.train()
    run.save_artifact(trainer.model.save_pretrained, "model", "language_model")
    trainer.final_evaluation(artifact="model")
    assert (moody.steps, counter.steps) == ([1, 4, 5], [1, 2, 3, 4, 5])
    with pytest.raises(IncompleteRun, match="evaluation of moody while training"):
        run.finish()
    assert caplog.text.count("no row 2") == 1 and "no row 3" not in caplog.text  # once
    assert run.record["evaluations"]["moody"]["score"] == 0.5  # the last one is there
    with pytest.raises(KeyboardInterrupt):
        run.after_training("interrupted", Interrupt(0).on_step_end, None, trainer.state.__class__(), None)


def test_a_metric_that_the_training_needs_stops_it_with_a_checkpoint(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 6}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "moody_score", "greater_is_better": True}
    args = arguments(tmp_path / "a", **settings, **best)
    trainer = RecipeTrainer(llama(), args, train_dataset=text_rows(), evaluators=[Moody(4)])
    with pytest.raises(ValueError, match=r"moody failed at step 4 \(KeyError.*checkpoint-4 is saved.*--resume"):
        trainer.train()
    assert is_whole(tmp_path / "a" / "checkpoint-4")
    args = arguments(tmp_path / "a", resume=True, **settings, **best)
    again = RecipeTrainer(llama(), args, train_dataset=text_rows(), evaluators=[Moody()])
    again.train()
    whole = RecipeTrainer(llama(), arguments(tmp_path / "b", **settings, **best), train_dataset=text_rows(),
                          evaluators=[Moody()])  # fmt: skip
    whole.train()
    assert_same(state_of(again.model), state_of(whole.model))


def test_a_metric_that_nobody_measures_is_refused_at_the_start(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_steps": 2, "eval_steps": 2, "eval_strategy": "steps"}
    args = arguments(tmp_path, **settings, load_best_model_at_end=True)  # the stock default is "loss"
    with pytest.raises(
        ValueError, match=r"metric_for_best_model='loss' is not measured by any .* e\.g\. counter_score"
    ):
        RecipeTrainer(llama(), args, train_dataset=text_rows(), evaluators=[Counter()])
    args = arguments(tmp_path, **settings, metric_for_best_model="counter_scor", load_best_model_at_end=True)
    with pytest.raises(ValueError, match=r"'eval_counter_scor' is not among.*eval_counter_score"):
        RecipeTrainer(llama(), args, train_dataset=text_rows(), evaluators=[Counter()]).train()


def test_callbacks_of_transformers_work_unchanged(tmp_path: Path) -> None:
    """One of theirs stops the training by an evaluator's metric; one of the user's sees every event in order."""

    class Falling(Counter):
        def __call__(self, model: Any, step: int) -> dict:
            return {"score": -step}

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.events: list[str] = []

        def __getattribute__(self, name: str) -> Any:
            if name.startswith("on_"):
                return lambda args, state, control, **kwargs: self.events.append(f"{name[3:]} {state.global_step}")
            return super().__getattribute__(name)

    settings: dict[str, Any] = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "counter_score", "greater_is_better": True}
    run, watch = Run("stage_zero", arguments(tmp_path, **settings, **best), {}).start(), Watch()
    trainer = ObjectiveTrainer(
        Toy(), run.arguments, train_dataset=toy_rows(), run=run, evaluators=[Falling()],
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1), watch],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 4  # worse than at step 2: stopped
    assert watch.events[:2] == ["init_end 0", "train_begin 0"]
    around = [event for event in watch.events if event.split()[0] in ("step_end", "evaluate", "save", "train_end")]
    until = ["step_end 1", "step_end 2", "evaluate 2", "save 2", "step_end 3", "step_end 4", "evaluate 4", "save 4"]
    assert around[:9] == [*until, "train_end 4"]
    best_weights = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert torch.equal(trainer.model.layer.weight.detach(), best_weights["layer.weight"])


def test_a_data_set_and_evaluators_together(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", save_strategy="no", per_device_eval_batch_size=2)
    trainer = RecipeTrainer(llama(), args, train_dataset=text_rows(), eval_dataset=text_rows(5), evaluators=[Counter()])
    metrics = trainer.evaluate()
    assert metrics["eval_counter_score"] == 0.0
    rows = torch.stack([row["input_ids"] for row in text_rows(5)])
    with torch.no_grad():  # no row is dropped, although 5 is no multiple of the batch size
        expected = trainer.model.eval()(input_ids=rows, labels=rows).loss.item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert args.dataloader_drop_last is True


# ---- what is checked before and during -----------------------------------------------------------------------


def test_too_little_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the training set is empty"):
        RecipeTrainer(llama(), arguments(tmp_path), train_dataset=[])
    with pytest.raises(
        ValueError, match=r"has 3 rows, fewer than one batch of 4 .* --per_device_train_batch_size 3 or less"
    ):
        RecipeTrainer(llama(), arguments(tmp_path, per_device_train_batch_size=4), train_dataset=text_rows(3))


class Bad:
    """Stands for data's BadSamples: two bad ones a check."""

    count, examples, reasons = 0, ["row 3: truncated"], collections.Counter(truncated=1)

    def check(self, max_fraction: float) -> None:
        self.count += 2
        if self.count / 100 > max_fraction:
            raise ValueError(f"{self.count} of 100 samples were bad, more than max_bad_fraction={max_fraction}")


def test_too_many_bad_samples_end_the_training(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_bad_fraction=0.05, save_strategy="no")
    trainer = RecipeTrainer(llama(), args, train_dataset=text_rows(), bad_samples=Bad())
    with pytest.raises(ValueError, match=r"6 of 100 samples were bad, more than max_bad_fraction=0.05"):
        trainer.train()
    assert trainer.state.global_step == 3


def test_bad_samples_are_in_the_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = arguments(tmp_path, max_steps=2, max_bad_fraction=0.5, save_strategy="no")
    run = Run("stage_zero", args, {}).start()
    RecipeTrainer(llama(), args, train_dataset=text_rows(), run=run, bad_samples=Bad()).train()
    bad = {"count": 4, "examples": ["row 3: truncated"], "reasons": {"truncated": 1}}
    assert run.record["bad_samples"] == bad
    assert "4 bad samples were skipped (counted in every epoch): 1 x truncated; such as row 3" in caplog.text


def test_learning_rates_are_used_and_logged(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=4, save_strategy="no", logging_steps=1, lr_scheduler_type="constant")
    run, model = Run("stage_two", args, {}).start(), llama()
    before = state_of(model)
    rates = {"model.layers.0": 0.0, "model.layers.1": 1e-4}
    RecipeTrainer(model, args, train_dataset=text_rows(), run=run, learning_rates=rates).train()
    after = state_of(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("model.layers.0.") for name in moved) and "lm_head.weight" in moved
    entry = run.record["history"][0]
    assert entry["learning_rate"] == 1e-2 and entry["learning_rate_model.layers.1"] == pytest.approx(1e-4)


def test_throughput_is_logged(tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="no")
    run = Run("stage_zero", args, {}).start()
    RecipeTrainer(llama(), args, train_dataset=text_rows(), run=run).train()
    assert all(entry["samples_per_second"] > 0 for entry in run.record["history"][1:-1])


def test_training_opens_no_network_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"a connection was opened: {args}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    args = arguments(tmp_path / "a")
    run = Run("stage_zero", args, {}).start()
    trainer = ObjectiveTrainer(Toy(), args, train_dataset=toy_rows(), run=run)
    trainer.train()
    run.save_artifact(tiny.tiny_vit().save_pretrained, "encoder", "encoder")
    run.finish()


# ---- objectives ----------------------------------------------------------------------------------------------


def test_a_method_that_returns_something_else_is_named(tmp_path: Path) -> None:
    class Bare(Toy):
        def forward(self, **columns):
            return super().forward(**columns).loss

    args = arguments(tmp_path, max_steps=1, save_strategy="no")
    with pytest.raises(ValueError, match=r"Bare.loss returned Tensor; return ObjectiveOutput\(loss="):
        ObjectiveTrainer(Bare(), args, train_dataset=toy_rows()).train()


def test_after_step_once_per_optimizer_step(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=4, gradient_accumulation_steps=3, save_strategy="no")
    objective = Toy()
    ObjectiveTrainer(objective, args, train_dataset=toy_rows()).train()
    assert objective.progress == [0.25, 0.5, 0.75, 1.0]


def test_metrics_are_averaged_between_logs(tmp_path: Path) -> None:
    rows = toy_rows(8)
    args = arguments(tmp_path, max_steps=4, logging_steps=4, save_strategy="no")
    run = Run("stage_zero", args, {}).start()
    ObjectiveTrainer(Toy(), args, train_dataset=rows, run=run).train()
    entry = run.record["history"][0]  # four batches of two: every row once
    assert entry["mean_x"] == pytest.approx(torch.stack([row["x"] for row in rows]).mean().item(), abs=1e-6)
    assert entry["one"] == 1.0


def test_accumulated_losses_are_the_mean_of_their_micro_batches(tmp_path: Path) -> None:
    """Two micro-batches of two give the step of one batch of four; this loss is a mean over rows."""
    models = []
    for batch, steps in ((4, 1), (2, 2)):
        model = Toy().double()
        model.dropout.p = 0.0
        rows = [{"x": row["x"].double()} for row in toy_rows(4)]
        args = arguments(
            tmp_path / f"{steps}", max_steps=2, per_device_train_batch_size=batch, gradient_accumulation_steps=steps,
            save_strategy="no", optim="sgd", max_grad_norm=0.0,
        )  # fmt: skip
        ObjectiveTrainer(model, args, train_dataset=rows).train()
        models.append(state_of(model))
    for name in models[0]:
        torch.testing.assert_close(models[0][name], models[1][name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("loss", "warned"), [(math.log(2), True), (0.5 * math.log(2), False)])
def test_a_loss_at_chance_is_warned_of(
    loss: float, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stuck(Toy):
        def forward(self, x: torch.Tensor) -> ModelOutput:
            return ModelOutput(loss=super().forward(x).loss * 0 + loss, metrics={})

    args = arguments(tmp_path, max_steps=52, logging_steps=1, save_strategy="no")
    with caplog.at_level("INFO"):
        ObjectiveTrainer(Stuck(), args, train_dataset=toy_rows()).train()
    assert f"negatives per anchor: 1; effective batch: 2; loss at chance {math.log(2):.4f}" in caplog.text
    assert caplog.text.count("sits at chance") == int(warned)


def test_accumulation_says_that_it_adds_no_negatives(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=3, save_strategy="no")
    ObjectiveTrainer(Toy(), args, train_dataset=toy_rows()).train()
    assert "gradient_accumulation_steps=3 adds no negatives: each loss sees 2 pairs, not 6" in caplog.text


def test_tied_copies_are_saved_once(tmp_path: Path) -> None:
    state = trainer_module._without_copies(Toy().state_dict())
    assert set(state) == {"layer.weight", "layer.bias", "logit_scale", "queue"}
