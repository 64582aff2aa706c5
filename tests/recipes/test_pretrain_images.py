"""recipes/pretrain_images.py from its flags: what it leaves, whose defaults hold, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from dry import _load, dry_parse
from safetensors.torch import load_file
from transformers import AutoModel
from two_ranks import assert_same_run, torchrun

from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.hub.card import model_card

PREFIXES = {"teacher": "teacher.module.", "student": ""}
SMALL = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,patch_size=8"


@pytest.fixture(scope="module")
def recipe():
    return _load("recipes/pretrain_images.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    tiny.write_pairs_parquet(folder / "train.parquet", 48)
    tiny.write_pairs_parquet(folder / "test.parquet", 32)
    return folder


def flags(data, output, **changed):
    given = {
        "dataset_name": data / "train.parquet",
        "output_dir": output,
        "objective": "simclr",
        "encoder": "vit",
        "encoder_overrides": SMALL,
        "image_size": 32,
        "per_device_train_batch_size": 16,
        "max_steps": 4,
        "logging_steps": 2,
        "use_cpu": "true",
        "disable_tqdm": "true",
    } | changed
    words = []
    for name, value in given.items():
        words += [] if value is None else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def test_what_it_leaves(recipe, data, tmp_path):
    recipe.main(flags(data, tmp_path / "run", eval_dataset_name=data / "test.parquet", knn_k=5))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["kind"] == "stage_zero" and record["artifacts"][0]["name"] == "encoder"
    for name in ("knn", "probe"):
        entry = record["evaluations"][name]
        assert {"untrained", "most_frequent_class", "chance"} <= set(entry["baselines"]) and 0 <= entry["accuracy"] <= 1
    assert "effective_rank" in record["evaluations"]["geometry"]
    assert [len(entry["views"]) for entry in record["arrays"]["views"]] == [2] * 4  # for the report
    assert {row["group"]: row["moved"] for row in record["modules"]} == {"encoder": True, "head": True}
    assert any("eval_knn_accuracy" in entry for entry in record["history"])
    encoder = VisionEncoder.from_pretrained(tmp_path / "run" / "encoder")
    assert encoder.backbone.pooler is None and encoder.lineage["stage"] == "stage_zero"
    assert AutoModel.from_pretrained(tmp_path / "run" / "encoder").config.hidden_size == 32
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert saved["optim"] == "adamw_torch" and saved["head_out"] == 128
    assert (saved["learning_rate"], saved["base_learning_rate"]) == (None, 1.5e-4)  # what is scaled, and the result


@pytest.mark.parametrize("artifact", ["teacher", "student"])
def test_dino_saves_and_evaluates_whom_it_says(recipe, data, tmp_path, artifact):
    """The saved encoder is the teacher's unless asked otherwise; the recorded kNN is that of what was saved."""
    small = {"head_hidden": 16, "head_bottleneck": 8, "out_dim": 16, "local_views": 0, "learning_rate": 0.05}
    settings = {"momentum": 0.5, "save_strategy": "steps", "save_steps": 4, "warmup_steps": 0, "lr_scaling": "none"}
    test = {"eval_dataset_name": data / "test.parquet", "knn_k": 5, "evaluators": "knn", "artifact": artifact}
    words = flags(data, tmp_path / "run", objective="dino", **small, **settings, **test)
    recipe.main(words)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["artifact_is"] == f"the {artifact}'s encoder"
    state = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    saved = load_file(tmp_path / "run" / "encoder" / "model.safetensors")
    weights = {whose: state[f"{prefix}encoder.backbone.layernorm.weight"] for whose, prefix in PREFIXES.items()}
    assert not torch.equal(weights["teacher"], weights["student"])
    assert torch.equal(saved["layernorm.weight"], weights[artifact])
    card = model_card(tmp_path / "run" / "encoder")
    assert f"those of the {artifact}'s encoder" in card


def test_an_average_of_an_average_is_refused(recipe, data, tmp_path):
    with pytest.raises(ValueError, match="--artifact student"):
        recipe.main(flags(data, tmp_path, objective="dino", ema_decay=0.9, out_dim=16, head_hidden=16))


