"""recipes/pretrain.py from its flags: what it leaves, that it learns, reproduces, resumes, and refuses."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from datasets import Image
from pairs_for_tests import tokenizer
from safetensors.torch import load_file, save_file
from two_ranks import assert_same_run, torchrun

from mllm_vision.errors import IncompleteRun

ROOT = Path(__file__).resolve().parents[2]
SMALL = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"


@pytest.fixture(scope="module")
def pretrain():
    spec = importlib.util.spec_from_file_location("recipe_pretrain", ROOT / "recipes" / "pretrain.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    tiny.write_pairs_parquet(folder / "train.parquet", 64, captions_each=3)
    tiny.write_pairs_parquet(folder / "validation.parquet", 32, captions_each=2)
    tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def flags(data, output, **changed):
    given = {
        "dataset_name": data / "train.parquet",
        "tokenizer": data / "tokenizer",
        "output_dir": output,
        "encoder": "clip_vision_model",
        "encoder_overrides": f"{SMALL},patch_size=8",
        "image_size": 32,
        "text_overrides": SMALL,
        "max_text_length": 24,
        "per_device_train_batch_size": 16,
        "max_steps": 8,
        "warmup_steps": 2,
        "learning_rate": 2e-3,
        "logging_steps": 4,
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    given |= changed
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


def test_it_learns_and_leaves_everything(pretrain, data, tmp_path):
    evaluation = {
        "eval_dataset_name": data,
        "zero_shot_dataset_name": data / "validation.parquet",
        "templates": "a {}",
        "eval_steps": 150,
        "max_steps": 300,
        "learning_rate": 1e-3,
    }
    pretrain.main(flags(data, tmp_path / "run", **evaluation))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["kind"] == "stage_zero" and [a["name"] for a in run["artifacts"]] == ["encoder", "dual"]
    zero_shot, retrieval = run["evaluations"]["zero_shot"], run["evaluations"]["retrieval"]
    assert zero_shot["baselines"]["chance"] == pytest.approx(1 / 16)
    assert zero_shot["accuracy"] >= 0.7 > 0.3 > zero_shot["baselines"]["untrained"]
    assert {"r1", "r5", "r10"} <= set(retrieval) and retrieval["r1"] > retrieval["baselines"]["untrained"]
    assert "against untrained" in run["verdict"] and run["evaluations"]["geometry"]["baselines"] == {}
    assert {"retrieval/similarity", "geometry/spectrum"} <= set(run["arrays"])
    steps = {entry["step"] for entry in run["history"] if "eval_zero_shot_accuracy" in entry}
    assert steps == {150, 300}
    logged = [entry for entry in run["history"] if "loss" in entry]
    assert {"logit_scale", "positive_similarity"} <= set(logged[0]) and "samples_per_second" in logged[-1]
    assert [row["group"] for row in run["modules"]] == ["vision", "text", "head"]
    assert all(row["moved"] and row["trainable"] == row["parameters"] for row in run["modules"])

    from mllm_vision.encoder import DualEncoder, VisionEncoder

    dual = DualEncoder.from_pretrained(tmp_path / "run" / "dual")
    encoder = VisionEncoder.from_pretrained(tmp_path / "run" / "encoder")
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, dual.vision.backbone.state_dict()[name]), name
    image, colour, shape = tiny.labelled_image(5)
    names = [f"a {c} {s}" for c in tiny.COLOURS for s in tiny.SHAPES]
    best = dual.logits(dual.encode_images([image]), dual.encode_texts(names)).argmax()
    assert names[best] == f"a {colour} {shape}"


@pytest.mark.parametrize("objective", ["clip", "siglip"])
def test_saved_flags_reproduce_the_run_and_a_resumed_run_is_the_uninterrupted_one(pretrain, data, tmp_path, objective):
    changed = {"objective": objective, "encoder": f"{objective}_vision_model", "save_steps": 4}
    changed |= {"initial_logit_bias": -2.71} if objective == "siglip" else {}
    pretrain.main(flags(data, tmp_path / "one", **changed))
    recipe = yaml.safe_load((tmp_path / "one" / "recipe.yaml").read_text())
    assert recipe["objective"] == objective and recipe["encoder_overrides"]["hidden_size"] == 32
    pretrain.main(["--config", str(tmp_path / "one" / "recipe.yaml"), "--output_dir", str(tmp_path / "two")])
    one = load_file(tmp_path / "one" / "dual" / "model.safetensors")
    two = load_file(tmp_path / "two" / "dual" / "model.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    shutil.rmtree(tmp_path / "two" / "checkpoint-8")
    shutil.rmtree(tmp_path / "two" / "dual")
    words = ["--config", str(tmp_path / "one" / "recipe.yaml"), "--output_dir", str(tmp_path / "two"), "--resume"]
    pretrain.main(words)
    resumed = load_file(tmp_path / "two" / "dual" / "model.safetensors")
    assert all(torch.equal(one[name], resumed[name]) for name in one)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"gradient_accumulation_steps": 8}, "fewer than one batch of 128"),  # accumulated, all rows meet in one loss
        ({"embed_batch_size": 0}, "embed_batch_size=0 must be at least 1"),
        ({"tokenizer": None}, "needs --tokenizer"),
        ({"objective": "simclr2"}, "unknown objective"),
        ({"caption_column": "caption"}, "did you mean 'captions'"),
        ({"dataset_name": "/nowhere/pairs.parquet"}, "nowhere"),
        ({"per_device_train_batch_size": 128}, "fewer than one batch of 128"),
        ({"encoder_overrides": "hidden_sise=3"}, "hidden_size"),
        ({"image_size": 33}, "use 32 or 40"),
        ({"initial_logit_bias": -10}, "initial_logit_scale"),  # a flag of siglip, not of clip
        ({"encoder": "siglip_vision_model", "embed_dim": 16}, "leave embed_dim out"),
    ],
)
def test_refusals_before_training(pretrain, data, tmp_path, changed, words):
    with pytest.raises((ValueError, OSError)) as caught:
        pretrain.main(flags(data, tmp_path / "run", **changed))
    assert words in str(caught.value)
    assert not (tmp_path / "run" / "encoder").exists()


def test_a_refused_start_does_not_block_the_next(pretrain, data, tmp_path):
    with pytest.raises(ValueError, match="hidden_size"):
        pretrain.main(flags(data, tmp_path / "run", encoder_overrides="hidden_sise=3"))
    pretrain.main(flags(data, tmp_path / "run", max_steps=1))
    with pytest.raises(FileExistsError, match="--overwrite"):
        pretrain.main(flags(data, tmp_path / "run", max_steps=1))
    pretrain.main([*flags(data, tmp_path / "run", max_steps=2), "--overwrite"])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["history"][-1]["step"] == 2


def test_an_existing_encoder_and_a_text_model_of_transformers(pretrain, data, tmp_path):
    """Fine-tuning: both towers come from folders, both go on learning, and both are told as parents."""
    from mllm_vision.encoder import DualEncoder, VisionEncoder

    start = VisionEncoder.from_backbone(tiny.tiny_dinov2(), tiny.tiny_image_processor("dinov2"), select_layer=-1)
    start.save_pretrained(tmp_path / "encoder")
    tiny.tiny_llama(len(tokenizer())).save_pretrained(tmp_path / "llama")
    towers = {"encoder": None, "model_name_or_path": tmp_path / "encoder", "text_tower": tmp_path / "llama"}
    built = {"encoder_overrides": None, "text_overrides": None, "embed_dim": 24, "eval_dataset_name": data}
    pretrain.main(flags(data, tmp_path / "run", **towers, **built, max_steps=4))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [parent["role"] for parent in run["parents"]] == ["encoder", "text_tower", "tokenizer"]
    assert all(parent["weights_sha256"] for parent in run["parents"][:2])
    assert all(row["moved"] for row in run["modules"])
    assert set(run["evaluations"]["retrieval"]["baselines"]) == {"chance", "before_training"}

    dual = DualEncoder.from_pretrained(tmp_path / "run" / "dual")
    assert (dual.text.config.model_type, dual.embed_dim) == ("llama", 24)
    tuned = VisionEncoder.from_pretrained(tmp_path / "run" / "encoder")
    assert tuned.config.model_type == "dinov2" and tuned.select_layer == -1
    image = tiny.random_image(3)
    assert torch.equal(tuned.encode([image]), dual.vision.encode([image]))
    assert not torch.allclose(tuned.encode([image]), start.encode([image]), atol=1e-3)


def test_an_encoder_that_is_not_its_lineages_is_refused(pretrain, data, tmp_path):
    pretrain.main(flags(data, tmp_path / "first", max_steps=1))
    file = tmp_path / "first" / "encoder" / "model.safetensors"
    weights = load_file(file)
    save_file({name: value + 1 for name, value in weights.items()}, file, metadata={"format": "pt"})
    changed = {"encoder": file.parent, "encoder_overrides": None}
    with pytest.raises(ValueError, match=r"lineage says [0-9a-f]{64}, the files give [0-9a-f]{64}"):
        pretrain.main(flags(data, tmp_path / "second", **changed))


def test_the_best_checkpoint_is_saved_and_its_figures_told(pretrain, data, tmp_path):
    """By a criterion turned upside down the best checkpoint is the first one, not the last."""
    changed = {"zero_shot_dataset_name": data / "validation.parquet", "eval_steps": 60, "save_steps": 60}
    changed |= {"load_best_model_at_end": "true", "metric_for_best_model": "zero_shot_accuracy", "max_steps": 180}
    changed |= {"learning_rate": 1e-3, "save_total_limit": 3, "templates": "a {}"}
    pretrain.main(flags(data, tmp_path / "run", **changed, greater_is_better="false"))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    seen = [row["eval_zero_shot_accuracy"] for row in run["history"] if "eval_zero_shot_accuracy" in row]
    told = run["evaluations"]["zero_shot"]["accuracy"]
    assert told == min(seen) < seen[2] and len(seen) == 4
    state = json.loads((tmp_path / "run" / "checkpoint-180" / "trainer_state.json").read_text())
    best = load_file(Path(state["best_model_checkpoint"]) / "model.safetensors")
    saved = load_file(tmp_path / "run" / "dual" / "model.safetensors")
    assert torch.equal(saved["logit_scale"], best["dual.logit_scale"])
    for wrong, words in ((None, "zero_shot_accuracy"), ("zero_shot_acc", "eval_zero_shot_acc")):
        with pytest.raises(ValueError, match=words):
            more = {**changed, "metric_for_best_model": wrong, "max_steps": 60}
            pretrain.main(flags(data, tmp_path / f"wrong{wrong}", **more))


def test_bad_images_are_counted_up_to_the_limit(pretrain, data, tmp_path):
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(data / "train.parquet"), split="train", cache_dir=str(tmp_path))
    rows = rows.cast_column("image", Image(decode=False))
    broken = {3: b"no image", 17: rows[17]["image"]["bytes"][:60]}
    spoilt = rows.map(
        lambda row, index: {"image": {"bytes": broken.get(index, row["image"]["bytes"]), "path": None}},
        with_indices=True,
        features=rows.features,
    )
    spoilt.cast_column("image", Image()).to_parquet(str(tmp_path / "spoilt.parquet"))
    changed = {"dataset_name": tmp_path / "spoilt.parquet", "max_steps": 4}
    pretrain.main(flags(data, tmp_path / "run", **changed, max_bad_fraction=0.1))
    told = json.loads((tmp_path / "run" / "run.json").read_text())["bad_samples"]
    assert told["count"] == 2 and all("cannot be decoded" in example for example in told["examples"])
    with pytest.raises(ValueError, match=r"unusable .*max_bad_fraction=0.01"):
        pretrain.main(flags(data, tmp_path / "strict", **changed))
    assert not (tmp_path / "strict" / "encoder").exists()


def test_an_empty_data_set_is_refused(pretrain, data, tmp_path):
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(data / "train.parquet"), split="train", cache_dir=str(tmp_path))
    rows.select([]).to_parquet(str(tmp_path / "none.parquet"))
    with pytest.raises(ValueError, match=r"none\.parquet is empty"):
        pretrain.main(flags(data, tmp_path / "run", dataset_name=tmp_path / "none.parquet"))


def test_it_pushes_what_it_saved_when_asked_to(pretrain, data, tmp_path, monkeypatch, caplog):
    from mllm_vision.hub import push as hub

    signature, pushed = inspect.signature(hub.push_directory), []

    def push(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments  # a call that the real one would take
        pushed.append((Path(given["path"]).name, given["repo_id"], given["run"]["kind"], given["token"]))
        if "dual" in given["repo_id"]:
            raise ConnectionError("the Hub is away")

    monkeypatch.setattr(hub, "push_directory", push)
    monkeypatch.setattr(hub, "prepare_repository", lambda repo_id, **settings: repo_id)
    asked = {"push_to_hub": "true", "hub_model_id": "me/eyes", "hub_token": "hf_secret", "max_steps": 1}
    with pytest.raises(IncompleteRun, match="failed: push of dual to me/eyes-dual"):
        pretrain.main(flags(data, tmp_path / "run", **asked))
    assert pushed == [(n, r, "stage_zero", "hf_secret") for n, r in (("encoder", "me/eyes"), ("dual", "me/eyes-dual"))]
    assert "the Hub is away" in caplog.text and (tmp_path / "run" / "run.json").is_file()
    for file in (tmp_path / "run").rglob("*"):
        assert file.is_dir() or b"hf_secret" not in file.read_bytes(), file


def test_it_opens_no_network_connection(pretrain, data, tmp_path, no_network):
    pretrain.main(flags(data, tmp_path / "run", eval_dataset_name=data, max_steps=2, save_steps=1))
    changed = {"encoder": tmp_path / "run" / "encoder", "encoder_overrides": None, "max_steps": 1}
    pretrain.main(flags(data, tmp_path / "more", **changed))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["clip", "siglip"])
def test_two_ranks_train_as_one(pretrain, data, tmp_path, objective):
    """torchrun from the command line: two ranks of 8 give the losses and the weights of one rank of 16."""
    changed = {"objective": objective, "encoder": f"{objective}_vision_model", "logging_steps": 1}
    pretrain.main(flags(data, tmp_path / "one", **changed))
    words = flags(data, tmp_path / "two", **changed, per_device_train_batch_size=8, eval_dataset_name=data)
    told = torchrun("recipes/pretrain.py", words)
    assert_same_run(tmp_path / "one", tmp_path / "two", "dual", 8)
    assert "negatives per anchor: 15" in told
    assert f"{math.log(16):.4f}" in told or objective == "siglip"
