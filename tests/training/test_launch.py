"""Starting on many processes: what is refused, how a lost rank ends them all, and the files of scripts/launch."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from mllm_vision.training import launch
from mllm_vision.training.arguments import RecipeArguments
from mllm_vision.training.launch import RankWatch, is_collective_error

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "scripts" / "launch"
INTERVAL, PATIENCE = 0.05, 1.2


# ---- refused before the start --------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [True, "true", "full_shard", ["full_shard", "auto_wrap"]])
def test_fsdp_on_a_cpu_is_refused(tmp_path, asked):
    with pytest.raises(ValueError, match="--use_cpu is set: on a CPU it would silently be DDP"):
        RecipeArguments(output_dir=str(tmp_path), use_cpu=True, fsdp=asked)


def test_fsdp_asked_for_by_accelerate_is_refused_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"accelerate config \(distributed_type: FSDP\).*Leave FSDP out"):
        RecipeArguments(output_dir=str(tmp_path), use_cpu=True)


def test_fsdp_without_an_accelerator_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_has_accelerator", lambda: False)
    with pytest.raises(ValueError, match="this process has no accelerator"):
        RecipeArguments(output_dir=str(tmp_path), fsdp=True)


def test_processes_that_would_train_alone_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")

    class Given:
        world_size = 1

    with pytest.raises(ValueError, match="started 2 processes, but each would train by itself.*--use_cpu"):
        launch.check_joined(Given)
    Given.world_size = 2
    launch.check_joined(Given)


def test_on_an_accelerator_only_what_works_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_has_accelerator", lambda: True)

    class Given:
        fsdp, fsdp_config, use_cpu = True, None, False

    launch.check_launch(Given)
    Given.fsdp = "true"  # as the command line gives it
    launch.check_launch(Given)
    assert Given.fsdp is True
    Given.fsdp_config = {"fsdp_version": 1}
    with pytest.raises(ValueError, match="use fsdp_version 2"):
        launch.check_launch(Given)
    config = tmp_path / "fsdp.json"
    config.write_text(json.dumps({"state_dict_type": "SHARDED_STATE_DICT"}))
    Given.fsdp_config = str(config)
    with pytest.raises(ValueError, match="FULL_STATE_DICT"):
        launch.check_launch(Given)
    Given.fsdp, Given.fsdp_config = "false", None
    launch.check_launch(Given)
    assert not Given.fsdp
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FULL_STATE_DICT"):  # what accelerate saves by default with FSDP2
        launch.check_launch(Given)
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    launch.check_launch(Given)


@pytest.mark.parametrize(("text", "complaint"), [("soon", "no number of seconds"), ("3", "below 6 s")])
def test_a_patience_that_cannot_work_is_refused(monkeypatch, text, complaint):
    monkeypatch.setenv(launch.SWITCH, text)
    with pytest.raises(ValueError, match=complaint):
        launch.watch_ranks()


def test_one_process_needs_no_watch():
    assert launch.watch_ranks() is None
    launch.tell_failure(ValueError("nobody listens"))


# ---- a rank is lost ------------------------------------------------------------------------------------------


class Ranks:
    """Watches of several ranks in one process, over one store; `said[rank]` is what a rank would end with."""

    def __init__(self, world: int, **settings: float) -> None:
        self.server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.said: dict[int, str] = {}
        self.told = threading.Event()
        self.watches = [self._watch(rank, world, settings) for rank in range(world)]
        for watch in self.watches:
            watch.start()

    def _watch(self, rank: int, world: int, settings: dict[str, float]) -> RankWatch:
        client = dist.TCPStore("127.0.0.1", self.server.port, is_master=False)
        settings = {"interval": INTERVAL, "patience": PATIENCE, **settings}
        return RankWatch(client, rank, world, end=lambda message: self.said.setdefault(rank, message), **settings)

    def kill(self, rank: int) -> None:
        """As SIGKILL: no more signs, and nothing is told."""
        watch = self.watches[rank]
        watch._leave_sign = lambda: time.sleep(60)  # type: ignore[method-assign]
        watch._state = "killed"

    def wait(self, *ranks: int, seconds: float = 20) -> None:
        limit = time.monotonic() + seconds
        while not set(ranks) <= set(self.said) and time.monotonic() < limit:
            time.sleep(0.02)
        assert set(ranks) <= set(self.said), f"only {sorted(self.said)} of {ranks} ended"

    def close(self) -> None:
        for watch in self.watches:
            watch._state, watch.verdict = "killed", "over"
            watch._wake.set()


@pytest.fixture
def ranks():
    made: list[Ranks] = []

    def make(world: int, **settings: float) -> Ranks:
        made.append(Ranks(world, **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("lost", [1, 0])
def test_every_rank_ends_when_one_falls_silent(ranks, lost):
    job = ranks(3)
    time.sleep(4 * INTERVAL)
    assert job.said == {}
    job.kill(lost)
    others = [rank for rank in range(3) if rank != lost]
    job.wait(*others)
    for rank in others:
        assert f"rank {lost} of 3 (host " in job.said[rank] and f"process {os.getpid()}" in job.said[rank]
        assert "no sign of life" in job.said[rank] and "--resume" in job.said[rank]
    assert lost not in job.said


def test_an_error_of_one_rank_is_told_to_the_others_at_once(ranks):
    job = ranks(3, patience=60.0)
    job.watches[2].fail("FileNotFoundError: no pairs.parquet on this host")
    job.wait(0, 1)
    for rank in (0, 1):
        assert "rank 2 of 3" in job.said[rank]
        assert "FileNotFoundError: no pairs.parquet on this host" in job.said[rank]


def test_ranks_that_leave_in_good_order_end_nothing(ranks):
    job = ranks(3)
    job.watches[0].keeps_store = True
    job.watches[1].leave()
    time.sleep(2 * PATIENCE)  # rank 1 is silent now, and has said why
    job.watches[0].leave()  # waits for rank 2 for a moment, so that it learns that the store may go
    job.watches[2].leave()
    time.sleep(4 * INTERVAL)
    assert job.said == {}


def test_a_store_that_went_ends_every_rank(ranks):
    job = ranks(2)
    time.sleep(2 * INTERVAL)

    class Gone:
        def __getattr__(self, name):
            raise RuntimeError("Connection reset by peer\nat a long trace")

    for watch in job.watches:
        watch.store = Gone()
    job.wait(0, 1)
    assert "the store at the launcher's address has gone (Connection reset by peer)" in job.said[1]


def test_a_store_that_does_not_answer_ends_every_rank(ranks):
    job = ranks(2)
    for watch in job.watches:
        watch._leave_sign = lambda: time.sleep(30)  # type: ignore[method-assign]
    job.wait(0, 1)
    assert "has not answered for 1.2 s" in job.said[0] and "network between is cut" in job.said[0]


def test_an_error_of_a_collective_is_no_cause():
    assert is_collective_error(RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [10.0.0.2]"))
    assert is_collective_error(dist.DistBackendError("NCCL error: unhandled system error"))
    assert not is_collective_error(RuntimeError("shape mismatch"))
    assert not is_collective_error(ValueError("gloo"))


# ---- scripts/launch ------------------------------------------------------------------------------------------


def run_file(name: str, words: list[str], tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A launch file with stand-ins for python, srun and scontrol: what would have been started is printed."""
    stand_ins = {
        "python": 'printf "%s " "$@"; echo "| $NCCL_SOCKET_IFNAME $GLOO_SOCKET_IFNAME $OMP_NUM_THREADS"',
        "scontrol": 'echo "node$1$2 $3"; echo "another"',
        "srun": 'echo "srun $1"; shift; SLURM_NODEID=1 exec "$@"',
    }
    for program, text in stand_ins.items():
        (tmp_path / program).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / program).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MASTER_", "SLURM_"))}
    return subprocess.run(
        ["bash", str(FILES / name), *words], capture_output=True, text=True, cwd=ROOT, timeout=20,
        env={**kept, "PATH": f"{tmp_path}:{os.environ['PATH']}", **environment},
    )  # fmt: skip


