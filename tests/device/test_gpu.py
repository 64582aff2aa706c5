"""The recipes on real GPUs: bf16, fp16, one and two of them, DDP and FSDP2; the figures are in test_gpu_numbers.py.

    python -m pytest -m gpu tests/device

Left out unless asked for, and ready for the day a GPU is there. With `DEVICE_SUITE_ON_CPU=1` this file runs on the CPU
with the same flags, less what a CPU has not, which proves the commands themselves.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cases

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
ON_CPU = os.environ.get("DEVICE_SUITE_ON_CPU") == "1"
SMALL = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
TOWER = ["--encoder", "vit", "--encoder_overrides", f"{SMALL},patch_size=8", "--image_size", "32"]
HEADS = ["--head_hidden", "32", "--head_out", "16"]

RECIPES: dict[str, list[str]] = {
    "simclr": ["pretrain_images.py", "--objective", "simclr", *TOWER, *HEADS],
    "moco_v2": ["pretrain_images.py", "--objective", "moco_v2", "--encoder", "resnet", "--image_size", "32",
                "--queue_size", "20", "--encoder_overrides", "hidden_sizes=[16,32],depths=[1,1],embedding_size=16"],
    "dino": ["pretrain_images.py", "--objective", "dino", *TOWER, "--out_dim", "24", "--head_hidden", "32"],
    "dinov2": ["pretrain_images.py", "--objective", "dinov2", *TOWER, "--out_dim", "24", "--head_hidden", "32"],
    "barlow_twins": ["pretrain_images.py", "--objective", "barlow_twins", *TOWER, *HEADS],
    "in chunks": ["pretrain_images.py", "--objective", "simclr", *TOWER, *HEADS, "--embed_batch_size", "3"],
    "muon": ["pretrain_images.py", "--objective", "simclr", *TOWER, *HEADS, "--optim", "adamw_torch_fused",
             "--muon_learning_rate", "0.01"],
    "clip": ["pretrain.py", "--encoder", "clip_vision_model", "--encoder_overrides", f"{SMALL},patch_size=8",
             "--text_overrides", SMALL, "--image_size", "32", "--max_text_length", "24", "--tokenizer", "{llm}"],
    "itc": ["pretrain.py", "--objective", "itc", "--queue_size", "20", "--encoder", "clip_vision_model",
            "--encoder_overrides", f"{SMALL},patch_size=8", "--text_overrides", SMALL, "--image_size", "32",
            "--max_text_length", "24", "--tokenizer", "{llm}"],
    "align": ["align.py", "--encoder", "{encoder}", "--llm", "{llm}", "--max_eval_samples", "8"],
    "instruct": ["instruct.py", "--model", "{vlm}", "--chat_template", "qa", "--max_eval_samples", "8"],
    "instruct, lora": ["instruct.py", "--model", "{vlm}", "--chat_template", "qa", "--train", "encoder", "connector",
                       "language_model=lora", "--max_eval_samples", "8"],
}  # fmt: skip
# of every recipe one precision on one GPU and the other on two; sharded what is large in earnest
RUNS = [
    *((name, "--bf16", 1, []) for name in RECIPES),
    *((name, "--fp16", 2, []) for name in RECIPES),
    *((name, "--bf16", 2, ["--fsdp", "true"]) for name in ("clip", "align", "instruct") if not ON_CPU),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An encoder, a language model, the two joined, pairs and questions."""
    from mllm_vision.encoder import VisionEncoder
    from mllm_vision.vlm import save_vlm

    folder = tmp_path_factory.mktemp("gpu")
    torch.manual_seed(0)
    VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip")).save_pretrained(
        folder / "encoder"
    )
    tokenizer = tiny.tiny_tokenizer(folder / "llm")
    tiny.tiny_llama(len(tokenizer)).save_pretrained(folder / "llm")
    model, processor = cases._language_model()
    save_vlm(model, processor, folder / "vlm")
    tiny.write_pairs_parquet(folder / "train.parquet", 64, captions_each=2)
    tiny.write_pairs_parquet(folder / "validation.parquet", 16)
    return folder


def run(command: list[str], processes: int, output: Path | None = None) -> str:
    """What a script printed; the test fails with its last lines where it did."""
    launch = [sys.executable]
    if processes > 1:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *command], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}"
    return done.stdout


@pytest.mark.timeout(1000)
@pytest.mark.parametrize(("name", "precision", "gpus", "more"), RUNS, ids=lambda value: str(value).replace(" ", "_"))
def test_a_recipe_trains_measures_and_saves(folder, tmp_path, name, precision, gpus, more):
    if not ON_CPU:
        assert torch.cuda.device_count() >= gpus, f"this test needs {gpus} GPUs; -k '{name}-{precision}-1' takes one"
    script, *words = RECIPES[name]
    words = [word.format(**{key: folder / key for key in ("llm", "encoder", "vlm")}) for word in words]
    common = {"dataset_name": folder / "train.parquet", "output_dir": tmp_path / "run", "max_steps": 3}
    common |= {"per_device_train_batch_size": 8, "logging_steps": 1, "save_steps": 2, "disable_tqdm": "true"}
    if script != "pretrain_images.py":
        common["eval_dataset_name"] = folder / "validation.parquet"
    given = [part for key, value in common.items() for part in (f"--{key}", str(value))]
    device = ["--use_cpu", "true"] if ON_CPU else [precision, "true"]
    run([str(ROOT / "recipes" / script), *words, *given, *device, *more], gpus)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
    assert losses and all(math.isfinite(loss) for loss in losses)
    assert not record.get("missing") and record["artifacts"]


@pytest.mark.timeout(1000)
def test_a_saved_model_is_measured_and_asked_where_the_gpu_is(folder, tmp_path):
    device = ["--device", "cpu"] if ON_CPU else []
    image = tmp_path / "image.png"
    tiny.random_image(3).save(image)
    asked = ["--model", str(folder / "vlm"), "--image", str(image), "--question", "what is this?"]
    assert run([str(ROOT / "scripts" / "chat.py"), *asked, *device], 1) is not None
    output = tmp_path / "evaluation.json"
    measured = ["--model", str(folder / "encoder"), "--task", "board", "--dataset_name"]
    measured += [str(folder / "validation.parquet"), "--output", str(output)]
    for processes in (1, 2) if ON_CPU or torch.cuda.device_count() > 1 else (1,):
        run([str(ROOT / "scripts" / "evaluate.py"), *measured, *device], processes)
        assert json.loads(output.read_text())["evaluations"]
