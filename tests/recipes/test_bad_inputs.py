"""Stages one and two: what cannot be trained ends the start with one line that says why, before the first step."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch

from mllm_vision.training.recipe.launch import run_recipe

ROOT = Path(__file__).resolve().parents[2]


def recipe(name: str):
    """A recipe's `main`, under a name of its own: its flags are pickled by the module they came from."""
    spec = importlib.util.spec_from_file_location(f"bad_inputs_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main


ALIGN, INSTRUCT = recipe("align"), recipe("instruct")
TOWERS = {"clip": tiny.tiny_clip_vision, "siglip": tiny.tiny_siglip_vision, "vit": tiny.tiny_vit}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Untrained encoders, a language model of 256 positions, captions, and conversations of every bad kind."""
    from mllm_vision.encoder import VisionEncoder

    folder = tmp_path_factory.mktemp("bad")
    torch.manual_seed(0)
    for kind, make in TOWERS.items():
        VisionEncoder.from_backbone(make(), tiny.tiny_image_processor(kind)).save_pretrained(folder / kind)
    other = VisionEncoder.from_backbone(TOWERS["clip"](seed=1), tiny.tiny_image_processor("clip"))
    other.save_pretrained(folder / "other_clip")
    (folder / "cache").mkdir()
    tokenizer = tiny.tiny_tokenizer(folder / "llm")
    tiny.tiny_llama(len(tokenizer)).save_pretrained(folder / "llm")
    tiny.write_pairs_parquet(folder / "train.parquet", 40)
    tiny.write_conversations_jsonl(folder / "good.jsonl", 40)
    rows = [json.loads(line) for line in (folder / "good.jsonl").read_text().splitlines()]
    bad = {
        "more_images": [{**row, "image": [row["image"]] * 2} for row in rows],
        "more_marks": [_said(row, [{"type": "image"}] * 2) for row in rows],
        "long": [_said(row, [{"type": "image"}, {"type": "text", "text": "and then " * 400}]) for row in rows],
    }
    for name, found in bad.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)))
    for kind, gone in {"clip": "preprocessor_config.json", "llm": "tokenizer"}.items():
        shutil.copytree(folder / kind, folder / f"bare_{kind}")
        for file in (folder / f"bare_{kind}").glob(f"{gone}*"):
            file.unlink()
    shutil.copytree(folder / "clip", folder / "changed")
    (folder / "changed" / "lineage.json").write_text(json.dumps({"kind": "encoder", "weights_sha256": "0" * 64}))
    return folder


def _said(row: dict, content: list[dict]) -> dict:
    return {**row, "messages": [{"role": "user", "content": content}, row["messages"][1]]}


def words(folder: Path, output: Path, line: str, steps: int = 2) -> list[str]:
    """A command line, in which {name} is a file or folder of the fixture."""
    given = {path.stem: str(path) for path in folder.iterdir()}
    text = "--dataset_name {train} --per_device_train_batch_size 4 --disable_tqdm --save_strategy no --use_cpu " + line
    return [*text.format(**given).split(), "--output_dir", str(output), "--max_steps", str(steps)]


@pytest.fixture(scope="module")
def aligned(folder):
    ALIGN(words(folder, folder / "run", "--encoder {clip} --llm {llm} --save_strategy steps --save_steps 1"))
    shutil.copytree(folder / "run" / "model", folder / "aligned")
    shutil.copytree(folder / "aligned", folder / "bare_model")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / "bare_model" / name).unlink(missing_ok=True)
    ALIGN(words(folder, folder / "cached", "--encoder {clip} --llm {llm} --cache_features --features_dir {cache}"))
    return folder


NEW = "--encoder {clip} --llm {llm} "
INTERNVL = "--system internvl --encoder {vit} --llm {llm} "
CASES = {
    "a tower that does not fit": (
        ALIGN, "--system internvl --encoder {siglip} --llm {llm}", "siglip_vision_model tower cannot become internvl",
    ),
    "an encoder without image processor": (ALIGN, "--encoder {bare_clip} --llm {llm}", "preprocessor_config.json"),
    "a language model without tokenizer": (ALIGN, "--encoder {clip} --llm {bare_llm}", "--tokenizer"),
    "a model without processor": (INSTRUCT, "--model {bare_model}", "bare_model has no processor .*copy it"),
    "tiles beyond the context": (
        ALIGN, INTERNVL + "--min_tiles 80 --max_tiles 80", "longer than max_length.*let an image take fewer tiles",
    ),
    "an image beyond the context": (ALIGN, NEW + "--max_length 12", "max_length=12 leaves no room for text beside"),
    "more images than marks": (
        INSTRUCT, "--model {aligned} --dataset_name {more_images}", "more images than <image> tokens",
    ),
    "fewer images than marks": (
        INSTRUCT, "--model {aligned} --dataset_name {more_marks}", "more <image> tokens than images",
    ),
    "a conversation beyond the context": (
        INSTRUCT, "--model {aligned} --dataset_name {long}", "longer than max_length.*max_length=256.*--on_truncation",
    ),
    "weights that are not the lineage's": (
        ALIGN, "--encoder {changed} --llm {llm}", r"lineage says 0{64}, the files give \w{64}",
    ),
    "cached features of other weights": (
        ALIGN, "--encoder {other_clip} --llm {llm} --cache_features --features_dir {cache}",
        r"hash of its weights \(\w+ there, \w+ here\); name another folder with --features_dir",
    ),
    "a rate of a frozen part": (
        ALIGN, NEW + "--encoder_learning_rate 1e-5", "--encoder_learning_rate has no effect: --train names connector",
    ),
    "a weight decay of a frozen part": (
        ALIGN, NEW + "--language_model_weight_decay 0.1", "--language_model_weight_decay has no effect",
    ),
    "a negative weight decay": (ALIGN, NEW + "--connector_weight_decay -1", "-1.0 must not be negative"),
    "a schedule of weight decay beside that of a part": (
        ALIGN, NEW + "--connector_weight_decay 0.1 --weight_decay_end 0.2", "mutually exclusive",
    ),
    "weights of a stream": (
        ALIGN, NEW + "--loss_weights sample --streaming --eval_dataset_name {train}",
        "--loss_weights sample and --streaming are mutually exclusive",
    ),
}  # fmt: skip


def ending(main, argv, capsys) -> str:
    """What is printed at the end of a start that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_recipe(lambda: main(argv))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said[said.rindex("error: ") :]


@pytest.mark.parametrize("case", CASES)
def test_it_is_said_in_one_line_before_training(aligned, tmp_path, capsys, case):
    main, line, message = CASES[case]
    said = ending(main, words(aligned, tmp_path / "run", line), capsys)
    assert re.search(message, said.replace("\n", " ")), said
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--system llava", "--resume with another system: 'llava', the run was started with 'llava15'"),
        ("--system llava_next", "--resume with another system"),
        ("--train encoder connector", "--resume with another train"),
        ("--loss_weights sample", "--resume with another loss_weights: 'sample', the run was started with 'token'"),
    ],
)
def test_another_system_or_part_cannot_resume_a_run(aligned, tmp_path, capsys, more, message):
    shutil.copytree(aligned / "run", tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    shutil.rmtree(tmp_path / "run" / "model")
    line = f"--encoder {{clip}} --llm {{llm}} --save_strategy steps --save_steps 1 --resume {more}"
    assert message in ending(ALIGN, words(aligned, tmp_path / "run", line, steps=3), capsys)


def test_a_language_model_without_pad_token_trains_with_weights_and_decays_of_parts(folder, tmp_path):
    shutil.copytree(folder / "llm", tmp_path / "llm")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (file := tmp_path / "llm" / name).is_file():
            file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "pad_token"}))
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "llm").pad_token is None
    line = f"--encoder {{clip}} --llm {tmp_path / 'llm'} --loss_weights square_root --connector_weight_decay 0.3"
    ALIGN(words(folder, tmp_path / "run", line))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {row["group"]: row["weight_decay"] for row in record["modules"]} == {
        "encoder": 0.0, "connector": 0.3, "language_model": 0.0,
    }  # fmt: skip
    assert record["artifacts"] and record["evaluations"]["captions"]["loss"] > 0
