"""Every recipe and script from its flags: help, mistyped names, the print for bug reports."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_vision.training.recipe.flags import OBJECTIVES

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("pretrain", "pretrain_images", "finetune", "align", "instruct", "language_model")
SCRIPTS = ("evaluate", "report", "chat", "push_to_hub")


def load(path: str):
    spec = importlib.util.spec_from_file_location(f"flags_{Path(path).stem}", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipes():
    return {name: load(f"recipes/{name}.py") for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_help_of_recipes(recipes, name, capsys):
    with pytest.raises(SystemExit) as stop:
        recipes[name].main(["--help"])
    said = capsys.readouterr().out
    assert (
        stop.value.code == 0
        and len(said.splitlines()) <= 60
        and said.startswith(recipes[name].__doc__.strip().splitlines()[0])
    )
    for flag in (
        "config", "output_dir", "per_device_train_batch_size", "learning_rate", "num_train_epochs", "warmup_steps",
        "eval_strategy", "save_total_limit", "load_best_model_at_end", "metric_for_best_model", "report_to", "seed",
        "bf16", "max_steps", "push_to_hub", "hub_model_id", "resume_from_checkpoint", "overwrite", "resume",
        "max_bad_fraction",
    ):  # fmt: skip
        assert f"  --{flag}" in said, flag
    assert re.search(r"--report_to str or list of str .*\(default: none\)", said)
    if name != "language_model":
        assert "  --dataset_name " in said and ", --model_name_or_path " in said
    assert "     --" not in said.split("\n\n")[1].replace("\n        --", ""), "an example whose lines ran together"
    assert ("--embed_batch_size" in said) is (name in OBJECTIVES), said
    with pytest.raises(SystemExit):
        recipes[name].main(["--help", "all"])
    everything = capsys.readouterr().out
    assert (
        set(re.findall(r"--(\w+)", said)) <= {*re.findall(r"--(\w+)", everything), "help"}
        and "--adam_beta2 " in everything
    )
    for flag in ("remove_unused_columns", "do_train", *(["neftune_noise_alpha"] if name in OBJECTIVES else [])):
        assert f"--{flag} " not in everything, f"{flag} is refused, and offered"
    if name == "pretrain":  # the flags of the objective too, whichever it is
        assert "  --initial_logit_scale " in everything and "  --initial_logit_bias " not in everything
        with pytest.raises(SystemExit):
            recipes[name].main(["--help", "all", "--objective", "siglip"])
        assert "  --initial_logit_bias " in capsys.readouterr().out


HELP = """
import contextlib, runpy, sys
sys.argv = [{path!r}, "--help"]
with contextlib.suppress(SystemExit):
    runpy.run_path({path!r}, run_name="__main__")
heavy = {{"torch", "transformers", "datasets", "numpy"}} & sys.modules.keys()
sys.exit(f"imported: {{heavy}}" if heavy else 0)
"""


@pytest.mark.parametrize(
    "path", [*(f"recipes/{name}.py" for name in RECIPES), *(f"scripts/{name}.py" for name in SCRIPTS)]
)
def test_help_imports_nothing_heavy(path):
    """What makes it fast, whatever else the machine does."""
    done = subprocess.run([sys.executable, "-c", HELP.format(path=str(ROOT / path))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", RECIPES)
def test_the_next_command_exists(recipes, name, capsys):
    """Its verb is one of mllm-vision, and each flag one of that verb's."""
    from mllm_vision.cli import VERBS

    for command in filter(None, (getattr(recipes[name], word, None) for word in ("NEXT", "MEASURE"))):
        program, verb, *words = command.split()
        assert program == "mllm-vision" and "{artifact}" in words
        with pytest.raises(SystemExit):
            load(VERBS[verb].file).main(["--help"])
        said = capsys.readouterr().out
        assert all(f"  {word}" in said for word in words if word.startswith("--")), command


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_of_scripts(name, capsys):
    script = load(f"scripts/{name}.py")
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0 and script.__doc__.strip().splitlines()[0] in capsys.readouterr().out
    with pytest.raises(ValueError, match="unknown flag '--modle'|unknown flag '--rnus'"):
        script.main(["--rnus" if name == "report" else "--modle", "x"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_mistyped_flag_or_key_names_the_nearest(recipes, name, tmp_path, monkeypatch, capsys):
    from mllm_vision.training.recipe.parser import run_recipe

    config = tmp_path / "saved.yaml"
    config.write_text("max_stepps: 3\n", encoding="utf-8")
    needed = ["--output_dir", str(tmp_path / "run")]
    cases = (
        ([*needed, "--lerning_rate", "1"], "unknown flag '--lerning_rate'; the nearest known one is '--learning_rate'"),
        ([*needed, "--config", str(config)], "unknown key 'max_stepps'; the nearest known one is 'max_steps'"),
    )
    for argv, message in cases:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
        with pytest.raises(SystemExit) as stop:
            run_recipe(recipes[name].main)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.startswith("error: ") and message in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_env_tells_versions_and_no_secret(capsys, monkeypatch):
    import torch

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    load("scripts/env.py").main()
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["torch"] == torch.__version__.partition("+")[0] or said["torch"] == torch.__version__
    assert {"python", "transformers", "mllm_vision", "platform", "cpu_cores", "torchvision"} <= set(said)
    assert said["HF_TOKEN"] == "set" and "hf_secret" not in str(said)
