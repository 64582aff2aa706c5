"""Killed with SIGKILL at a random step and resumed, a run ends with the weights of one that was never interrupted.

Through the recipes of all stages, for map-style data and streams, on one process and on two; the checkpoints that
make it so, and the order of samples on another number of processes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from mllm_vision.training.callbacks.progress import SaveByMinutes
from mllm_vision.training.checkpoint import resume
from mllm_vision.training.checkpoint.checkpoints import (
    check_checkpoint,
    is_whole,
    last_checkpoint,
    list_checkpoints,
    rotate,
)
from mllm_vision.training.recipe.arguments import RecipeArguments

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))
import resume_work
from resume_work import free_port, seen

STEPS, SAVE = 7, 2
SMALL = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards (no number of processes here divides them), a tokenizer, a language model, a model to instruct."""
    from mllm_vision.encoder import VisionEncoder
    from mllm_vision.vlm import build_vlm, save_vlm
    from mllm_vision.vlm.conversation import chat_template

    folder = tmp_path_factory.mktemp("resume")
    for number, size in enumerate((7, 11, 5, 9, 8)):
        tiny.write_pairs_parquet(folder / "shards" / f"train-{number}.parquet", size, captions_each=3)
    tiny.write_pairs_parquet(folder / "heldout.parquet", 4)
    tokenizer = tiny.tiny_tokenizer(folder / "llm")
    tiny.tiny_llama(len(tokenizer), attention_dropout=0.2, num_hidden_layers=1).save_pretrained(folder / "llm")
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
    encoder.save_pretrained(folder / "encoder")
    model, processor = build_vlm(encoder, folder / "llm", "llava15", folder / "llm", chat_template("plain"))
    save_vlm(model, processor, folder / "aligned")
    return folder


STAGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "pretrain": lambda folder: {
        "tokenizer": folder / "llm",
        "encoder_overrides": f"{SMALL},patch_size=8,attention_dropout=0.1",
        "text_overrides": SMALL,
        "image_size": 32,
        "max_text_length": 16,
        "crop_scale": "0.5 1.0",
    },
    "pretrain_images": lambda folder: {
        "objective": "moco_v2",
        "queue_size": 16,
        "encoder_overrides": f"{SMALL},patch_size=8,attention_probs_dropout_prob=0.1",
        "image_size": 32,
        "lr_scaling": "none",
    },
    "align": lambda folder: {
        "encoder": folder / "encoder",
        "llm": folder / "llm",
        "eval_dataset_name": folder / "heldout.parquet",
        "sample_count": 1,
    },
    "instruct": lambda folder: {
        "model": folder / "aligned",
        "chat_template": "qa",
        "max_turns": 1,
        "eval_dataset_name": folder / "heldout.parquet",
        "max_new_tokens": 1,
    },
}
CHUNKS = {stage: {"embed_batch_size": 2} for stage in STAGES if stage.startswith("pretrain")}  # one's batch, of two
TABLE = {  # a pass over rows that two processes cannot share evenly, before either epoch
    "pretrain_images": {
        **{"objective": "pcl", "num_clusters": "3 5", "prototype_warmup_epochs": 0, "kmeans_restarts": 1},
        **{"max_train_samples": 39, "max_steps": 12},
    }
}
STREAM = {"streaming": "true", "shuffle_buffer": 16, "stream_lanes": 3, "dataloader_num_workers": 1}


def words_of(folder: Path, stage: str, output: Path, **more: Any) -> list[str]:
    flags = {
        "dataset_name": folder / "shards",
        "output_dir": output,
        "max_steps": STEPS,
        "save_steps": SAVE,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "use_cpu": "true",
        "disable_tqdm": "true",
        "ddp_find_unused_parameters": "false",
        **STAGES[stage](folder),
        **more,
    }
    flags = {name: value for name, value in flags.items() if value is not None}
    return [word for name, value in flags.items() for word in (f"--{name}", *str(value).split(" "))]