def test_supcon_learns_from_a_partly_labelled_set(recipe, data, tmp_path):
    """A row without a label is no bad row: its own other view is its positive."""
    from datasets import Dataset

    rows = Dataset.from_parquet(str(data / "train.parquet"), cache_dir=str(tmp_path))
    half = [label if place % 2 else None for place, label in enumerate(rows["label"])]
    rows.remove_columns("label").add_column("label", half).to_parquet(tmp_path / "half.parquet")
    recipe.main(flags(data, tmp_path / "run", objective="supcon", dataset_name=tmp_path / "half.parquet"))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["train"]["unlabelled"] == 24 and not record.get("bad_samples", {}).get("count")
    shares = [
        json.loads(line).get("labelled") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    shares = [share for share in shares if share is not None]
    assert shares and 0.2 < sum(shares) / len(shares) < 0.8


def test_a_stream_of_shards(recipe, data, tmp_path):
    """Shuffled shards in place of a table; labels as SupCon asks for them; measured with images of their own."""
    measured = {"eval_dataset_name": data / "test.parquet", "eval_train_dataset_name": data / "train.parquet"}
    given = {
        "streaming": "true",
        "shuffle_buffer": 16,
        "stream_lanes": 2,
        "objective": "supcon",
        "knn_k": 5,
        **measured,
    }
    recipe.main(flags(data, tmp_path / "run", **given, max_steps=None, num_train_epochs=2))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["train"]["rows"] == 48 and record["history"][-1]["step"] == 6  # two epochs of three steps
    assert "untrained" in record["evaluations"]["knn"]["baselines"]
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert saved["streaming"] is True and saved["shuffle_buffer"] == 16


def test_a_run_goes_on_only_as_what_it_was(recipe, data, tmp_path):
    """Another method or another head is refused; its weights, where no recipe.yaml says so, not loaded as far as names
    agree.
    """
    run = tmp_path / "run"
    recipe.main(flags(data, run, save_steps=2))
    began = (run / "recipe.yaml").read_text()
    for changed, told in (
        ({"objective": "byol", "head_hidden": 16}, r"have another size \(head.+recipe.yaml"),
        ({"head_out": 16}, r"5 of its weights have another size \(head.3.weight: \[128, 32\] there, \[16, 32\] here"),
        ({"objective": "supcon"}, r"3 weights are missing \(head.0.bias, head.2.+11 are unknown"),
    ):
        words = [*flags(data, run, max_steps=6, **changed), "--resume"]
        with pytest.raises(ValueError, match="--resume with another (objective|head_out): .*the run was started with"):
            recipe.main(words)
        assert (run / "recipe.yaml").read_text() == began
        (run / "recipe.yaml").unlink()
        with pytest.raises(ValueError, match=f"(?s)checkpoint.* does not fit this model: .*{told}"):
            recipe.main(words)
        (run / "recipe.yaml").write_text(began)
    recipe.main([*flags(data, run, max_steps=6), "--resume"])
    assert yaml.safe_load((run / "recipe.yaml").read_text())["max_steps"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["simclr", "dino", "moco_v2", "pcl"])
def test_two_ranks_train_as_one(recipe, data, tmp_path, name):
    """torchrun from the command line: two ranks of 8 give the losses and the weights of one rank of 16."""
    changed = {"objective": name, "logging_steps": 1, "lr_scaling": "none", "learning_rate": 1e-3, "max_steps": 6}
    if name in ("moco_v2", "pcl"):  # 45 rows are a pass of 22 and one of 23
        changed |= {"queue_size": 32, "max_train_samples": 45}
    if name == "pcl":
        changed |= {"num_clusters": [4, 7], "prototype_warmup_epochs": 1}
    if name == "dino":
        changed |= {"out_dim": 64, "local_size": 16}
    recipe.main(flags(data, tmp_path / "one", **changed))
    torchrun("recipes/pretrain_images.py", flags(data, tmp_path / "two", **changed, per_device_train_batch_size=8))
    assert_same_run(tmp_path / "one", tmp_path / "two", "encoder", 6)


def test_images_without_labels(recipe, data, tmp_path, caplog):
    """A folder of images is enough; supcon alone asks for labels."""
    folder = tmp_path / "images"
    folder.mkdir()
    for row in range(20):
        tiny.random_image(row, 40).save(folder / f"{row}.png")
    given = {"dataset_name": folder, "per_device_train_batch_size": 8, "max_steps": 4}
    with caplog.at_level("INFO"):
        recipe.main(flags(data, tmp_path / "run", **given, objective="byol", head_hidden=32))
    assert (tmp_path / "run" / "encoder" / "model.safetensors").is_file()
    said = json.loads((tmp_path / "run" / "run.json").read_text())["next"]
    assert said == f"mllm-vision evaluate --model {tmp_path / 'run' / 'encoder'} --task board --dataset_name IMAGES"
    teacher = json.loads((tmp_path / "run" / "run.json").read_text())["modules"][2]
    assert (teacher["group"], teacher["trainable"], teacher["follows"], teacher["moved"]) == ("teacher", 0, True, True)
    assert " follows" in caplog.text and "ten times" not in caplog.text
    with pytest.raises(ValueError, match=r"--objective supcon learns from labels.*--label_column"):
        recipe.main(flags(data, tmp_path / "supcon", **given, objective="supcon"))


def test_the_methods_defaults_give_way_to_flags_and_files(tmp_path):
    words = ["--dataset_name", "x", "--output_dir", "y", "--objective", "simclr"]
    target = "recipes/pretrain_images.py"
    assert dry_parse(target, words)["optim"] == "adamw_torch"
    words = ["--encoder", "resnet18", *words]
    assert dry_parse(target, words)["optim"] == "lars"
    config = tmp_path / "mine.yaml"
    config.write_text("optim: adamw_torch\nlearning_rate: 1e-3\n")
    parsed = dry_parse(target, [*words, "--config", str(config), "--learning_rate", "2e-3"])
    assert (parsed["optim"], parsed["learning_rate"], parsed.get("lr_scaling", "none")) == ("adamw_torch", 2e-3, "none")
    assert "optim_args" not in parsed  # LARS's, and gone with it
    twins = [*words[:-1], "barlow_twins"]
    assert "base_learning_rate" not in parsed
    assert dry_parse(target, words)["base_learning_rate"] == 0.3
    assert dry_parse(target, twins)["base_bias_learning_rate"] == 0.0048
    assert "base_bias_learning_rate" not in dry_parse(target, [*twins, "--optim", "sgd"])
    assert dry_parse(target, [*words[:-1], "mae"])["base_learning_rate"] == 1.5e-4


def test_a_head_far_larger_than_the_encoder_is_told(caplog):
    from mllm_vision.modules.audit import ModuleAudit

    sizes = {"encoder": 10, "head": 101, "predictor": 100, "teacher": 999}
    parts = {name: {"weight": torch.zeros(size, requires_grad=name != "teacher")} for name, size in sizes.items()}
    ModuleAudit(parts, dict.fromkeys(parts, 0.1)).warn_of_heavy("encoder")
    assert [record.args for record in caplog.records] == [("head", "encoder")]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"objective": "clip"}, "trains on image-text pairs: use recipes/pretrain.py"),
        ({"objective": "simcrl"}, "the nearest known one is 'simclr'"),
        ({"objective": "my_method:Mine"}, "No module named 'my_method'; PYTHONPATH=. finds it, if it is my_method.py"),
        ({"sync_batch_norm": "true"}, "vit has no BatchNorm; leave it out"),
        ({"objective": "dino", "local_size": 40}, "local_size=40 is more than the 32 px of the views"),
        ({"views": "mae"}, "--views mae makes 1 view of an image, and SimCLR compares 2; leave --views out"),
        ({"evaluators": "linear"}, "unknown evaluator 'linear'"),
        ({"objective": "moco_v2"}, "queue_size=65536 is more than the 48 images"),
        ({"per_device_train_batch_size": 64}, "48 rows, fewer than one batch of 64"),
        ({"load_best_model_at_end": "true", "save_strategy": "no", "eval_strategy": "no"}, "needs --eval_dataset_name"),
    ],
)
def test_what_it_refuses(recipe, data, tmp_path, changed, told):
    with pytest.raises(ValueError, match=told):
        recipe.main(flags(data, tmp_path / "run", **changed))


