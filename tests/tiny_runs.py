"""Every recipe as a run of two steps on a few dozen rows: data, command lines, and how to read what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch

SMALL = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64"
ARTIFACTS = {
    "pretrain": ("encoder", "dual"),
    "pretrain_images": ("encoder",),
    "finetune": ("encoder", "classifier"),
    "align": ("model",),
    "instruct": ("model",),
    "language_model": ("model",),
}


def write_data(folder: Path) -> Path:
    """Pairs with labels and questions, a text, a tokenizer, an encoder, a language model, both joined."""
    from mllm_vision.data import CHAT_TEMPLATES
    from mllm_vision.encoder import VisionEncoder
    from mllm_vision.vlm import build_vlm, save_vlm

    tiny.write_pairs_parquet(folder / "train.parquet", 32, captions_each=2)
    tiny.write_pairs_parquet(folder / "test.parquet", 16)
    write_noise(folder / "noise_train.parquet", 48, 0)
    write_noise(folder / "noise_test.parquet", 48, 100)
    (folder / "corpus.txt").write_text("\n".join(tiny.tiny_sentences(200)), encoding="utf-8")
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
    encoder.save_pretrained(folder / "encoder")
    tokenizer = tiny.tiny_tokenizer(folder / "llm")
    tiny.tiny_llama(len(tokenizer)).save_pretrained(folder / "llm")
    torch.manual_seed(0)
    model, processor = build_vlm(encoder, str(folder / "llm"), chat_template=CHAT_TEMPLATES["qa"])
    save_vlm(model, processor, folder / "vlm")
    return folder


def write_noise(path: Path, count: int, seed: int) -> None:
    """Labelled noise of four classes that nothing tells apart well: any two encoders measure another accuracy."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    images = [{"bytes": tiny.image_bytes(tiny.random_image(seed + row, 16)), "path": None} for row in range(count)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list("abcd"))})
    rows = {"image": images, "label": [row % 4 for row in range(count)]}
    Dataset.from_dict(rows, features=features).to_parquet(str(path))


def words(recipe: str, data: Path, output: Path, **changed: Any) -> list[str]:
    """The command line of a short run; None leaves a flag out."""
    train, test = data / "train.parquet", data / "test.parquet"
    images = {"encoder": "vit", "encoder_overrides": f"{SMALL},patch_size=8", "image_size": 16}
    noise = {"dataset_name": data / "noise_train.parquet", "eval_dataset_name": data / "noise_test.parquet"}
    own: dict[str, dict[str, Any]] = {
        "pretrain": {
            "encoder": "clip_vision_model",
            "encoder_overrides": f"{SMALL},patch_size=8",
            "image_size": 16,
            "text_overrides": SMALL,
            "tokenizer": data / "llm",
            "max_text_length": 24,
            "zero_shot_dataset_name": test,
        },
        "pretrain_images": {**noise, **images, "knn_k": 3, "optim": "adamw_torch", "objective": "simclr"},
        "finetune": noise | images,
        "align": {"encoder": data / "encoder", "llm": data / "llm", "sample_count": 2},
        "instruct": {
            "model": data / "vlm",
            "chat_template": "qa",
            "max_new_tokens": 2,
            "train": ["connector", "language_model=lora"],
        },
        "language_model": {
            "text_files": data / "corpus.txt",
            "vocab_size": 400,
            "block_size": 16,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    }
    given: dict[str, Any] = {} if recipe == "language_model" else {"dataset_name": train, "eval_dataset_name": test}
    given |= own[recipe] | {
        "output_dir": output,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "warmup_steps": 0,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    given |= changed
    flags: list[str] = []
    for name, value in given.items():
        flags += [] if value is None else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags
