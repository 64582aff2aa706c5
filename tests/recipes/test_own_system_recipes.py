"""Qwen-VL, prismatic and Cambrian from the command line: both stages, evaluation, reload, exact resume."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from families import small
from transformers import AutoModelForImageTextToText, AutoProcessor

from mllm_vision.encoder import VisionEncoder
from mllm_vision.hub.lineage import hash_weights
from mllm_vision.vlm import answer, load_vlm

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes" / "configs"
SYSTEMS = ("qwen_vl", "prismatic", "cambrian")


def recipe(name):
    spec = importlib.util.spec_from_file_location(f"own_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main


ALIGN, INSTRUCT = recipe("align"), recipe("instruct")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Captions and questions, a SigLIP tower, two further towers, a language model."""
    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    siglip = VisionEncoder.from_backbone(tiny.tiny_siglip_vision(), tiny.tiny_image_processor("siglip"))
    siglip.save_pretrained(folder / "siglip")
    VisionEncoder.from_backbone(tiny.tiny_dinov2(), tiny.tiny_image_processor("dinov2")).save_pretrained(
        folder / "dino"
    )
    small("convnext", image_size=64).save_pretrained(folder / "convnext")
    tokenizer = tiny.tiny_tokenizer(folder / "llm")
    tiny.tiny_llama(len(tokenizer)).save_pretrained(folder / "llm")
    tiny.write_pairs_parquet(folder / "train.parquet", 60, captions_each=2)
    tiny.write_pairs_parquet(folder / "test.parquet", 20)
    return folder


def flags(data, system, stage, output, *more, steps=4):
    words = ["--config", CONFIGS / system / f"tiny_{stage}.yaml", "--output_dir", output, "--max_steps", steps]
    words += ["--dataset_name", data / "train.parquet", "--eval_dataset_name", data / "test.parquet"]
    words += ["--per_device_train_batch_size", 4, "--logging_steps", 1, "--disable_tqdm", "true", "--use_cpu", "true"]
    return [str(word) for word in (*words, *more)]


def parts(data, system):
    others = {"prismatic": [data / "dino"], "cambrian": [data / "dino", data / "convnext"]}.get(system)
    return ["--encoder", data / "siglip", "--llm", data / "llm", *(["--more_encoders", *others] if others else [])]


@pytest.mark.parametrize("system", SYSTEMS)
def test_both_stages(data, system, tmp_path):
    aligned = tmp_path / "align"
    ALIGN(flags(data, system, "align", aligned, *parts(data, system), "--sample_count", 1))
    run = json.loads((aligned / "run.json").read_text())
    moved = {row["group"]: row["moved"] for row in run["modules"]}
    assert moved["connector"] and not any(value for group, value in moved.items() if group != "connector")
    others = {"prismatic": 1, "cambrian": 2}.get(system, 0)
    assert [parent["role"] for parent in run["parents"]].count("encoder") == 1 + others
    instructed = tmp_path / "instruct"
    more = ("--model", aligned / "model", "--max_new_tokens", 2, "--save_strategy", "steps", "--save_steps", 2)
    INSTRUCT(flags(data, system, "instruct", instructed, *more))
    run = json.loads((instructed / "run.json").read_text())
    assert "answers" in json.dumps(run["evaluations"])

    task, processor = load_vlm(instructed / "model")
    plain = AutoModelForImageTextToText.from_pretrained(instructed / "model").eval()
    assert type(AutoProcessor.from_pretrained(instructed / "model")) is type(processor)
    image, messages = (
        tiny.random_image(3),
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}],
    )
    assert isinstance(answer(task, processor, messages, [image], max_new_tokens=3), str)
    inputs = processor(images=image, text="<image> a star", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(plain(**inputs).logits, task.model(**inputs).logits)
    whole = hash_weights(instructed / "model")

    # the second half again, from its checkpoint
    INSTRUCT(
        flags(data, system, "instruct", instructed, *more, "--resume_from_checkpoint", instructed / "checkpoint-2")
    )
    assert hash_weights(instructed / "model") == whole
