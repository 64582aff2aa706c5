"""Flags and YAML: what is read, what is refused, and that what is written reads back."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from mllm_vision.training.recipe.parser import build, parse_recipe, peek_recipe, read_recipe, recipe_dict, run_recipe


class Mode(enum.Enum):
    FAST = "fast"
    SLOW = "slow"


@dataclass
class Own:
    names: list[str] = field(metadata={"help": "What to read."})
    rate: float = 0.1
    steps: int = 3
    limit: int | None = None
    flag: bool = False
    maybe: bool | None = None
    kind: Literal["clip", "siglip"] = "clip"
    mode: Mode = Mode.FAST
    folder: Path = Path("x")
    sizes: dict = field(default_factory=dict)
    layers: list[int] = field(default_factory=lambda: [1])
    goal: str | list[str] | None = "none"


def one(*words: str) -> Own:
    return parse_recipe(Own, argv=["--names", "a", *words])[0]


def test_flags_are_read_as_their_types() -> None:
    own = one(
        "--rate", "1e-3", "--steps=-2", "--limit", "7", "--flag", "--kind", "siglip", "--mode", "slow",
        "--folder", "/tmp/y", "--sizes", "width=32,name=b", "--layers", "-1", "-2", "--goal", "wandb",
    )  # fmt: skip
    assert own == Own(
        ["a"],
        1e-3,
        -2,
        7,
        True,
        None,
        "siglip",
        Mode.SLOW,
        Path("/tmp/y"),
        {"width": 32, "name": "b"},
        [-1, -2],
        "wandb",
    )
    assert one("--rate", "-1e-3").rate == -1e-3 and one("--folder", "-x").folder == Path("-x")
    assert one("--layers", "-1", "-2", "--goal", "-a", "b").goal == ["-a", "b"]
    assert one("--sizes", '{"a": 1.5}').sizes == {"a": 1.5}
    assert one("--sizes", "depths=[2,2],stem=cifar").sizes == {"depths": [2, 2], "stem": "cifar"}
    assert one("--goal", "wandb", "tensorboard").goal == ["wandb", "tensorboard"]
    assert parse_recipe(Own, argv=["--names", "a", "b", "--steps", "4"])[0].names == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--flag"], True),
        (["--flag", "true"], True),
        (["--flag", "false"], False),
        (["--flag=False"], False),
        (["--no_flag"], False),
        (["--no-flag"], False),
        (["--flag", "--no_flag"], False),
    ],
)
def test_every_way_to_write_a_bool(words: list[str], expected: bool) -> None:
    assert one(*words).flag is expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--setps", "3"], "unknown flag '--setps'; the nearest known one is '--steps'"),
        (["--LAYERS", "3"], "the nearest known one is '--layers'"),
        (["--zzzz", "3"], "known are --config, --flag"),
        (["--rate", "fast"], "--rate: expected float, got 'fast'"),
        (["--steps", "1.5"], "--steps: expected int, got '1.5'"),
        (["--flag", "maybe"], "--flag: Truthy value expected: got maybe"),
        (["--kind", "clap"], "--kind: expected 'clip' or 'siglip', got 'clap'"),
        (["--mode", "x"], "--mode: expected one of 'fast', 'slow', got 'x'"),
        (["--layers", "1", "b"], "--layers: expected list of int, got '1 b'"),
        (["--sizes", "width"], "--sizes: expected mapping, got 'width'"),
        (["--rate"], "--rate: expected one argument"),
        (["--steps", "1", "2"], "unexpected argument '2'"),
        (["--steps", "1", "-x"], "unexpected argument '-x'"),
        (["stray"], "unexpected argument|expected"),
    ],
)
def test_what_is_refused(words: list[str], message: str) -> None:
    argv = words if words == ["stray"] else ["--names", "a", *words]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        parse_recipe(Own, argv=argv)


def test_a_missing_required_flag_is_named() -> None:
    with pytest.raises(ValueError, match=r"missing: --names"):
        parse_recipe(Own, argv=["--steps", "3"])


def test_two_classes_with_one_name_are_refused() -> None:
    @dataclass
    class Other:
        rate: float = 1.0

    with pytest.raises(ValueError, match="both Own and Other have a field 'rate'"):
        parse_recipe(Own, Other, argv=["--names", "a"])


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_yaml_is_saved_flags_and_the_command_line_wins(tmp_path: Path) -> None:
    config = write(
        tmp_path / "c.yaml", "names: [a, b]\nrate: 1e-4\nsteps: 9\nlimit: null\nflag: true\nmode: slow\ngoal: 'no'\n"
    )
    own = parse_recipe(Own, argv=["--steps", "5", "--config", config])[0]
    assert (own.names, own.rate, own.steps, own.flag, own.mode, own.goal) == (
        ["a", "b"],
        1e-4,
        5,
        True,
        Mode.SLOW,
        "no",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3\n", "c.yaml: unknown key 'stepz'; the nearest known one is 'steps'"),
        ("steps: 3.5\n", "c.yaml: steps: expected int, got 3.5"),
        ("steps: yes\n", "steps: expected int, got True"),
        ("rate: [1, 2]\n", "rate: expected float, got \\[1, 2\\]"),
        ("folder: 3\n", "folder: expected Path, got 3"),
        ("- a\n- b\n", "must hold `flag: value` lines, got list"),
        ("a: [\n", "is not valid YAML"),
    ],
)
def test_what_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_recipe(Own, argv=["--names", "a", "--config", write(tmp_path / "c.yaml", text)])


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--config .*nowhere\.yaml: no such file"):
        parse_recipe(Own, argv=["--config", str(tmp_path / "nowhere.yaml")])


def test_peek_sees_what_the_parse_will_see(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", "kind: siglip\n")
    assert peek_recipe("kind", "clip", argv=[]) == "clip"
    assert peek_recipe("kind", "clip", argv=["--config", config]) == "siglip"
    assert peek_recipe("kind", "clip", argv=["--kind=x", "--config", config]) == "x"


def test_another_name_of_a_flag(tmp_path: Path) -> None:
    @dataclass
    class Aliased:
        encoder: str = field(metadata={"aliases": ["model_name_or_path"]})

    for argv in (
        ["--model_name_or_path", "x"],
        ["--model-name-or-path=x"],
        ["--encoder", "y", "--model_name_or_path", "x"],
    ):
        assert parse_recipe(Aliased, argv=argv)[0].encoder == "x"
    config = write(tmp_path / "c.yaml", "model_name_or_path: x\n")
    (read,) = parse_recipe(Aliased, argv=["--config", config])
    assert read.encoder == "x" and recipe_dict(read) == {"encoder": "x"}
    assert parse_recipe(Aliased, argv=["--config", config, "--encoder", "y"])[0].encoder == "y"
    with pytest.raises(ValueError, match="the nearest known one is '--model_name_or_path'"):
        parse_recipe(Aliased, argv=["--model_name_or_pth", "x"])


class Outer:
    @dataclass
    class Config:
        own: int = 1


class Undecorated(Outer.Config):
    more: int = 2


class NothingNew(Outer.Config):
    pass


def test_fields_without_a_dataclass_are_refused() -> None:
    with pytest.raises(ValueError, match="Undecorated has fields and is not a dataclass; put @dataclass above"):
        parse_recipe(Undecorated, argv=[])
    assert parse_recipe(NothingNew, argv=["--own", "3"])[0].own == 3


def test_help_names_whose_the_flags_are(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_recipe(Outer.Config, argv=["--help"])
    assert re.search(r"\nOuter.Config:\n  --own int +\(default: 1\)", capsys.readouterr().out)


def test_help_lists_every_flag(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_recipe(Own, argv=["--help"], description="Reads names.")
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert "Reads names." in printed and re.search(r"--names list of str +What to read. \(required\)", printed)
    assert "  --limit int\n" in printed


def test_recipe_yaml_reproduces_the_recipe(tmp_path: Path) -> None:
    """Written, read back and written again: the same, for ours and for all of TrainingArguments."""
    from mllm_vision.training.recipe.arguments import RecipeArguments

    argv = [
        "--names", "a", "b", "--mode", "slow", "--sizes", "k=v", "--output_dir", str(tmp_path / "run"), "--use_cpu",
        "--learning_rate", "3e-4", "--lr_scheduler_type", "cosine_with_min_lr",
        "--lr_scheduler_kwargs", '{"min_lr": 1e-6}',
        "--eval_strategy", "steps", "--eval_steps", "5", "--push_to_hub", "--hub_token", "hf_secret",
        "--overwrite",
    ]  # fmt: skip
    own, arguments = parse_recipe(Own, RecipeArguments, argv=argv)
    arguments.seed = 7  # a recipe may settle a value after parsing
    written = recipe_dict(own, arguments)
    text = yaml.safe_dump(written)
    assert "hf_secret" not in text and "overwrite" not in written and "resume" not in written
    again = parse_recipe(Own, RecipeArguments, argv=["--config", write(tmp_path / "recipe.yaml", text)])
    assert recipe_dict(*again) == written
    assert again[0] == own
    assert again[1].seed == 7 and again[1].lr_scheduler_kwargs == {"min_lr": 1e-6} and again[1].overwrite is False
    assert written["mode"] == "slow" and written["report_to"] == "none" and written["dataloader_drop_last"] is True


def test_the_defaults_of_every_training_argument_survive(tmp_path: Path) -> None:
    from mllm_vision.training.recipe.arguments import RecipeArguments

    config = tmp_path / "all.yaml"
    given = recipe_dict(build(RecipeArguments, {"output_dir": str(tmp_path), "use_cpu": True}))
    config.write_text(yaml.safe_dump(given), encoding="utf-8")
    (read,) = read_recipe(RecipeArguments, argv=["--config", str(config)])
    assert {name: value for name, value in read.items() if value != given[name]} == {}


def test_user_errors_end_without_traceback(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError("image_size=225 is not divisible by patch_size=16; use 224 or 240")

    with pytest.raises(SystemExit) as stop:
        run_recipe(fail)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: image_size=225 is not divisible by patch_size=16; use 224 or 240\n"
    monkeypatch.setenv("MLLM_VISION_TRACEBACK", "1")
    with pytest.raises(ValueError, match="225"):
        run_recipe(fail)
    monkeypatch.delenv("MLLM_VISION_TRACEBACK")
    with pytest.raises(ZeroDivisionError):  # a bug of ours keeps its traceback
        run_recipe(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_dir": None}, "--output_dir is missing"),
        ({"overwrite": True, "resume": True}, "--overwrite and --resume are mutually exclusive"),
        ({"overwrite": True, "resume_from_checkpoint": "true"}, "give one of them"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction=1.5 is not between 0 and 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must not be negative"),
    ],
)
def test_arguments_out_of_range(settings: dict, message: str, tmp_path: Path) -> None:
    from mllm_vision.training.recipe.arguments import RecipeArguments

    with pytest.raises(ValueError, match=message):
        RecipeArguments(**{"output_dir": str(tmp_path), "use_cpu": True, **settings})


def test_resume_takes_true_or_a_path(tmp_path: Path) -> None:
    from mllm_vision.training.recipe.arguments import RecipeArguments

    assert RecipeArguments(output_dir=str(tmp_path), use_cpu=True, resume_from_checkpoint="true").resume is True
    assert RecipeArguments(output_dir=str(tmp_path), use_cpu=True, resume_from_checkpoint="false").resuming is False
    named = RecipeArguments(
        output_dir=str(tmp_path), use_cpu=True, resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    with pytest.raises(FileNotFoundError, match="checkpoint-3: no such folder"):
        named.checkpoint_to_resume()
    with pytest.raises(FileNotFoundError, match="contains no run to resume"):
        RecipeArguments(output_dir=str(tmp_path / "none"), use_cpu=True, resume=True).checkpoint_to_resume()
