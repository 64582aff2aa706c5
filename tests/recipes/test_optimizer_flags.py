"""recipes/pretrain.py from the command line with each flag of optimizer and schedule, for a few steps."""

from __future__ import annotations

import json
import logging
import runpy
import sys
from pathlib import Path

import pytest
import tiny
import torch
from pairs_for_tests import tokenizer
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SMALL = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"

LINES = {
    "adamw": "",
    "lars": "--optim lars --optim_args momentum=0.9,variant=simclr --learning_rate 1.2 --weight_decay 1e-6",
    "lars of barlow twins": "--optim lars --optim_args variant=barlow_twins --learning_rate 0.2 "
    "--bias_learning_rate 0.0048",
    "lamb": "--optim lamb --optim_args variant=paper --learning_rate 1e-2",
    "layer decay": "--layer_decay vision=0.85,text=0.75 --patch_embedding_lr_scale 0.2",
    "sgd with steps": "--optim sgd --optim_args momentum=0.9 --learning_rate 0.1 --lr_scheduler_type step "
    '--lr_scheduler_kwargs {"milestones":[0.5,0.75],"gamma":0.1}',
    "dino's": "--gradient_clipping per_parameter --max_grad_norm 0.3 --weight_decay 0.04 --weight_decay_end 0.4",
    "linear": "--lr_scaling linear --base_learning_rate 2e-3",
    "square root": "--lr_scaling sqrt --lr_scaling_batch_size 64 --base_learning_rate 2e-3",
    "average": "--ema_decay 0.9",
}


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, output: Path, line: str) -> dict:
    """The recipe as a program: its file run under the name `__main__` with this command line."""
    words = [
        "--dataset_name", folder / "train.parquet", "--tokenizer", folder / "tokenizer", "--output_dir", output,
        "--encoder_overrides", f"{SMALL},patch_size=8", "--image_size", "32", "--text_overrides", SMALL,
        "--max_text_length", "24", "--per_device_train_batch_size", "16", "--max_steps", "4", "--warmup_steps", "1",
        "--logging_steps", "1", "--save_steps", "4", "--use_cpu", "--disable_tqdm",
    ]  # fmt: skip
    rate = [] if "--base_learning_rate" in line else ["--learning_rate", "2e-3"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, words), *rate, *line.split()])
    runpy.run_path(str(ROOT / "recipes" / "pretrain.py"), run_name="__main__")
    return json.loads((output / "run.json").read_text())


def test_each_flag_trains_from_the_command_line(tmp_path, monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO)
    tiny.write_pairs_parquet(tmp_path / "train.parquet", 64, captions_each=3)
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    ends: dict[str, dict[str, torch.Tensor]] = {}
    runs = {}
    for name, line in LINES.items():
        output = tmp_path / name
        runs[name] = record = run(monkeypatch, tmp_path, output, line)
        losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
        assert len(losses) == 4 and all(loss == loss for loss in losses), name
        assert [row["group"] for row in record["modules"] if row["moved"]] == ["vision", "text", "head"], name
        end = load_file(output / "dual" / "model.safetensors")
        same = [other for other in ends if all(torch.equal(end[key], ends[other][key]) for key in end)]
        assert not same, f"{name} left what {same} left"
        ends[name] = end

    def logged(name: str) -> list[float]:
        return [entry["learning_rate"] for entry in runs[name]["history"] if "loss" in entry]

    assert logged("sgd with steps") == pytest.approx([0.0, 0.1, 0.01, 0.001])
    assert logged("linear") == pytest.approx([rate / 16 for rate in logged("adamw")])
    assert logged("square root") == pytest.approx([rate / 2 for rate in logged("adamw")])
    assert [row["learning_rate"] for row in runs["linear"]["modules"]] == pytest.approx([2e-3 / 16] * 3)
    assert "base_learning_rate 0.002 x 0.0625 = learning_rate 0.000125" in caplog.text
    # rates of the deepest layer and the patch embedding: 0.75^3 of the text's, 0.2 * 0.85^3 of the image's
    assert f"learning rates from {2e-3 * 0.2 * 0.85**3:.3g} to 0.002" in caplog.text
    # the artifact is the average, the checkpoint holds what the training goes on from: the weights without it
    average = load_file(tmp_path / "average" / "checkpoint-4" / "ema.safetensors")
    weights = load_file(tmp_path / "average" / "checkpoint-4" / "model.safetensors")
    plain = load_file(tmp_path / "adamw" / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(weights[key], plain[key]) for key in plain)
    encoder = load_file(tmp_path / "average" / "encoder" / "model.safetensors")
    for key, value in encoder.items():
        assert torch.equal(value, average[f"dual.vision.backbone.{key}"])
        assert not torch.equal(value, weights[f"dual.vision.backbone.{key}"])


def program(monkeypatch: pytest.MonkeyPatch, recipe: str, output: Path, line: str) -> dict:
    common = "--per_device_train_batch_size 8 --max_steps 3 --logging_steps 1 --save_strategy no --disable_tqdm"
    argv = [recipe, *common.split(), "--use_cpu", "--max_eval_samples", "4", "--output_dir", str(output), *line.split()]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(ROOT / "recipes" / recipe), run_name="__main__")
    return json.loads((output / "run.json").read_text())


def test_the_stages_after_it_take_them_too(tmp_path, monkeypatch, caplog) -> None:
    """Freezing is proven under the average; LoRA's names and those of the pair's parts are understood."""
    from mllm_vision.encoder import VisionEncoder

    caplog.set_level(logging.INFO)
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
    encoder.save_pretrained(tmp_path / "encoder")
    tiny.tiny_llama(len(tiny.tiny_tokenizer(tmp_path / "llm"))).save_pretrained(tmp_path / "llm")
    tiny.write_pairs_parquet(tmp_path / "train.parquet", 32)
    data = f"--dataset_name {tmp_path / 'train.parquet'}"
    parts = f"{data} --encoder {tmp_path / 'encoder'} --llm {tmp_path / 'llm'} --sample_count 1"
    first = program(
        monkeypatch, "align.py", tmp_path / "align",
        f"{parts} --optim lamb --base_learning_rate 0.1 --lr_scaling sqrt --lr_scaling_batch_size 32 --ema_decay 0.5",
    )  # fmt: skip
    assert {row["group"]: row["learning_rate"] for row in first["modules"] if row["moved"]} == {"connector": 0.05}
    second = f"{data} --model {tmp_path / 'align' / 'model'} --chat_template qa --learning_rate 1e-3"
    full = program(
        monkeypatch, "instruct.py", tmp_path / "full",
        f"{second} --train encoder connector language_model --layer_decay vision_tower=0.5,language_model=0.9 "
        "--gradient_clipping per_parameter --encoder_learning_rate 2e-4 --ema_decay 0.5",
    )  # fmt: skip
    assert all(row["moved"] for row in full["modules"])
    assert f"learning rates from {2e-4 * 0.5**3:.3g} to 0.001" in caplog.text
    lora = program(
        monkeypatch,
        "instruct.py",
        tmp_path / "lora",
        f"{second} --train connector language_model=lora --optim lars --layer_decay 0.9 --ema_decay 0.5",
    )
    assert [row["group"] for row in lora["modules"] if row["trainable"]] == ["connector", "language_model"]


def test_a_mistake_is_told_before_anything_is_read(tmp_path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, tmp_path, tmp_path / "out", "--optim lamp")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said == "error: unknown optim 'lamp'; the nearest known one is 'lamb'\n"
    assert not (tmp_path / "out").exists()
