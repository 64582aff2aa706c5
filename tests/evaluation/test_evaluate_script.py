"""scripts/evaluate.py on saved tiny models: what it writes, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from mllm_vision.data import CHAT_TEMPLATES
from mllm_vision.encoder import VisionEncoder
from mllm_vision.report import flat_results, load_chain, render

ROOT = Path(__file__).resolve().parents[2]


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


evaluate = load_script("evaluate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saved tiny models and data: dual/, encoder/, vlm/, pairs.parquet."""
    from mllm_vision.encoder.dual import DualEncoder
    from mllm_vision.encoder.text.towers import build_text_tower
    from mllm_vision.vlm import build_vlm
    from mllm_vision.vlm.export import save_vlm

    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny.tiny_tokenizer(folder / "tokenizer")
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
    encoder.save_pretrained(folder / "encoder")
    model, processor = build_vlm(
        encoder, tiny.tiny_llama(len(tokenizer)), tokenizer=tokenizer, chat_template=CHAT_TEMPLATES["qa"]
    )
    save_vlm(model, processor, folder / "vlm")
    text, tokenizer = build_text_tower(
        "clip_text_model",
        tiny.tiny_tokenizer(folder / "tokenizer"),
        overrides={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        max_length=32,
    )
    DualEncoder(encoder, text, tokenizer, embed_dim=16).save_pretrained(folder / "dual")
    tiny.write_pairs_parquet(folder / "pairs.parquet", n=20, captions_each=2)
    return folder


def run(folder: Path, *words: str) -> dict:
    output = folder / "evaluation.json"
    output.unlink(missing_ok=True)
    evaluate.main([*words, "--output", str(output), "--dataset_name", str(folder / "pairs.parquet")])
    return json.loads(output.read_text())


def test_a_pair_in_one_process(folder, capsys) -> None:
    data = folder / "pairs.parquet"
    tasks = ["zero_shot", f"unseen/zero_shot={data}", "retrieval", "geometry", "maps"]
    options = ["--untrained", "--seed", "7", "--map_count", "2", "--templates", "a {}", "one {}", "--ks", "1", "5"]
    record = run(folder, "--model", str(folder / "dual"), "--task", *tasks, *options)
    assert record["kind"] == "evaluation" and record["model_kind"] == "dual" and len(record["weights_sha256"]) == 64
    assert list(record["evaluations"]) == ["zero_shot", "unseen/zero_shot", "retrieval", "geometry", "maps"]
    entry = record["evaluations"]["zero_shot"]
    assert entry["task"] == "zero_shot" and entry["baselines"]["chance"] == pytest.approx(1 / 16)
    assert 0 <= entry["baselines"]["untrained"] <= 1
    assert entry["accuracy"] == record["evaluations"]["unseen/zero_shot"]["accuracy"]
    spectrum = record["arrays"]["geometry/spectrum"]
    assert len(spectrum["values"]) == len(spectrum["untrained"]) == 20 and spectrum["values"] != spectrum["untrained"]
    maps = record["arrays"]["maps/maps"]
    assert len(maps) == 2 and [item["kind"] for item in maps[0]["items"]] == ["attention", "occlusion"]
    assert len(maps[0]["items"][1]["grid"]) == 4
    printed = capsys.readouterr().out
    assert "zero_shot" in printed and "chance 0.0625" in printed
    chain = load_chain([], [f"stage_zero={folder / 'evaluation.json'}"])
    results = flat_results(chain)
    wanted = {"zero_shot_accuracy", "zero_shot_accuracy_chance", "untrained_zero_shot_accuracy", "retrieval_r1"}
    wanted |= {"retrieval_r1_chance", "unseen_zero_shot_accuracy", "untrained_retrieval_r1", "effective_rank"}
    assert wanted <= {key.removeprefix("stage_zero/") for key in results}
    page = render(chain)
    for words in (
        "Similarity of images and texts",
        "Spectrum of the embeddings",
        "What it looks at",
        "Predicted class by true class",
    ):
        assert words in page


def test_a_vlm(folder) -> None:
    tasks = ["vqa", "maps", "geometry"]
    options = ["--max_new_tokens", "3", "--map_count", "1", "--no_image_baseline", "--max_samples", "6"]
    training = ["--training_dataset_name", str(folder / "pairs.parquet")]
    record = run(folder, "--model", str(folder / "vlm"), "--task", *tasks, *options, *training)
    entry = record["evaluations"]["vqa"]
    assert entry["count"] == 12 and {"majority", "majority_by_type", "no_image"} <= set(entry["baselines"])
    assert record["model_kind"] == "vlm" and record["evaluations"]["geometry"]["effective_rank"] > 0
    assert {row["name"] for row in entry["details"]["tables"]["question_type"]} == {"colour", "shape"}
    blind = run(folder, "--model", str(folder / "vlm"), "--task", "vqa", "--blind", "--max_samples", "6")
    assert 0 <= blind["evaluations"]["vqa"]["accuracy"] <= 1


def test_an_encoder(folder) -> None:
    record = run(folder, "--model", str(folder / "encoder"), "--untrained")
    assert record["task"] == ["geometry"] and record["evaluations"]["geometry"]["baselines"]["untrained"] > 0


def test_an_encoder_by_its_features(folder, tmp_path, capsys) -> None:
    """kNN, probe, board and attention with their baselines and images, in one call."""
    data = str(folder / "pairs.parquet")
    flags = ["--training_dataset_name", data, "--knn_k", "1", "3", "--probe_regularisation", "0.01", "--map_count", "2"]
    tasks = ["knn", "probe", "board", "attention", "near/knn"]
    words = ["--untrained", "--raw_pixels", "--images", str(tmp_path), "--max_samples", "12"]
    record = run(folder, "--model", str(folder / "encoder"), "--task", *tasks, *flags, *words)
    knn, probe, board = (record["evaluations"][name] for name in ("knn", "probe", "board"))
    assert knn["accuracy"] == 1.0 and knn["count"] == 12  # each image is its own neighbour
    assert set(knn["baselines"]) == {"chance", "most_frequent_class", "raw_pixels", "untrained"}
    assert knn["accuracy_k3"] == record["evaluations"]["near/knn"]["accuracy_k3"]
    assert probe["regularisation"] == 0.01 and "untrained" in probe["baselines"]
    assert board["view_alignment"] > 0 and set(record["arrays"]["board/deviations"]) == {"values", "untrained"}
    assert 0 < record["evaluations"]["attention"]["entropy"] <= 1
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["attention_heads.png", "attention_patches.png", "board.png"]
    assert sorted(Path(path).name for path in record["images"]) == written
    assert "raw_pixels" in capsys.readouterr().out
    with pytest.raises(ValueError, match="set --training_dataset_name"):
        run(folder, "--model", str(folder / "encoder"), "--task", "knn")
    blind = run(folder, "--model", str(folder / "vlm"), "--task", "knn", *flags[:5], "--max_samples", "12")
    assert blind["evaluations"]["knn"]["accuracy"] == 1.0  # of the tower inside


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "zero_shots"], "the nearest known one is 'zero_shot'"),
        (["--task", "vqa"], "--task vqa needs a vlm model; .* is a encoder"),
        (["--task", "geometry", "geometry"], "twice"),
        (["--caption_column", "nothing", "--task", "geometry"], "column 'nothing' .* does not exist"),
        (["--tasks", "vqa"], "the nearest known one is '--task'"),
    ],
)
def test_bad_flags(folder, words, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(folder, "--model", str(folder / "encoder"), *words)


def test_a_folder_of_images_is_a_test_set(folder, tmp_path, caplog) -> None:
    """It has one split, which `datasets` calls train: nobody has to know."""
    for number in range(6):
        path = tmp_path / "images" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tiny.random_image(number, 40).save(path)
    words = ["--model", str(folder / "encoder"), "--task", f"geometry={tmp_path / 'images'}"]
    record = run(folder, *words)
    assert record["datasets"]["geometry"]["rows"] == 6 and "its only split, 'train', is used" in caplog.text
    with pytest.raises(ValueError, match=r"no split .tset.*_split"):
        run(folder, *words, "--dataset_split", "tset")
    for part in ("train", "validation"):
        path = tmp_path / "two" / part / "cat" / "0.png"
        path.parent.mkdir(parents=True)
        tiny.random_image(0, 40).save(path)
    with pytest.raises(ValueError, match=r"it has 'train', 'validation': name one with --dataset_split"):
        run(folder, "--model", str(folder / "encoder"), "--task", f"geometry={tmp_path / 'two'}")


def test_missing_files(folder, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        run(tmp_path, "--model", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run(tmp_path, "--model", "./runs/nothing/here")
    with pytest.raises(ValueError, match="has no data"):
        evaluate.main(["--model", str(folder / "encoder"), "--task", "geometry"])


def test_help_is_quick() -> None:
    """Both scripts in fresh processes: no torch import before the flags are read."""
    for name in ("evaluate", "report"):
        began = time.monotonic()
        words = [sys.executable, "-X", "importtime", str(ROOT / "scripts" / f"{name}.py"), "--help"]
        done = subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, timeout=60)
        assert done.returncode == 0 and f"--{'task' if name == 'evaluate' else 'runs'}" in done.stdout
        assert "| torch" not in done.stderr and "transformers" not in done.stderr
        assert time.monotonic() - began < 10