RECIPE = ["recipes/pretrain.py", "--output_dir", "runs/a folder"]


def test_single_node_file(tmp_path):
    done = run_file("single_node.sh", RECIPE, tmp_path, PROCESSES="4")
    started = "-m torch.distributed.run --standalone --nproc-per-node 4 recipes/pretrain.py --output_dir runs/a folder"
    assert done.stdout.startswith(started + " |")
    assert "--nproc-per-node gpu" in run_file("single_node.sh", RECIPE, tmp_path).stdout
    refused = run_file("single_node.sh", [], tmp_path)
    assert refused.returncode == 2 and "usage" in refused.stderr


def test_multi_node_file(tmp_path):
    given = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
    done = run_file("multi_node.sh", RECIPE, tmp_path, **given, INTERFACE="eth7")
    assert "--nnodes 2 --node-rank 1 --nproc-per-node gpu --master-addr 10.0.0.1 --master-port 29500" in done.stdout
    assert done.stdout.strip().endswith("| eth7 eth7 1")
    for name in given:
        left = {key: value for key, value in given.items() if key != name}
        assert name in run_file("multi_node.sh", RECIPE, tmp_path, **left).stderr
    wrong = run_file("multi_node.sh", RECIPE, tmp_path, **{**given, "NODE_RANK": "2"})
    assert wrong.returncode == 2 and "machines are numbered from 0 to 1" in wrong.stderr


def test_slurm_file(tmp_path):
    run = tmp_path / "run"
    words = ["recipes/pretrain.py", "--overwrite", "--output_dir", str(run)]
    given = {"SLURM_JOB_NODELIST": "[1-2]", "SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": "2"}
    given |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_SUBMIT_DIR": str(ROOT)}
    done = run_file("slurm.sbatch", words, tmp_path, **given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("srun --kill-on-bad-exit=1")
    assert "--nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr nodeshowhostnames [1-2] --master-port 23456" in (
        done.stdout
    )
    assert "--overwrite" in done.stdout and "--resume" not in done.stdout
    again = run_file("slurm.sbatch", words, tmp_path, **given, SLURM_RESTART_COUNT="1")
    assert "--overwrite" not in again.stdout and "--resume" not in again.stdout  # nothing was begun yet
    run.mkdir()
    (run / "recipe.yaml").touch()
    for form in (words, ["recipes/pretrain.py", f"--output_dir={run}"]):
        assert "--resume" in run_file("slurm.sbatch", form, tmp_path, **given, SLURM_RESTART_COUNT="1").stdout


def test_fsdp2_file_says_what_the_recipes_take(monkeypatch):
    """accelerate's own launcher turns the file into the environment of the processes; that passes `check_launch`."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import prepare_multi_gpu_env

    words = ["--config_file", str(FILES / "fsdp2.yaml"), *RECIPE]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    arguments.multi_gpu = True
    environment = prepare_multi_gpu_env(arguments)
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    for name, value in environment.items():
        if name.startswith(("FSDP_", "ACCELERATE_USE")):
            monkeypatch.setenv(name, value)

    class Given:
        fsdp, fsdp_config, use_cpu = None, None, False

    with pytest.raises(ValueError, match="this process has no accelerator"):
        launch.check_launch(Given)
    monkeypatch.setattr(launch, "_has_accelerator", lambda: True)
    launch.check_launch(Given)
