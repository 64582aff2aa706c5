"""Every YAML under recipes/configs is parsed against its recipe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from dry import dry_parse

ROOT = Path(__file__).resolve().parents[1]
PROTOCOLS = sorted((ROOT / "recipes" / "configs" / "cifar10_resnet18").glob("*.yaml"))
DATA = ["--dataset_name", "x", "--output_dir", "unused"]
CONFIGS = sorted((ROOT / "recipes" / "configs").rglob("*.y*ml"))


def recipe_of(path: Path) -> str:
    """The recipe that the first line of a config names."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    match = re.match(r"#\s*recipe:\s*(\w+\.py)\b", first)
    assert match, f"{path}: the first line must be `# recipe: <script>.py`, it is {first!r}"
    script = f"recipes/{match.group(1)}"
    assert (ROOT / script).is_file(), f"{path} names {script}, which is not there"
    return script


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "recipes" / "configs")))
def test_config_parses(path: Path) -> None:
    try:
        dry_parse(recipe_of(path), ["--config", str(path), "--output_dir", "unused"])
    except ValueError as error:
        # a config may leave the paths of this machine to the command line
        if not str(error).startswith("missing:"):
            raise


def test_an_image_text_method_brings_its_own_optimizer() -> None:
    words = ["--dataset_name", "x", "--output_dir", "unused", "--objective"]
    parsed = {name: dry_parse("recipes/pretrain.py", [*words, name]) for name in ("clip", "siglip", "itc")}
    assert "adam_beta2" not in parsed["clip"]  # the recipe's own
    assert (parsed["siglip"]["adam_beta2"], parsed["siglip"]["learning_rate"]) == (0.95, 1e-3)
    assert (parsed["itc"]["weight_decay"], parsed["itc"]["learning_rate"]) == (0.02, 1e-4)
    sgd = dry_parse("recipes/pretrain.py", [*words, "siglip", "--optim", "sgd", "--learning_rate", "0.1"])
    assert sgd["learning_rate"] == 0.1 and "adam_beta2" not in sgd


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.parent.name == "cifar10_resnet18"], ids=lambda p: p.stem
)
def test_a_published_protocol_names_its_source_and_keeps_its_schedule(path: Path) -> None:
    text, parsed = path.read_text(encoding="utf-8"), dry_parse(recipe_of(path), ["--config", str(path), *DATA])
    assert re.search(r"kNN \d\d\.\d %", text) and re.search(r"commit [0-9a-f]{40}|branch colab-notebook", text)
    assert (parsed["weight_decay_on"], parsed["lr_scheduler_kwargs"]) == ("all", {"by_epoch": True})
    assert parsed.get("zero_init_residual", False) is False  # their ResNets start as torchvision's default does


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    """The check above can fail: a mistyped key in a config names the nearest one."""
    config = tmp_path / "bad.yaml"
    config.write_text("# recipe: language_model.py\nlerning_rate: 1e-3\n")
    with pytest.raises(ValueError, match=r"unknown key 'lerning_rate'; the nearest known one is 'learning_rate'"):
        dry_parse("recipes/language_model.py", ["--config", str(config), "--text_files", "x.txt"])


def test_a_dataclass_check_is_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hidden_size=100 is not divisible"):
        dry_parse(
            "recipes/language_model.py", ["--text_files", "x.txt", "--hidden_size", "100", "--num_attention_heads", "3"]
        )
