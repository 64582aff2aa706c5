"""Starting on many processes: what is refused, what a lost rank means for the others, scripts/launch."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist

from mllm_vision.training.recipe import launch
from mllm_vision.training.recipe.arguments import RecipeArguments
from mllm_vision.training.recipe.launch import is_collective_error
from mllm_vision.training.recipe.parser import run_recipe

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "scripts" / "launch"


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


# ---- a rank is lost ------------------------------------------------------------------------------------------


def test_an_error_of_a_collective_is_no_cause():
    assert is_collective_error(RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [10.0.0.2]"))
    assert is_collective_error(dist.DistBackendError("NCCL error: unhandled system error"))
    assert not is_collective_error(RuntimeError("shape mismatch"))
    assert not is_collective_error(ValueError("gloo"))


def fails(error: BaseException) -> None:
    raise error


def test_a_lost_rank_is_one_line_and_an_exit_code(monkeypatch, tmp_path, capsys):
    """Any other error stays what it was; both are left where torchrun's report of the first failure reads them."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("RANK", "3")
    lost = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [10.0.0.2]:1")
    with pytest.raises(SystemExit) as end:
        run_recipe(lambda: fails(lost))
    assert end.value.code == launch.EXIT_CODE == 75
    said = capsys.readouterr().err
    assert said.startswith("error: rank 3 lost another rank: it ended, or did not answer within --ddp_timeout")
    assert said.count("\n") == 1 and "--resume" in said
    assert "Connection closed by peer" in file.read_text()
    file.unlink()
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run_recipe(lambda: fails(RuntimeError("shape mismatch")))
    assert "shape mismatch" in file.read_text()
    file.unlink()
    with pytest.raises(SystemExit) as end:
        run_recipe(lambda: fails(FileNotFoundError("no pairs.parquet on this host")))
    assert end.value.code == 2 and "no pairs.parquet on this host" in file.read_text()


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
    signals = "-m torch.distributed.run --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    started = "--standalone --nproc-per-node 4 recipes/pretrain.py --output_dir runs/a folder"
    assert done.stdout.startswith(f"{signals} {started} |")
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
