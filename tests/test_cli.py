"""The command `mllm-vision`, and what a wheel holds: installed in an empty environment, used from another folder."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import yaml

from mllm_vision import cli

ROOT = Path(__file__).resolve().parents[1]
SMALL = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,patch_size=8"


@pytest.fixture(autouse=True)
def _same_words(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest"])


def test_the_verbs_are_listed_without_torch(run_python):
    code = (
        "import sys; from mllm_vision.cli import main; main([]); print('torch' in sys.modules, 'yaml' in sys.modules)"
    )
    *lines, imported = run_python(code, PYTHONPATH=str(ROOT)).splitlines()
    assert imported == "False False"
    for name, verb in cli.VERBS.items():
        assert any(line.split()[:1] == [name] and line.endswith(verb.help) for line in lines), name
        assert cli.program(name).is_file()
    assert max(map(len, lines)) <= 110


def test_an_unknown_verb_names_the_nearest(capsys):
    assert cli.main(["pretrain-image"]) == 2
    assert capsys.readouterr().err == "error: unknown verb 'pretrain-image'; did you mean pretrain-images?\n"
    assert cli.main(["zzz"]) == 2
    assert "`mllm-vision` alone lists all" in capsys.readouterr().err


def test_flags_of_torchrun_are_split_off(capsys):
    words = ["--nproc_per_node=2", "--nnodes", "2", "--max_steps", "3", "--node-rank", "1", "--standalone"]
    launcher, others = cli.split_launcher("pretrain", words)
    assert launcher == ["--nproc-per-node", "2", "--nnodes", "2", "--node-rank", "1", "--standalone"]
    assert others == ["--max_steps", "3"]
    assert cli.main(["report", "--nproc_per_node", "2"]) == 2
    assert "report runs in one process" in capsys.readouterr().err
    assert cli.main(["pretrain", "--nproc_per_node"]) == 2
    assert "needs a value" in capsys.readouterr().err


def test_configs_of_the_package_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = ROOT / "recipes" / "configs" / "quickstart" / "align.yaml"
    for word in ("quickstart/align.yaml", "quickstart/align", "recipes/configs/quickstart/align.yaml"):
        assert cli.with_config(["--blind", "--config", word]) == ["--blind", "--config", str(shipped)]
        assert cli.with_config([f"--config={word}"]) == [f"--config={shipped}"]
    assert cli.with_config(["--config", "none.yaml"]) == ["--config", "none.yaml"]  # the parser says that it is missing
    Path("quickstart").mkdir()
    Path("quickstart/align.yaml").touch()
    assert cli.with_config(["--config", "quickstart/align.yaml"]) == ["--config", "quickstart/align.yaml"]  # own first


# ---- installed ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that no earlier build is part of what is built."""
    pytest.importorskip("pip")
    skipped = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "runs", "tests", "docs")
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "copy", ignore=skipped))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *offline, "-w", target, source], check=True, timeout=120)
    return next(target.glob("*.whl"))


def environment(place: Path, *wanted: str) -> Callable[..., str]:
    """`run(*words, cwd=...)` in a new environment at `place` that holds `wanted` and our dependencies."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True, timeout=60)
    packages = next((place / "lib").glob("python*/site-packages"))
    # A line of a .pth file adds a folder, and reads none of its .pth files: no other editable install comes with it.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    quiet = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    install = ["--python", str(place / "bin" / "python"), "install", "--ignore-installed", *quiet, *wanted]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, timeout=120)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables["PATH"] = f"{place / 'bin'}:{variables['PATH']}"

    def run(*words: object, cwd: Path) -> str:
        done = subprocess.run(
            list(map(str, words)), cwd=cwd, env=variables, timeout=240, text=True, capture_output=True
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    return environment(tmp_path_factory.mktemp("environment"), str(wheel))


def test_a_wheel_holds_every_file(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mllm_vision").rglob("*") if path.is_file()}
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*") if path.is_file()}
    scripts = {path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").glob("*.py")}
    wanted = {*package, *(f"mllm_vision/{name}" for name in {*recipes, *scripts})}
    assert not sorted(name for name in wanted - held if "__pycache__" not in name)
    assert "mllm_vision/scripts/launch/single_node.sh" in held
    assert not [name for name in held if not name.startswith("mllm_vision")]


def test_the_installed_command(installed, tmp_path):
    home = installed("python", "-c", "import mllm_vision; print(mllm_vision.__file__)", cwd=tmp_path)
    assert str(ROOT) not in home
    assert "pretrain-images" in installed("mllm-vision", "--help", cwd=tmp_path)
    assert installed("python", "-m", "mllm_vision", "--version", cwd=tmp_path).startswith("mllm_vision 0.")
    assert "transformers" in installed("mllm-vision", "env", cwd=tmp_path)


@pytest.mark.slow
def test_an_editable_install(source, tmp_path):
    run = environment(tmp_path / "environment", "-e", str(source))
    assert str(source) in run("python", "-c", "import mllm_vision; print(mllm_vision.__file__)", cwd=tmp_path)
    assert "--tokenizer" in run("mllm-vision", "pretrain", "--help", cwd=tmp_path)
    assert "transformers" in run("python", "-m", "mllm_vision", "env", cwd=tmp_path)


@pytest.mark.slow
def test_the_installed_recipes(installed, tmp_path):
    """Trains, in one process and in two, evaluates and draws, all in a folder of the user's."""
    tiny.write_pairs_parquet(tmp_path / "train.parquet", 48)
    flags = ["--dataset_name", "train.parquet", "--encoder_overrides", SMALL, "--image_size", 32, "--max_steps", 2]
    flags += ["--per_device_train_batch_size", 8, "--use_cpu", "--config", "quickstart_images/simclr"]
    installed("mllm-vision", "pretrain-images", *flags, "--output_dir", "run", cwd=tmp_path)
    command = yaml.safe_load((tmp_path / "run" / "run.json").read_text())["command"]
    assert command.startswith("mllm-vision pretrain-images --dataset_name train.parquet")
    two = ["--nproc_per_node", 2, "--output_dir", "two"]
    installed("python", "-m", "mllm_vision", "pretrain_images", *flags, *two, cwd=tmp_path)
    assert yaml.safe_load((tmp_path / "two" / "run.json").read_text())["machine"]["processes"] == 2
    board = ["--model", "run/encoder", "--task", "geometry=train.parquet", "--output", "board.json"]
    installed("mllm-vision", "evaluate", *board, cwd=tmp_path)
    report = ["--runs", "run", "--evaluations", "stage_zero=board.json", "--output", "report.html"]
    installed("mllm-vision", "report", *report, cwd=tmp_path)
    assert {"run", "two", "board.json", "report.html"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_the_installed_quickstart_finds_its_files(installed, tmp_path):
    """Every stage is called with a config that is there; the stages themselves are stood in for."""
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/usr/bin/env bash\necho "$@" >> calls.txt\n')
    fake.chmod(0o755)
    home = installed("python", "-c", "import mllm_vision; print(mllm_vision.__file__)", cwd=tmp_path).strip()
    script = Path(home).parent / "recipes" / "quickstart.sh"
    installed("env", f"PYTHON={fake}", "bash", script, "--ablations", cwd=tmp_path)
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    verbs = [line.split()[2] for line in calls if line.startswith("-m mllm_vision ")]
    assert {"language_model", "pretrain", "align", "instruct", "evaluate", "report"} == set(verbs)
    configs = [word for line in calls for word in line.split() if word.endswith(".yaml")]
    assert len(configs) == 8 and all(Path(config).is_file() for config in configs)
    assert (tmp_path / "runs" / "quickstart").is_dir()
