"""Stages one and two through their recipes: what they learn, prove, refuse, resume and leave behind."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch

ROOT = Path(__file__).resolve().parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(f"stages_{Path(name).stem}", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


align, instruct, chat = script("recipes/align.py"), script("recipes/instruct.py"), script("scripts/chat.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained encoder, an untrained language model, images with captions, questions and conversations."""
    from mllm_vision.encoder import VisionEncoder

    folder = tmp_path_factory.mktemp("stages")
    torch.manual_seed(0)
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
    encoder.save_pretrained(folder / "encoder")
    tokenizer = tiny.tiny_tokenizer(folder / "llm")
    tiny.tiny_llama(len(tokenizer)).save_pretrained(folder / "llm")
    tiny.write_pairs_parquet(folder / "train.parquet", 160, captions_each=2)
    tiny.write_pairs_parquet(folder / "validation.parquet", 32)
    for style in ("messages", "llava"):
        tiny.write_conversations_jsonl(folder / f"{style}.jsonl", 40, style=style)
    return folder


def flags(folder, output, *more, data="train.parquet", steps=4):
    common = {
        "output_dir": output,
        "dataset_name": folder / data,
        "max_steps": steps,
        "per_device_train_batch_size": 16,
        "logging_steps": 2,
        "learning_rate": 5e-3,
        "save_strategy": "no",
    }
    words = [word for name, value in common.items() for word in (f"--{name}", str(value))]
    return [*words, "--disable_tqdm", "true", *map(str, more)]


def run_align(folder, output, *more, **options):
    align.main(flags(folder, output, "--encoder", folder / "encoder", "--llm", folder / "llm", *more, **options))
    return json.loads((Path(output) / "run.json").read_text())


def run_instruct(folder, output, *more, model=None, **options):
    model = model or folder / "aligned" / "model"
    instruct.main(flags(folder, output, "--model", model, "--chat_template", "qa", *more, **options))
    return json.loads((Path(output) / "run.json").read_text())


@pytest.fixture(scope="module")
def aligned(folder):
    more = ("--learning_rate", "1e-2", "--eval_dataset_name", folder / "validation.parquet")
    return run_align(folder, folder / "aligned", *more, steps=40)


@pytest.fixture(scope="module")
def instructed(folder, aligned):
    more = ("--eval_dataset_name", folder / "validation.parquet", "--connector_learning_rate", "4e-3")
    return run_instruct(folder, folder / "instructed", *more, steps=80)


def test_stage_one_moves_the_projector_only_and_learns(folder, aligned):
    moved = {row["group"]: row["moved"] for row in aligned["modules"]}
    assert moved == {"encoder": False, "connector": True, "language_model": False}
    assert all((row["sha256_before"] != row["sha256_after"]) == row["moved"] for row in aligned["modules"])
    assert {row["group"]: bool(row["trainable"]) for row in aligned["modules"]} == moved
    captions = aligned["evaluations"]["captions"]
    assert captions["loss"] < captions["baselines"]["untrained"]
    assert captions["loss"] < captions["baselines"]["shuffled"]
    assert {"no_image", "shuffled", "untrained"} <= set(captions["baselines"])
    assert len(aligned["samples"]) == 8
    captioning = aligned["evaluations"]["captioning"]
    assert captioning["count"] == 32 and captioning["cider"] > captioning["baselines"]["shuffled"]
    assert captions["perplexity"] == pytest.approx(math.exp(captions["loss"]))
    for sample in aligned["samples"]:
        assert sample["image"].startswith("data:image") and sample["answer"] and isinstance(sample["prediction"], str)
    assert "<image>×16«" in aligned["label_preview"] and aligned["label_preview"].endswith("</s>»")
    assert [parent["role"] for parent in aligned["parents"]] == ["encoder", "language_model"]
    assert aligned["data"]["train"]["rows"] == 160 and aligned["data"]["validation"]["rows"] == 32
    assert (folder / "aligned" / "model" / "lineage.json").is_file()


def test_stage_two_answers_from_the_image(folder, instructed):
    """The colour is in the image, and no constant and no blind guess reaches it."""
    answers = instructed["evaluations"]["answers"]
    assert answers["accuracy_colour"] > 0.8
    assert answers["accuracy"] > answers["baselines"]["majority"] + 0.3
    said = instructed["evaluations"]["conversations"]
    assert said["loss"] < min(said["baselines"].values())
    moved = {row["group"]: row["moved"] for row in instructed["modules"]}
    assert moved == {"encoder": False, "connector": True, "language_model": True}
    rates = {row["group"]: row["learning_rate"] for row in instructed["modules"]}
    assert rates == {"encoder": 0.0, "connector": 4e-3, "language_model": 5e-3}
    assert any(sample.get("correct") for sample in instructed["samples"])


def test_blind_run_stays_with_the_majority(folder, aligned):
    from mllm_vision.vlm import load_vlm

    record = run_instruct(
        folder, folder / "blind", "--blind", "--eval_dataset_name", folder / "validation.parquet", steps=60
    )
    said = record["evaluations"]["conversations"]
    assert said["loss"] == pytest.approx(said["baselines"]["shuffled"], abs=1e-6)
    assert record["evaluations"]["answers"]["accuracy_colour"] <= 0.4
    assert load_vlm(folder / "blind" / "model")[0].blind


def test_chat_template_travels_with_the_model(folder, instructed):
    from transformers import AutoProcessor, AutoTokenizer

    from mllm_vision.data import CHAT_TEMPLATES

    model = folder / "instructed" / "model"
    processor = AutoProcessor.from_pretrained(model)
    assert processor.chat_template == CHAT_TEMPLATES["qa"] == AutoTokenizer.from_pretrained(model).chat_template
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "why?"}]}]
    text = processor.apply_chat_template(question, add_generation_prompt=True)
    assert text.endswith("answer:") and text.count("<image>") == 1


@pytest.mark.parametrize("template", ["qa", "vicuna", "plain"])
def test_prompt_is_how_training_sequences_begin(folder, aligned, template):
    """What is generated from must be, token by token, what was trained on, or the model is asked something new."""
    from mllm_vision.vlm import load_vlm
    from mllm_vision.vlm.conversation import load_stage_data, set_chat_template

    model, processor = load_vlm(folder / "aligned" / "model")
    set_chat_template(processor, template)
    roles = ("image", "caption") if template == "plain" else None
    data = load_stage_data(
        model, processor, str(folder / "train.parquet"), roles=roles, shuffle_turns=False, max_rows=40
    )
    row = data.train[0]
    said = [] if template == "plain" else [{"type": "text", "text": data.train_records[0]["questions"][0]}]
    messages = [{"role": "user", "content": [{"type": "image"}, *said]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    prompt = processor(text=text, images=tiny.random_image(), add_special_tokens=False)["input_ids"][0]
    first = int((torch.as_tensor(row["labels"]) != -100).nonzero()[0])
    assert list(prompt) == list(row["input_ids"][:first])


@pytest.mark.parametrize("train", ["language_model", "language_model=lora"])
def test_resumed_run_equals_an_uninterrupted_one(folder, aligned, tmp_path, train):
    more = ("--train", "connector", train, "--lora_dropout", "0.1", "--save_strategy", "steps", "--save_steps", "3")
    whole = run_instruct(folder, tmp_path / "whole", *more, steps=6)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for gone in ("checkpoint-6", "model"):
        shutil.rmtree(tmp_path / "broken" / gone)
    (tmp_path / "broken" / "run.json").unlink()
    resumed = run_instruct(folder, tmp_path / "broken", *more, "--resume", steps=6)
    assert resumed["artifacts"][0]["weights_sha256"] == whole["artifacts"][0]["weights_sha256"]
    assert [row["sha256_after"] for row in resumed["modules"]] == [row["sha256_after"] for row in whole["modules"]]
    if train.endswith("lora"):
        moved = {row["group"]: row["moved"] for row in whole["modules"]}
        assert moved == {"encoder": False, "connector": True, "language_model": True}
        assert (tmp_path / "whole" / "model" / "adapter" / "adapter_model.safetensors").is_file()


def test_accumulated_batches_are_the_whole_batch(folder, aligned, tmp_path):
    """Rows differ in supervised tokens, so a mean of means would train another model."""
    from safetensors.torch import load_file

    run_instruct(folder, tmp_path / "whole", steps=3)
    halves = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4")
    run_instruct(folder, tmp_path / "parts", *halves, steps=3)
    whole, parts = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    for name, tensor in whole.items():
        assert torch.allclose(tensor, parts[name], atol=2e-4), name


def test_encoder_learns_when_asked_to_and_projector_alone_too(folder, aligned, tmp_path):
    record = run_instruct(folder, tmp_path / "a", "--train", "encoder", "connector", "--encoder_learning_rate", "1e-4")
    assert {row["group"]: row["moved"] for row in record["modules"]} == {
        "encoder": True,
        "connector": True,
        "language_model": False,
    }
    record = run_instruct(folder, tmp_path / "b", "--train", "encoder", "connector", "language_model=lora")
    assert all(row["moved"] for row in record["modules"])


@pytest.mark.parametrize("style", ["messages", "llava"])
def test_conversation_files_are_read(folder, aligned, tmp_path, style):
    record = run_instruct(folder, tmp_path / style, data=f"{style}.jsonl", steps=2)
    assert "«" in record["label_preview"] and record["evaluations"]["conversations"]["loss"] > 0
    assert "answers" not in record["evaluations"]


def test_conversations_without_a_image_train_too(folder, aligned, tmp_path):
    lines = (folder / "messages.jsonl").read_text().splitlines()[:4]
    with (tmp_path / "mixed.jsonl").open("w") as stream:
        for index in range(40):
            if index % 10 == 0:
                stream.write(lines[index // 10] + "\n")
                continue
            said = [{"role": "user", "content": [{"type": "text", "text": "what colour is the star?"}]}]
            said.append({"role": "assistant", "content": [{"type": "text", "text": "blue"}]})
            stream.write(json.dumps({"image": None, "messages": said}) + "\n")
    options = ("--dataset_name", tmp_path / "mixed.jsonl", "--per_device_train_batch_size", "2")
    record = run_instruct(folder, tmp_path / "run", *options, "--train", "connector", steps=12)
    assert record["bad_samples"]["count"] == 0
    assert {row["group"]: row["moved"] for row in record["modules"]}["connector"]


def test_failed_proof_is_an_error_after_saving(folder, tmp_path):
    with pytest.raises(ValueError, match=r"freeze audit does not hold: connector: .* did not move"):
        run_align(folder, tmp_path / "still", "--learning_rate", "0", steps=2)
    assert (tmp_path / "still" / "model" / "config.json").is_file()
    record = json.loads((tmp_path / "still" / "run.json").read_text())
    assert record["freeze_problems"] and not any(row["moved"] for row in record["modules"])


def test_parent_that_was_changed_is_refused(folder, aligned, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder / "aligned" / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lineage says [0-9a-f]{64}, the files give [0-9a-f]{64}"):
        run_instruct(folder, tmp_path / "run", model=tmp_path / "model")


@pytest.mark.parametrize("role", ["encoder", "llm"])
def test_changed_parents_of_stage_one_are_refused(folder, aligned, tmp_path, role):

    from mllm_vision.hub.lineage import write_lineage

    shutil.copytree(folder / role, tmp_path / role)
    write_lineage(tmp_path / role, {"kind": role, "weights_sha256": "0" * 64})
    with pytest.raises(ValueError, match=r"lineage says 0{64}, the files give [0-9a-f]{64}"):
        run_align(folder, tmp_path / "run", f"--{role}", tmp_path / role)
    assert not (tmp_path / "run" / "model").exists()


def test_an_empty_data_set_is_refused(folder, aligned, tmp_path):
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(folder / "train.parquet"), split="train", cache_dir=str(tmp_path))
    rows.select([]).to_parquet(str(tmp_path / "none.parquet"))
    for run in (run_align, run_instruct):
        with pytest.raises(ValueError, match=r"none\.parquet is empty"):
            run(folder, tmp_path / "run", "--dataset_name", tmp_path / "none.parquet")


def test_the_figures_told_are_those_of_the_checkpoint_that_is_saved(folder, aligned, tmp_path):
    """By a criterion turned upside down the best checkpoint is the first one, not the last."""
    best = ("--load_best_model_at_end", "--metric_for_best_model", "captions_loss", "--eval_strategy", "steps")
    every = ("--eval_steps", "4", "--save_strategy", "steps", "--save_steps", "4", "--greater_is_better", "true")
    record = run_align(folder, tmp_path / "run", *best, *every, steps=12)
    seen = [row["eval_captions_loss"] for row in record["history"] if "eval_captions_loss" in row]
    assert seen[0] > seen[1] > seen[2]
    assert record["evaluations"]["captions"]["loss"] == pytest.approx(seen[0], rel=1e-5)
    with pytest.raises(ValueError, match=r"'loss' is not measured by any evaluator; use e\.g\. captions_loss"):
        run_align(folder, tmp_path / "wrong", "--load_best_model_at_end", *best[3:], *every)


def test_stages_open_no_network_connection(folder, tmp_path, no_network):
    run_align(folder, tmp_path / "one", steps=2)
    run_instruct(
        folder,
        tmp_path / "two",
        "--train",
        "connector",
        "language_model=lora",
        model=tmp_path / "one" / "model",
        steps=2,
    )
    run_instruct(folder, tmp_path / "three", model=tmp_path / "two" / "model", data="llava.jsonl", steps=2)


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        (("--chat_template", "vicunja"), ValueError, "unknown chat template 'vicunja'.*'vicuna'.*nor is it a file"),
        (("--max_length", "4096"), ValueError, "max_length=4096 is beyond the language model's limit of 256"),
        (("--max_length", "16"), ValueError, "max_length=16 leaves no room"),
        (("--max_eval_samples", "1"), ValueError, "eval_rows=1 must be at least 2"),
        (("--dataset_name", "no/such/file.parquet"), FileNotFoundError, "does not exist"),
        (("--caption_column", "captain"), ValueError, "'captain'.*does not exist; did you mean 'captions'"),
        (("--system", "lava"), ValueError, "unknown system 'lava'; the nearest known one is 'llava'"),
        (("--sistem", "llava"), ValueError, "unknown flag '--sistem'; the nearest known one is '--system'"),
    ],
)
def test_bad_input_is_named_before_training(folder, tmp_path, more, kind, message):
    with pytest.raises(kind, match=message):
        run_align(folder, tmp_path / "run", *more)


def test_template_file_without_marks_is_refused(tmp_path):
    from mllm_vision.vlm.conversation import chat_template

    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(ValueError, match=r"plain\.jinja has no \{% generation %\}"):
        chat_template(str(tmp_path / "plain.jinja"))


def test_finished_folder_is_refused(folder, aligned):
    with pytest.raises(FileExistsError, match=r"--overwrite .* --resume"):
        run_align(folder, folder / "aligned")


def test_chat_answers_once_and_in_a_dialogue(folder, instructed, capsys, monkeypatch):
    model, image = str(folder / "instructed" / "model"), str(folder / "images" / "0002.png")
    question = "what colour is the circle?"
    chat.main(["--model", model, "--image", image, "--question", question])
    assert capsys.readouterr().out.strip() == "blue"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{question}\nwhat shape is there?\n\nnever asked\n"))
    chat.main(["--model", model, "--image", image])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0] == "blue"


@pytest.mark.parametrize(
    ("model", "image", "message"),
    [
        ("instructed/model", "images/none.png", r"--image .*none\.png: no such file"),
        ("encoder", "images/0000.png", "'clip_vision_model' model, not a vision-language model"),
        ("nowhere", "images/0000.png", "no such folder"),
        ("instructed/model", "train.parquet", "image"),
    ],
)
def test_chat_says_what_is_missing(folder, instructed, model, image, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        chat.main(["--model", str(folder / model), "--image", str(folder / image), "--question", "what?"])


def weights(record):
    return record["artifacts"][0]["weights_sha256"]


def test_cached_features_train_the_same_weights_and_resume(folder, tmp_path):
    """`--cache_features`: from images, from features computed now, and from those of an earlier run."""
    plain = run_align(folder, tmp_path / "plain", "--seed", "3", steps=6)
    more = ("--seed", "3", "--cache_features", "--features_dir", tmp_path / "features")
    saved = ("--save_strategy", "steps", "--save_steps", "3")
    first = run_align(folder, tmp_path / "first", *more, *saved, steps=6)
    assert weights(first) == weights(plain)
    assert first["label_preview"] == plain["label_preview"]
    assert first["evaluations"]["captions"] == plain["evaluations"]["captions"]
    assert len(list((tmp_path / "features").glob("*.features"))) == 1

    shutil.rmtree(tmp_path / "first" / "checkpoint-6")
    shutil.rmtree(tmp_path / "first" / "model")
    (tmp_path / "first" / "run.json").unlink()
    resumed = run_align(folder, tmp_path / "first", *more, *saved, "--resume", steps=6)
    assert weights(resumed) == weights(plain)
    assert len(list((tmp_path / "features").glob("*.features"))) == 1  # nothing was computed again


@pytest.mark.parametrize("more", [(), ("--pack_turns",), ("--packing", "--max_length", "120")])
def test_cached_features_train_the_same_weights_in_stage_two(folder, aligned, tmp_path, more):
    without, cached = (
        run_instruct(folder, tmp_path / str(len(extra)), *more, *extra, steps=3)
        for extra in ((), ("--cache_features", "--features_dir", tmp_path / "features"))
    )
    assert weights(without) == weights(cached)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--features_dir", "x"), "--features_dir has no effect without --cache_features"),
        (("--features_dtype", "float16"), "--features_dtype has no effect"),
        (("--packing", "--streaming", "--eval_dataset_name", "x"), "--packing and --streaming are mutually exclusive"),
        (("--cache_features", "--blind"), "--cache_features and --blind are mutually exclusive"),
        (("--cache_features", "--streaming"), "--cache_features and --streaming are mutually exclusive"),
        (("--cache_features", "--train", "encoder", "connector"), "frozen encoder, but .* train"),
    ],
)
def test_flags_that_exclude_each_other(folder, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        run_align(folder, tmp_path / "run", *more)
