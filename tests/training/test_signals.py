"""SIGTERM and SIGUSR1: the step is finished, an exact checkpoint saved, exit code 143, on all ranks."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from mllm_vision.training.checkpoint.checkpoints import check_checkpoint, list_checkpoints
from mllm_vision.training.checkpoint.signals import AnyRank, Stopped, StopSignals
from mllm_vision.training.recipe.arguments import RecipeArguments
from mllm_vision.training.recipe.folders import step_of
from mllm_vision.training.recipe.run import Run

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))
import resume_work


class Send(TrainerCallback):
    """Sends this process a signal at some event of some step."""

    def __init__(self, event: str, step: int, number: int = signal.SIGTERM) -> None:
        def send(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                os.kill(os.getpid(), number)

        setattr(self, event, send)


class Measured:
    """An evaluator whose value is the weight; it can send a signal, and remembers the steps it was called at."""

    primary_metric = "value"

    def __init__(self, name: str, send_at: int | None = None) -> None:
        self.name, self.send_at, self.steps = name, send_at, []

    def __call__(self, model: Any, step: int) -> dict[str, float]:
        if step == self.send_at:
            os.kill(os.getpid(), signal.SIGTERM)
        self.steps.append(step)
        return {"value": float(model.weight)}


def stopped(trainer: Any) -> int:
    """Trains until the signal ends it; the step of the newest checkpoint, which is whole."""
    with pytest.raises(SystemExit) as end:
        trainer.train()
    assert end.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL == signal.getsignal(signal.SIGUSR1)
    newest = list_checkpoints(Path(trainer.args.output_dir))[-1]
    check_checkpoint(newest)
    assert step_of(newest) == trainer.state.global_step
    return step_of(newest)


MOMENTS = {  # (event, step it comes at) -> step that is saved
    ("on_train_begin", 0): 1,
    ("on_step_begin", 4): 5,
    ("on_save", 6): 7,
    ("on_save", 12): 12,  # the last one
}


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize(("moment", "saved"), MOMENTS.items())
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["TERM", "USR1"])
def test_a_signal_finishes_the_step_and_saves(
    kind: str, moment: tuple[str, int], saved: int, number: int, numbers: Path, tmp_path: Path
) -> None:
    shards = numbers if kind == "stream" else None
    settings = {"max_steps": 12, "per_device_train_batch_size": 4, "save_steps": 6}
    whole = resume_work.trainer_of(tmp_path / "whole", shards, **settings)
    whole.train()
    first = resume_work.trainer_of(tmp_path / "run", shards, **settings)
    first.add_callback(Send(*moment, number))
    assert stopped(first) == saved
    second = resume_work.trainer_of(tmp_path / "run", shards, resume=True, **settings)
    second.train()
    assert first.model.rows + second.model.rows == whole.model.rows
    assert torch.equal(second.model.weight, whole.model.weight)


@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_it_saves_whatever_the_strategy_and_what_is_needed_to_resume(
    strategy: str, numbers: Path, tmp_path: Path
) -> None:
    """At the end of the first epoch (9 steps) too; `save_only_model` would leave nothing to resume from."""
    settings = {"max_steps": 20, "per_device_train_batch_size": 4, "save_strategy": strategy, "save_only_model": True}
    for step in (4, 8):
        output = tmp_path / f"{step}"
        trainer = resume_work.trainer_of(output, None, **settings)
        trainer.add_callback(Send("on_step_begin", step))
        assert stopped(trainer) == step + 1
        assert (output / f"checkpoint-{step + 1}" / "optimizer.pt").is_file()


@pytest.mark.parametrize("cut", [6, 12], ids=["a middle one", "the last one"])
def test_an_evaluation_is_cut_and_made_at_the_next_start(cut: int, tmp_path: Path) -> None:
    """Between two evaluators; which checkpoint is the best, and all that is drawn at random, stays as uninterrupted."""
    settings = {
        **{"max_steps": 12, "per_device_train_batch_size": 4, "save_steps": 3, "eval_strategy": "steps"},
        **{"eval_steps": 3, "metric_for_best_model": "second_value", "greater_is_better": cut == 6},
        **{"load_best_model_at_end": True, "ema_decay": 0.5, "save_total_limit": 2},
    }

    def trainer_of(output: Path, send_at: int | None = None, **more: Any) -> Any:
        evaluators = [Measured("first", send_at), Measured("second")]
        trainer = resume_work.trainer_of(output, None, evaluators=evaluators, **settings, **more)
        return trainer

    whole = trainer_of(tmp_path / "whole")
    whole.train()
    first = trainer_of(tmp_path / "run", send_at=cut)
    assert stopped(first) == cut
    assert first.evaluators[0].steps == list(range(3, cut + 1, 3)) and cut not in first.evaluators[1].steps
    second = trainer_of(tmp_path / "run", resume=True)
    second.train()
    assert second.evaluators[1].steps[0] == cut
    assert second.state.best_metric == whole.state.best_metric
    assert Path(second.state.best_model_checkpoint).name == Path(whole.state.best_model_checkpoint).name
    assert torch.equal(second.model.weight, whole.model.weight)


def test_early_stopping_by_the_evaluation_that_was_due(tmp_path: Path) -> None:
    class StopEarly(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4

    settings = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "no"}
    first = resume_work.trainer_of(tmp_path, None, evaluators=[Measured("one")], **settings)
    first.add_callback(Send("on_step_begin", 3))
    assert stopped(first) == 4 and first.evaluators[0].steps == []
    second = resume_work.trainer_of(tmp_path, None, evaluators=[Measured("one")], resume=True, **settings)
    second.add_callback(StopEarly())
    second.train()
    assert second.model.rows == [] and second.evaluators[0].steps[0] == 4


def test_a_second_signal_ends_at_once_and_no_artifact_looks_trained(fork: Any, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = fork.Process(
        target=resume_work.train_until_signalled,
        args=(output, None, 60.0, {"max_steps": 5}, 0, 1, resume_work.free_port()),
    )
    process.start()
    wait_for(tmp_path / "begun-0")
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.3)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGUSR1)
    process.join(10)
    assert process.exitcode == -signal.SIGUSR1
    assert list_checkpoints(output) == [] if output.is_dir() else True


def test_what_is_being_written_is_finished(tmp_path: Path) -> None:
    run = Run("stage_zero", RecipeArguments(output_dir=str(tmp_path / "run"), use_cpu=True), {}).start()

    def save(folder: Path) -> None:
        from safetensors.torch import save_file

        os.kill(os.getpid(), signal.SIGTERM)
        save_file({"weight": torch.ones(2)}, folder / "model.safetensors")

    with pytest.raises(Stopped):
        run.save_artifact(save, "model", "encoder")
    assert (tmp_path / "run" / "model" / "lineage.json").is_file()


def test_handlers_of_the_program_itself_stay() -> None:
    mine: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: mine.append(number))
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert mine == [signal.SIGUSR1] and signals.received is None
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_what_a_launcher_passes_on_is_the_same_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(Stopped), StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM


def test_one_process_answers_for_itself() -> None:
    assert AnyRank(torch.device("cpu"))(True) is True and AnyRank(torch.device("cpu"))(False, now=True) is False


def test_the_inherited_flag_means_the_same(tmp_path: Path) -> None:
    """The stock Trainer's own way leaves a checkpoint that does not resume exactly, and continues as if trained."""
    trainer = resume_work.trainer_of(tmp_path, None, max_steps=8, enable_jit_checkpoint=True)
    trainer.add_callback(Send("on_step_begin", 2))
    assert stopped(trainer) == 3


