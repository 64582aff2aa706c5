"""recipes/finetune.py: it learns labels, leaves native models, and refuses what cannot be learnt."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from transformers import AutoModelForImageClassification, pipeline

from mllm_vision.data import load_records
from mllm_vision.encoder import VisionEncoder
from mllm_vision.evaluation.labelled.classifier import save_classifier
from mllm_vision.objectives.classification import Classification
from recipes import finetune

SMALL = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,patch_size=8"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(tiny.write_pairs_parquet(tmp_path_factory.mktemp("data") / "pairs.parquet", n=64))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A short run from random weights, on the data it is tested on."""
    folder = tmp_path_factory.mktemp("finetune") / "run"
    flags = {
        "dataset_name": data, "eval_dataset_name": data, "encoder": "vit", "encoder_overrides": SMALL,
        "image_size": "32", "output_dir": str(folder), "max_steps": "60", "per_device_train_batch_size": "32",
        "learning_rate": "4e-3", "flip": "0", "crop_scale": ["0.9", "1.0"], "layer_decay": "0.9", "eval_strategy": "no",
        "save_strategy": "no", "logging_steps": "20", "use_cpu": "true", "disable_tqdm": "true",
    }  # fmt: skip
    words = [[f"--{name}", *([value] if isinstance(value, str) else value)] for name, value in flags.items()]
    finetune.main([word for flag in words for word in flag])
    return folder


def test_it_learns_and_leaves_native_models(run, data):
    record = json.loads((run / "run.json").read_text())
    entry = record["evaluations"]["test"]
    assert entry["accuracy"] > 3 / 16 and entry["baselines"]["chance"] == pytest.approx(1 / 16)
    assert entry["count"] == 64 and len(entry["details"]["tables"]["class"]) == 16
    assert [each["name"] for each in record["artifacts"]] == ["encoder", "classifier"]
    rows = load_records(data)
    said = pipeline("image-classification", model=str(run / "classifier"), top_k=1)(tiny.labelled_image(0)[0])
    assert said[0]["label"] in rows.features["label"].names
    # the saved pair is what was measured: its own accuracy, computed by transformers
    model = AutoModelForImageClassification.from_pretrained(run / "classifier").eval()
    encoder = VisionEncoder.from_pretrained(run / "encoder")
    pixels = encoder.processor([tiny.labelled_image(index)[0] for index in range(64)], return_tensors="pt")
    with torch.no_grad():
        guesses = model(**pixels).logits.argmax(1).tolist()
    right = sum(guess == label for guess, label in zip(guesses, rows["label"], strict=True))
    assert right / 64 == pytest.approx(entry["accuracy"], abs=1 / 64)


@pytest.mark.parametrize("build", [tiny.tiny_clip_vision, tiny.tiny_siglip_vision, tiny.tiny_dinov2])
def test_other_towers_keep_their_head_beside(build, tmp_path):
    kind = {"tiny_clip_vision": "clip", "tiny_siglip_vision": "siglip", "tiny_dinov2": "dinov2"}[build.__name__]
    encoder = VisionEncoder.from_backbone(build(), tiny.tiny_image_processor(kind))
    objective = Classification(encoder, Classification.Config(classes=3))
    assert save_classifier(encoder, objective.head, "abc", tmp_path / "c") is False
    assert json.loads((tmp_path / "c" / "head.json").read_text())["classes"] == ["a", "b", "c"]
    assert VisionEncoder.from_pretrained(tmp_path / "c").pooled_size == 32


def test_a_resnet_is_native_with_its_own_stem(tmp_path):
    from mllm_vision.encoder.build import build_backbone

    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}
    encoder = VisionEncoder.from_backbone(*build_backbone("resnet", image_size=32, **sizes)).eval()
    objective = Classification(encoder, Classification.Config(classes=2)).eval()
    assert save_classifier(encoder, objective.head, ["no", "yes"], tmp_path / "r") is True
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = objective.head(encoder(pixels, tokens=False).pooled)
        again = AutoModelForImageClassification.from_pretrained(tmp_path / "r").eval()(pixels).logits
    torch.testing.assert_close(again, expected)


def test_the_loss_is_cross_entropy_and_chance_is_ln_c():
    encoder = VisionEncoder.from_backbone(tiny.tiny_vit(), tiny.tiny_image_processor("vit"))
    objective = Classification(encoder, Classification.Config(classes=5, label_smoothing=0.2))
    views, labels = torch.randn(6, 1, 3, 32, 32), torch.tensor([0, 1, 2, 3, 4, 0])
    chances = objective.head(encoder(views[:, 0], tokens=False).pooled).softmax(-1)
    smooth = 0.8 * torch.eye(5)[labels] + 0.2 / 5  # the definition of label smoothing
    expected = -(smooth * chances.log()).sum(1).mean()
    torch.testing.assert_close(objective(views=views, labels=labels).loss, expected)
    with torch.no_grad():
        objective.head.weight.zero_()
    assert objective(views=views, labels=labels).loss.item() == pytest.approx(objective.chance_loss(6), rel=1e-5)


def test_what_cannot_be_learnt(data, tmp_path):
    needed = ["--encoder", "vit", "--encoder_overrides", SMALL, "--image_size", "32", "--use_cpu", "true"]
    needed += ["--output_dir", str(tmp_path / "run")]
    rows = load_records(data)
    rows.select_columns(["image"]).to_parquet(str(tmp_path / "bare.parquet"))
    with pytest.raises(ValueError, match="fine-tuning needs labels, and the data have none"):
        finetune.main([*needed, "--dataset_name", str(tmp_path / "bare.parquet")])
    with pytest.raises(ValueError, match="--classes 3: the training labels have 16 classes"):
        finetune.main([*needed, "--dataset_name", data, "--classes", "3"])
    odd = rows.select_columns(["image"]).add_column("label", [0.5, 1.5] * 32)
    odd.to_parquet(str(tmp_path / "odd.parquet"))
    with pytest.raises(ValueError, match="none of the 64 rows has a label .* row 0: the label is not an integer"):
        finetune.main([*needed, "--dataset_name", str(tmp_path / "odd.parquet")])
    for wrong, message in (
        ({"classes": 1}, "two classes or more"),
        ({"classes": 2, "label_smoothing": 1.0}, "must lie"),
    ):
        encoder = VisionEncoder.from_backbone(tiny.tiny_vit(), tiny.tiny_image_processor("vit"))
        with pytest.raises(ValueError, match=message):
            Classification(encoder, Classification.Config(**wrong))
