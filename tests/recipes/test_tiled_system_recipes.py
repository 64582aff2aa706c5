"""LLaVA-NeXT, InternVL and Idefics2 from the command line, on images of many sizes: both stages, evaluation, reload,
cached features, exact resume."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from transformers import AutoModelForImageTextToText

from mllm_vision.encoder import VisionEncoder
from mllm_vision.hub.lineage import hash_weights
from mllm_vision.vlm import answer, load_vlm

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes" / "configs"
TOWERS = {"llava_next": "clip", "internvl": "dinov2", "idefics2": "siglip"}
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour?"}]}]


def recipe(name):
    spec = importlib.util.spec_from_file_location(f"tiled_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main


ALIGN, INSTRUCT = recipe("align"), recipe("instruct")


def write(path, rows, seed):
    """Captioned and questioned images of sizes between 10 and 100 pixels."""
    rng = np.random.default_rng(seed)
    found = {name: [] for name in ("image", "captions", "questions", "answers")}
    for row in range(rows):
        photo, colour, shape = tiny.labelled_image(row)
        photo = photo.resize(tuple(int(side) for side in rng.integers(10, 100, 2)))
        found["image"].append({"bytes": tiny.image_bytes(photo), "path": None})
        found["captions"].append([f"a {colour} {shape}"])
        found["questions"].append([f"what colour is the {shape}?", "what shape is there?"])
        found["answers"].append([colour, shape])
    text = List(Value("string"))
    kinds = Features({"image": ImageFeature(), "captions": text, "questions": text, "answers": text})
    Dataset.from_dict(found, features=kinds).to_parquet(str(path))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiled")
    torch.manual_seed(0)
    towers = {"clip": tiny.tiny_clip_vision, "dinov2": tiny.tiny_dinov2, "siglip": tiny.tiny_siglip_vision}
    for kind, tower in towers.items():
        VisionEncoder.from_backbone(tower(), tiny.tiny_image_processor(kind)).save_pretrained(folder / kind)
    tokenizer = tiny.tiny_tokenizer(folder / "llm")
    tiny.tiny_llama(len(tokenizer), max_position_embeddings=512).save_pretrained(folder / "llm")
    write(folder / "train.parquet", 60, 1)
    write(folder / "test.parquet", 20, 2)
    return folder


def flags(data, system, stage, output, *more, steps=4):
    words = ["--config", CONFIGS / system / f"tiny_{stage}.yaml", "--output_dir", output, "--max_steps", steps]
    words += ["--dataset_name", data / "train.parquet", "--eval_dataset_name", data / "test.parquet"]
    words += ["--per_device_train_batch_size", 4, "--logging_steps", 1, "--disable_tqdm", "true", "--use_cpu", "true"]
    return [str(word) for word in (*words, *more)]


def start(data, system):
    return ("--encoder", data / TOWERS[system], "--llm", data / "llm", "--sample_count", 1)


@pytest.mark.parametrize("system", TOWERS)
def test_both_stages(data, system, tmp_path):
    aligned, instructed = tmp_path / "align", tmp_path / "instruct"
    ALIGN(flags(data, system, "align", aligned, *start(data, system)))
    run = json.loads((aligned / "run.json").read_text())
    moved = {row["group"]: row["moved"] for row in run["modules"]}
    assert moved["connector"] and not any(value for group, value in moved.items() if group != "connector")
    more = ("--model", aligned / "model", "--max_new_tokens", 2, "--save_strategy", "steps", "--save_steps", 2)
    INSTRUCT(flags(data, system, "instruct", instructed, *more))
    assert "answers" in json.dumps(json.loads((instructed / "run.json").read_text())["evaluations"])

    task, processor = load_vlm(instructed / "model")
    photo = tiny.random_image(3, (90, 40))
    said = answer(task, processor, MESSAGES, [photo], max_new_tokens=3)
    assert isinstance(said, str)
    plain = AutoModelForImageTextToText.from_pretrained(instructed / "model").eval()
    inputs = processor(text="<image> a star", images=photo, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(plain(**inputs).logits, task.model(**inputs).logits)
    whole = hash_weights(instructed / "model")

    # the second half again, from its checkpoint
    again = ("--resume_from_checkpoint", instructed / "checkpoint-2")
    INSTRUCT(flags(data, system, "instruct", instructed, *more, *again))
    assert hash_weights(instructed / "model") == whole


@pytest.mark.parametrize("system", ["llava_next", "internvl"])
def test_cached_features_of_tiles_train_the_same_weights(data, system, tmp_path):
    ALIGN(flags(data, system, "align", tmp_path / "live", *start(data, system)))
    cache = ("--cache_features", "true", "--features_dir", tmp_path / "features")
    ALIGN(flags(data, system, "align", tmp_path / "cached", *start(data, system), *cache))
    live, cached = (load_vlm(tmp_path / name / "model")[0].state_dict() for name in ("live", "cached"))
    for name, value in live.items():
        assert torch.allclose(value, cached[name], atol=1e-6), name


def test_features_of_native_aspects_are_not_cached(data, tmp_path):
    cache = ("--cache_features", "true", "--features_dir", tmp_path / "features")
    with pytest.raises(ValueError, match="pads images of their own aspect"):
        ALIGN(flags(data, "idefics2", "align", tmp_path / "run", *start(data, "idefics2"), *cache))


def test_tiles_beyond_the_context_are_counted_before_training(data, tmp_path, caplog):
    short = ("--max_length", 60, "--max_bad_fraction", 0.9)
    with caplog.at_level(logging.WARNING):
        ALIGN(flags(data, "llava_next", "align", tmp_path / "run", *start(data, "llava_next"), *short))
    assert "conversations are refused" in caplog.text and "longer than max_length" in caplog.text
    with pytest.raises(ValueError, match=r"of 1 images and \d+ of text\).*let an image take fewer tiles"):
        ALIGN(flags(data, "llava_next", "align", tmp_path / "none", *start(data, "llava_next"), "--max_length", 60))