# ---- processes -----------------------------------------------------------------------------------------------


def wait_for(file: Path, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < limit, f"{file} did not come"
        time.sleep(0.01)


def check_signal(fork: Any, shards: Path | None, folder: Path, world: int, workers: int) -> None:
    """One rank of `world` is sent a signal at a random moment; resumed on one process, the rows are all there once."""
    chance = random.Random(f"{folder} {time.time_ns()}")
    settings = {"max_steps": 400, "save_steps": 1000, "dataloader_num_workers": workers}
    output, port = folder / "run", resume_work.free_port()
    batch = {"per_device_train_batch_size": 4 // world}
    processes = [
        fork.Process(
            target=resume_work.train_until_signalled,
            args=(output, shards, 0.01, {**settings, **batch}, rank, world, port),
            daemon=False,
        )
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    wait_for(folder / "begun-0")
    moment, sent = chance.random() * 0.3, chance.choice([signal.SIGTERM, signal.SIGUSR1])
    time.sleep(moment)
    os.kill(processes[-1].pid, sent)
    for process in processes:
        process.join(60)
    note = f"{signal.Signals(sent).name} after {moment:.3f} s"
    assert [process.exitcode for process in processes] == [143] * world, note
    (newest,) = list_checkpoints(output)
    check_checkpoint(newest)
    step = step_of(newest)
    ranks = [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(world)]
    first = [Counter(itertools.chain(*batches)) for batches in zip(*ranks, strict=True)]
    assert len(first) == step, note
    settings = {**settings, "max_steps": step + 12, "per_device_train_batch_size": 4, "save_strategy": "no"}
    rest = resume_work.seen(output, shards, resume=True, **settings)
    whole = resume_work.seen(folder / "whole", shards, **settings)
    assert first + [Counter(batch) for batch in rest] == [Counter(batch) for batch in whole], note


@pytest.mark.parametrize(("kind", "world", "workers"), [("stream", 2, 0), ("map", 1, 1)])
def test_all_ranks_save_when_one_is_signalled(
    kind: str, world: int, workers: int, fork: Any, numbers: Path, tmp_path: Path
) -> None:
    check_signal(fork, numbers if kind == "stream" else None, tmp_path, world, workers)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(60))
def test_sixty_of_sixty(number: int, fork: Any, numbers: Path, tmp_path: Path) -> None:
    check_signal(fork, numbers if number % 2 else None, tmp_path, 1 + (number // 2) % 2, (number // 4) % 2)