class Job:
    """A recipe on some processes."""

    def __init__(self, fork: Any, stage: str, words: list[str], world: int, log: Path) -> None:
        self.log, port = log, free_port()
        self.processes = [
            fork.Process(target=resume_work.run, args=(stage, words, rank, world, port, str(log)), daemon=False)
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def finish(self) -> None:
        for process in self.processes:
            process.join(120)
        codes = [process.exitcode for process in self.processes]
        assert set(codes) == {0}, f"{codes}\n{self.log.read_text()[-3000:]}"

    def kill_after(self, step: int, metrics: Path, moment: float) -> None:
        """SIGKILL to every process, some time after a step was logged."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and all(process.is_alive() for process in self.processes):
            logged = metrics.read_text().splitlines() if metrics.is_file() else []
            if any(f'"step": {step},' in line for line in logged):
                break
            time.sleep(0.002)
        time.sleep(moment)
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(30)
        assert {process.exitcode for process in self.processes} == {-9}, self.log.read_text()[-3000:]


def losses(output: Path) -> dict[int, float]:
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def check_kill(fork: Any, folder: Path, tmp_path: Path, stage: str, streamed: bool, world: int) -> None:
    chance = random.Random(f"{stage} {streamed} {world} {time.time_ns()}")  # a random step, another one every time
    step, moment = chance.randint(SAVE + 1, STEPS - 2), chance.random() * 0.03
    kind = STREAM | CHUNKS.get(stage, {}) if streamed else TABLE.get(stage, {})
    more = {"per_device_train_batch_size": 4 // world, **kind}
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    log = tmp_path / "log"
    note = f"killed {moment * 1000:.0f} ms after step {step}"
    Job(fork, stage, words_of(folder, stage, whole, **more), world, log).finish()
    killed = Job(fork, stage, words_of(folder, stage, torn, **more), world, log)
    killed.kill_after(step, torn / "metrics.jsonl", moment)
    assert last_checkpoint(torn) is not None and not (torn / "run.json").exists(), note
    again = [*words_of(folder, stage, torn, **more), "--resume"]
    Job(fork, stage, again, world, log).finish()
    assert losses(torn) == losses(whole), note
    record = json.loads((torn / "run.json").read_text())["data"]["train"]
    assert record["rows"] == more.get("max_train_samples", 40)
    assert len(record["samples"]) == 3
    artifact = {"pretrain": "dual", "pretrain_images": "encoder"}.get(stage, "model")
    expected, found = (load_file(each / artifact / "model.safetensors") for each in (whole, torn))
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not different and expected.keys() == found.keys(), (note, different)
    untrained = {"align": folder / "aligned", "instruct": folder / "aligned"}.get(stage)
    if untrained is not None:  # so that the comparison says something
        before = load_file(untrained / "model.safetensors")
        assert any(not torch.equal(before[name], found[name]) for name in found)


CASES = [(stage, streamed, world) for stage in STAGES for streamed in (False, True) for world in (1, 2)]
FAST = [("pretrain", True, 2), ("pretrain_images", False, 2), ("align", False, 1), ("instruct", True, 1)]
NAMES = {False: "map", True: "stream"}


@pytest.mark.parametrize(
    ("stage", "streamed", "world"),
    [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.slow, id=f"{case[0]}-{NAMES[case[1]]}-{case[2]}")
        for case in CASES
    ],
)
def test_killed_and_resumed_is_uninterrupted(
    fork: Any, folder: Path, tmp_path: Path, stage: str, streamed: bool, world: int
) -> None:
    check_kill(fork, folder, tmp_path, stage, streamed, world)


@pytest.mark.parametrize(
    ("stage", "more", "message"),
    [
        ("align", {"eval_dataset_name": None}, "--streaming holds no rows out; pass --eval_dataset_name"),
        ("instruct", {"pack_turns": "true"}, "--pack_turns and --streaming are mutually exclusive"),
        ("pretrain", {"max_train_samples": 5}, "max_train_samples=5 needs the rows counted"),
        (
            "pretrain_images",
            {"objective": "pcl", "queue_size": None},
            "PCL iterates over all rows.*leave --streaming out",
        ),
        (
            "pretrain_images",
            {"eval_dataset_name": "test.parquet"},
            "a stream cannot be the bank.*--eval_train_dataset_name",
        ),
    ],
)
def test_what_a_stream_cannot_do_is_refused_before_training(
    stage: str, more: dict, message: str, folder: Path, tmp_path: Path
) -> None:
    words = words_of(folder, stage, tmp_path, **{**STREAM, **more})
    with pytest.raises(ValueError, match=message):
        resume_work.RECIPES[stage].main(words)


# ---- the order of rows, by the trainer -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"num_train_epochs": 2, "per_device_train_batch_size": 4}, 18),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 10),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 4, "dataloader_drop_last": False}, 20),
        ({"max_steps": 23, "per_device_train_batch_size": 4, "dataloader_num_workers": 2}, 23),
    ],
    ids=["epochs", "accumulated", "last batch", "workers"],
)
def test_resumed_at_any_checkpoint_goes_on_with_the_same_rows(
    kind: str, settings: dict, steps: int, numbers: Path, tmp_path: Path
) -> None:
    shards = numbers if kind == "stream" else None
    settings = {**settings, "save_strategy": "no"}
    if kind == "stream" and "gradient_accumulation_steps" in settings:
        steps = 8  # a pass of a stream holds whole steps; the stock Trainer ends an epoch with a smaller one
    trainer = resume_work.trainer_of(tmp_path / "whole", shards, **settings)
    trainer.train()
    whole = trainer.model.rows
    assert trainer.state.global_step == steps
    batches = -(-38 // 4) if settings.get("dataloader_drop_last") is False else 9 - (steps == 8)
    for epoch in range(2):  # every row once in an epoch
        rows = [row for batch in whole[epoch * batches : (epoch + 1) * batches] for row in batch]
        assert len(set(rows)) == len(rows) == min(38, 4 * batches)
    per_step = settings.get("gradient_accumulation_steps", 1)
    full = -(-batches // per_step)
    for stop in (1, steps // 2, steps // 2 + 1) if kind == "stream" else (steps // 2 + 1,):
        output = tmp_path / f"{stop}"
        again = {**settings, "save_strategy": "steps", "save_steps": stop}
        first = seen(output, shards, stop + 1, **again)
        done = stop // full * batches + stop % full * per_step
        assert last_checkpoint(output) == str(output / f"checkpoint-{stop}")
        trainer = resume_work.trainer_of(output, shards, resume=True, **again)
        trainer.train()
        assert first[:done] + trainer.model.rows == whole
        assert trainer.state.global_step == steps
        expected = settings.get("num_train_epochs", steps / full)
        assert trainer.state.epoch == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_another_number_of_processes_goes_on_in_the_same_order(
    kind: str, fork: Any, numbers: Path, tmp_path: Path
) -> None:
    """Two processes, stopped in their second epoch; then one, with twice the batch or with accumulation."""
    shards = numbers if kind == "stream" else None
    common = {"max_steps": 13, "save_steps": 3, "save_total_limit": 1}
    whole = seen(tmp_path / "whole", shards, per_device_train_batch_size=4, **common)
    two, port = tmp_path / "two" / "run", free_port()
    settings = {**common, "per_device_train_batch_size": 2}
    processes = [
        fork.Process(target=resume_work.train_on_rows, args=(two, shards, 11, settings, rank, 2, port))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    ranks = [json.loads((two.parent / f"seen-{rank}.json").read_text()) for rank in range(2)]
    for step, (first, second) in enumerate(zip(*ranks, strict=True)):
        assert Counter(first + second) == Counter(whole[step])
        assert len(first) == len(second) == 2
    assert last_checkpoint(two) == str(two / "checkpoint-9")
    shutil.copytree(two, tmp_path / "accumulated")
    twice = seen(two, shards, per_device_train_batch_size=4, resume=True, **common)
    assert [Counter(batch) for batch in twice] == [Counter(batch) for batch in whole[9:]]
    halves = seen(tmp_path / "accumulated", shards, gradient_accumulation_steps=2, resume=True, **settings)
    found = [halves[step] + halves[step + 1] for step in range(0, len(halves), 2)]
    assert [Counter(batch) for batch in found[:4]] == [Counter(batch) for batch in whole[9:]]


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_steps_of_another_size_are_refused(kind: str, numbers: Path, tmp_path: Path) -> None:
    shards = numbers if kind == "stream" else None
    seen(tmp_path, shards, max_steps=2, per_device_train_batch_size=4)
    message = (
        r"optimizer steps took 4 rows, now they would take 2 \(per_device_train_batch_size=2 x .* x 1 processes\)"
        r".* --per_device_train_batch_size 4 --gradient_accumulation_steps 1"
    )
    with pytest.raises(ValueError, match=message):
        seen(tmp_path, shards, max_steps=4, per_device_train_batch_size=2, resume=True)


def test_a_list_is_not_gone_on_with_as_a_stream(numbers: Path, tmp_path: Path) -> None:
    seen(tmp_path, None, max_steps=2)
    with pytest.raises(ValueError, match="was saved without --streaming"):
        seen(tmp_path, numbers, max_steps=4, resume=True)


# ---- checkpoints ---------------------------------------------------------------------------------------------


def test_the_state_of_the_data_is_small(numbers: Path, tmp_path: Path) -> None:
    seen(tmp_path, numbers, max_steps=4)
    assert (tmp_path / "checkpoint-4" / resume.DATA_STATE).stat().st_size < 1000


@pytest.mark.parametrize("damage", ["cut", "gone", "emptied", "flipped"])
@pytest.mark.parametrize(
    "file",
    ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "data_state.json"],
)
def test_any_damage_is_noticed_and_the_checkpoint_before_is_used(
    damage: str, file: str, whole_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    assert last_checkpoint(run) == str(run / "checkpoint-4")
    path = run / "checkpoint-4" / file
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "gone":
        path.unlink()
    elif damage == "emptied":
        path.write_bytes(b"")
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
    if damage != "flipped":  # which only reading all of it shows
        assert not is_whole(run / "checkpoint-4")
    with pytest.raises(ValueError, match=rf"damaged: .*{file}"):
        check_checkpoint(run / "checkpoint-4")
    assert last_checkpoint(run) == str(run / "checkpoint-2")


@pytest.fixture(scope="module")
def whole_run(numbers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    seen(run, numbers, max_steps=4)
    return run


def test_an_older_checkpoint_goes_only_when_the_new_one_is_whole(
    numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[list[str]] = []
    original = resume.write_manifest

    def write_manifest(folder: Path) -> None:
        assert folder.name.startswith(".")  # what a killed process leaves here counts as nothing
        there.append([path.name for path in list_checkpoints(tmp_path) if is_whole(path)])
        original(folder)

    monkeypatch.setattr(resume, "write_manifest", write_manifest)
    seen(tmp_path, numbers, max_steps=6, save_total_limit=1)
    assert there == [[], ["checkpoint-2"], ["checkpoint-4"]]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-6"]


def test_the_last_ones_and_the_best_are_kept_and_torn_ones_go(whole_run: Path, tmp_path: Path) -> None:
    for step in range(1, 7):
        shutil.copytree(whole_run / "checkpoint-4", tmp_path / f"checkpoint-{step}")
        os.utime(tmp_path / f"checkpoint-{step}", (100 - step, 100 - step))  # a clock that runs backwards
    (tmp_path / "checkpoint-5" / "optimizer.pt").unlink()
    os.utime(tmp_path / "checkpoint-5", (95, 95))

    def left() -> list[str]:
        return [path.name.removeprefix("checkpoint-") for path in list_checkpoints(tmp_path)]

    rotate(tmp_path, None)
    assert left() == ["1", "2", "3", "4", "6"]
    rotate(tmp_path, 3, str(tmp_path / "checkpoint-2"))
    assert left() == ["2", "4", "6"]
    rotate(tmp_path, 1, str(tmp_path / "checkpoint-2"))
    assert left() == ["2", "6"]
    rotate(tmp_path, 1)
    assert left() == ["6"]
    shutil.copytree(tmp_path / "checkpoint-6", tmp_path / "checkpoint-3")
    rotate(tmp_path, 1, step=3)  # the run was resumed before 6, and has just written 3
    assert left() == ["3"]


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_a_run_that_has_all_its_steps_trains_none(kind: str, numbers: Path, tmp_path: Path) -> None:
    """In the middle of an epoch and at its end; more steps are gone on to, fewer than done are refused."""
    shards = numbers if kind == "stream" else None
    settings = {"per_device_train_batch_size": 4, "save_steps": 7}
    for steps in (7, 9):
        seen(tmp_path / f"{steps}", shards, max_steps=steps, **settings)
        before = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / f"{steps}").rglob("*"))}
        trainer = resume_work.trainer_of(tmp_path / f"{steps}", shards, resume=True, max_steps=steps, **settings)
        assert trainer.train().global_step == steps and trainer.model.rows == []
        assert {path: path.stat().st_mtime_ns for path in sorted((tmp_path / f"{steps}").rglob("*"))} == before
    with pytest.raises(ValueError, match="checkpoint-9 is at step 9, beyond the 8 steps of this run.*--max_steps 9"):
        seen(tmp_path / "9", shards, resume=True, max_steps=8, **settings)
    whole = seen(tmp_path / "whole", shards, max_steps=12, **settings)
    assert seen(tmp_path / "9", shards, resume=True, max_steps=12, **settings) == whole[9:]


def test_saving_by_minutes(numbers: Path, tmp_path: Path) -> None:
    """A clock that moves forty seconds a step: every second step is a minute, and a save by steps counts too."""
    now = [0.0]
    trainer = resume_work.trainer_of(tmp_path, numbers, max_steps=9, save_steps=5, save_total_limit=None)
    trainer.add_callback(SaveByMinutes(1.0, clock=lambda: now[0]))

    class Tick(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now[0] += 40.0

    trainer.add_callback(Tick())
    trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (2, 4, 5, 7, 9)]
    with pytest.raises(ValueError, match="save_minutes=0 must be positive"):
        RecipeArguments(output_dir=str(tmp_path), use_cpu=True, save_minutes=0)


def test_the_flag_saves_by_minutes(numbers: Path, tmp_path: Path) -> None:
    seen(tmp_path, numbers, max_steps=3, save_strategy="no", save_minutes=1e-9, save_total_limit=5)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