def test_a_folder_of_images_is_a_test_set(recipe, data, tmp_path):
    """Class folders, and no split named: recipe.yaml keeps that none was."""
    for row in range(8):
        path = tmp_path / "images" / ("cat", "dog")[row % 2] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tiny.random_image(row, 40).save(path)
    measured = {"eval_dataset_name": tmp_path / "images", "eval_train_dataset_name": tmp_path / "images"}
    recipe.main(
        flags(data, tmp_path / "run", **measured, max_steps=1, save_strategy="no", knn_k=1, final_evaluators="knn")
    )
    assert json.loads((tmp_path / "run" / "run.json").read_text())["evaluations"]["knn"]["accuracy"] == 1.0
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["eval_split"] is None


def test_a_misspelt_encoder_is_no_parent(recipe, data, tmp_path, caplog):
    with caplog.at_level("INFO"), pytest.raises(FileNotFoundError, match="the nearest known one is 'vit'"):
        recipe.main(flags(data, tmp_path / "run", encoder="vitt"))
    assert "inherits" not in caplog.text


def test_labels_are_needed_for_a_probe(recipe, data, tmp_path):
    """Of the test set, and of what the probe learns from: each message names its own way out."""
    folder = tmp_path / "images"
    folder.mkdir()
    for row in range(4):
        tiny.random_image(row, 40).save(folder / f"{row}.png")
    with pytest.raises(ValueError, match="labelled"):
        recipe.main(flags(data, tmp_path / "run", eval_dataset_name=folder, eval_split="train"))
    given = {"dataset_name": folder, "per_device_train_batch_size": 4, "eval_dataset_name": data / "test.parquet"}
    with pytest.raises(ValueError, match="the training set has none: name a labelled set, --eval_train_dataset_name"):
        recipe.main(flags(data, tmp_path / "bank", **given))
