"""Systems from the command line: their small configs, stage one and stage two, evaluation, saving, reading back.

Those with tiles are in `test_tiled_system_recipes`, those without a native class in `test_own_system_recipes`.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch

from mllm_vision.vlm import list_systems, load_vlm

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes" / "configs"
TOWERS = {"llava": "clip", "llava15": "clip", "paligemma": "siglip", "blip2": "vit"}


def recipe(name: str):
    spec = importlib.util.spec_from_file_location(f"systems_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Untrained encoders of several kinds, a language model, images with captions and questions."""
    from mllm_vision.encoder import VisionEncoder

    folder = tmp_path_factory.mktemp("systems")
    makers = {"clip": tiny.tiny_clip_vision, "siglip": tiny.tiny_siglip_vision, "vit": tiny.tiny_vit}
    for kind, make in makers.items():
        VisionEncoder.from_backbone(make(), tiny.tiny_image_processor(kind)).save_pretrained(folder / kind)
    tokenizer = tiny.tiny_tokenizer(folder / "llm")
    tiny.tiny_llama(len(tokenizer), max_position_embeddings=512).save_pretrained(folder / "llm")
    tiny.write_pairs_parquet(folder / "train.parquet", 48, captions_each=2)
    tiny.write_pairs_parquet(folder / "validation.parquet", 16)
    return folder


def run(folder: Path, name: str, config: Path, output: Path, *more: object) -> dict:
    """A recipe with a config, in few steps."""
    words = ["--config", config, "--dataset_name", folder / "train.parquet", "--output_dir", output, "--max_steps", 4,
             "--eval_dataset_name", folder / "validation.parquet", "--disable_tqdm", "true", *more]  # fmt: skip
    recipe(name).main([str(word) for word in words])
    return json.loads((output / "run.json").read_text())


def parents(folder: Path, system: str) -> list[object]:
    """The flags of a new model of that system."""
    return ["--encoder", folder / TOWERS[system], "--llm", folder / "llm"]


def test_every_system_has_its_four_configs_and_a_test():
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*system*.py"))
    for system in list_systems():
        names = {path.name for path in (CONFIGS / system).iterdir()}
        assert names >= {"align.yaml", "instruct.yaml", "tiny_align.yaml", "tiny_instruct.yaml"}
        assert f'"{system}"' in tests


@pytest.mark.parametrize("system", TOWERS)
def test_both_stages_of_a_system(folder, tmp_path, system):
    configs = CONFIGS / system
    assert {"align.yaml", "instruct.yaml", "tiny_align.yaml", "tiny_instruct.yaml"} <= {
        p.name for p in configs.iterdir()
    }
    first = run(folder, "align", configs / "tiny_align.yaml", tmp_path / "one", *parents(folder, system))
    assert first["artifacts"] and not first.get("missing")
    moved = {row["group"]: row["moved"] for row in first["modules"]}
    assert moved["connector"] and all(row["moved"] == bool(row["trainable"]) for row in first["modules"])
    model = tmp_path / "one" / "model"
    second = run(folder, "instruct", configs / "tiny_instruct.yaml", tmp_path / "two", "--model", model,
                 "--max_new_tokens", 2)  # fmt: skip
    assert not second.get("missing") and all(row["moved"] == bool(row["trainable"]) for row in second["modules"])
    assert second["evaluations"]["answers"]["count"] > 0
    task, processor = load_vlm(tmp_path / "two" / "model")
    assert task.system.name == system
    assert json.loads((tmp_path / "two" / "model" / "lineage.json").read_text())["parents"]
    assert torch.isfinite(task.image_tokens(task.system.layout(task.model, processor).blank())).all()


@pytest.mark.slow
@pytest.mark.parametrize("system", TOWERS)
def test_a_resumed_run_is_the_uninterrupted_one(folder, tmp_path, system):
    more = [*parents(folder, system), "--save_strategy", "steps", "--save_steps", 2]
    config = CONFIGS / system / "tiny_align.yaml"
    whole = run(folder, "align", config, tmp_path / "whole", *more)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for gone in ("checkpoint-4", "model"):
        shutil.rmtree(tmp_path / "broken" / gone)
    (tmp_path / "broken" / "run.json").unlink()
    resumed = run(folder, "align", config, tmp_path / "broken", *more, "--resume")
    assert resumed["artifacts"][0]["weights_sha256"] == whole["artifacts"][0]["weights_sha256"]
