"""Messages: remedies are flags of that very recipe, no value is printed whole, damage is a line that names the file."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from dry import _load

from mllm_vision.errors import explain, reading, tidy
from mllm_vision.training.recipe.parser import peek_recipe, run_recipe

ROOT = Path(__file__).resolve().parents[1]
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9_]*[a-z0-9])")
PAIRS, IMAGES = {"recipes/pretrain.py"}, {"recipes/pretrain_images.py", "recipes/finetune.py"}
CHAT = {"recipes/align.py", "recipes/instruct.py"}
WORKER = "Original Traceback (most recent call last):"
DATA = PAIRS | IMAGES | CHAT
ALL = DATA | {"recipes/language_model.py"}
STREAMS = DATA - {"recipes/finetune.py"}
# Where a message of the package is seen: the longest beginning of its path that stands here. Recipes and scripts speak
# for themselves. A flag that one method, one evaluator or one recipe has is named beside the file it stands in.
SEEN: dict[str, set[str]] = {
    "mllm_vision": ALL,
    "mllm_vision/data": DATA,
    "mllm_vision/data/streams/shards.py": STREAMS,
    "mllm_vision/data/stream": STREAMS,
    "mllm_vision/data/pairs.py": PAIRS,
    "mllm_vision/data/images/dataset.py": IMAGES,
    "mllm_vision/data/view": IMAGES,
    "mllm_vision/data/chat/conversations.py": CHAT,
    "mllm_vision/data/chat/messages.py": CHAT,
    "mllm_vision/data/chat/templates.py": CHAT,
    "mllm_vision/data/chat/tokenise.py": CHAT,
    "mllm_vision/data/chat/packing.py": {"recipes/instruct.py"},
    "mllm_vision/encoder": PAIRS | IMAGES | {"recipes/align.py"},
    "mllm_vision/encoder/dual.py": PAIRS,
    "mllm_vision/encoder/features.py": PAIRS,
    "mllm_vision/evaluation": {"scripts/evaluate.py"},
    "mllm_vision/evaluation/labelled/flags.py": {"recipes/pretrain_images.py"},
    "mllm_vision/objectives": {"recipes/pretrain_images.py"},
    "mllm_vision/data/documents.py": {"recipes/language_model.py"},
    "mllm_vision/training/preflight": {"scripts/doctor.py"},
    "mllm_vision/vlm": CHAT,
    "mllm_vision/vlm/packing.py": {"recipes/instruct.py"},
}
ELSEWHERE = {  # file -> flags that its messages name for another script, which they name too, or for one recipe's case
    "mllm_vision/training/recipe/flags.py": {"eval_dataset_name", "pack_turns", "train", "neftune_noise_alpha"},
    "mllm_vision/training/trainer/objective_trainer.py": {"artifact", "streaming", "nproc", "embed_batch_size"},
    "mllm_vision/training/checkpoint/resume.py": {"streaming"},
    "mllm_vision/distributed.py": {"device"},
    "mllm_vision/vlm/conversation.py": {"pack_turns"},
    "mllm_vision/vlm/task.py": {"pack_turns"},
    "mllm_vision/vlm/tokens.py": {"tokenizer"},
    "mllm_vision/vlm/freezing.py": {"train"},
    "mllm_vision/training/recipe/parser.py": {"allow_import"},
    "mllm_vision/training/recipe/flag_parser.py": {"flag"},
    "mllm_vision/errors.py": set(),
    "recipes/pretrain_images.py": {"model", "task"},
    "scripts/push_to_hub.py": set(),
    "scripts/pretrained_parts.py": {"wheels", "no"},  # of itself and of pip
}


def messages(file: Path) -> list[tuple[int, str]]:
    """(line, text) of every string in a raise, a call that makes an error, a refusal, or a line of a log."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        call: ast.AST | None = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            call = node if re.search(r"Bad|Error|[Rr]efus|^(warning|info|error|print)$", name) else None
        for part in ast.walk(call) if call is not None else ():
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                found.append((part.lineno, part.value))
    return found


def flags_of(script: str) -> set[str]:
    """The flags that `--help` of a recipe or script lists, for every method it takes."""
    from mllm_vision.objectives import list_objectives
    from mllm_vision.vlm import list_systems

    out, module = io.StringIO(), _load(script)
    methods = {
        "recipes/pretrain.py": list_objectives("image_text"),
        "recipes/pretrain_images.py": list_objectives("images"),
    }
    calls = [[], *(["--objective", name] for name in methods.get(script, ()))]
    if script in ("recipes/align.py", "recipes/instruct.py"):
        calls += [["--system", name] for name in list_systems()]
    for words in [*(["--help", "all", *words] for words in calls), ["plan", "--help", "all"]]:  # a mode of the doctor
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit, ValueError):
            module.main(words)
    return set(re.findall(r"(?:^  |, )--(\w+)", out.getvalue(), re.M)) | {"config", "help"}


def test_every_flag_in_a_message_is_one_of_that_recipe():
    known = {script: flags_of(script) for script in [*sorted(ALL), *(f"scripts/{name}.py" for name in (
        "evaluate", "chat", "report", "push_to_hub", "doctor"))]}  # fmt: skip
    seen, wrong = 0, []
    for folder in ("mllm_vision", "recipes", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            if file.startswith("scripts/benchmark/"):
                continue
            scope = (
                {file}
                if file in known
                else SEEN[max((key for key in SEEN if file.startswith(key)), key=len, default="mllm_vision")]
            )
            for line, text in messages(path):
                others = re.findall(r"(?:recipes|scripts)/\w+\.py", text)  # a remedy may be to run another one
                for flag in FLAG.findall(text):
                    seen += 1
                    lacking = [script for script in scope if flag not in known[script]]
                    if any(flag in known.get(script, ()) for script in others):
                        continue
                    if lacking and flag not in ELSEWHERE.get(file, ()):
                        wrong.append(f"{file}:{line} names --{flag}, which {', '.join(lacking)} has not")
    assert seen > 150 and not wrong, "\n".join(wrong)


def test_long_values_lose_their_middle():
    message = f'image {"x" * 5000!r} is {"AbC/" * 3000} and "{"word " * 400}"; give --image_root'
    told = tidy(message)
    assert len(told) < 700 and "5,002 characters" in told and told.endswith("; give --image_root")
    short = "column 'a' of 'b' is no c; give --d"
    assert tidy(short) == short


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "--dataloader_num_workers"),
        (ModuleNotFoundError("No module named 'wandb'", name="wandb"), "pip install wandb"),
        (pickle.UnpicklingError("Weights only load failed"), "damaged or of another kind"),
        (RecursionError("maximum recursion depth exceeded"), "damaged or of another kind"),
        (MemoryError(), "--per_device_train_batch_size"),
        (ValueError(f"Caught ValueError in x.\n{WORKER}\n  a\nValueError: row 3"), "row 3"),
        (KeyError("a mistake of ours"), None),
        (AssertionError("an invariant"), None),
    ],
)  # fmt: skip
def test_what_becomes_one_line(error, told):
    line = explain(error)
    assert (line is None) if told is None else (told in line and "\n" not in line and "Traceback" not in line)


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    error = PermissionError(13, "Permission denied", str(tmp_path / "hf" / "datasets" / "x.lock"))
    assert explain(error).startswith(f"HF_HOME={tmp_path / 'hf'} cannot be written (Permission denied")
    assert explain(FileNotFoundError(2, "No such file", "there.parquet")).endswith("'there.parquet'")


def test_reading_names_the_file():
    for error in (KeyError("hidden_size"), RuntimeError("bad header"), ValueError("no number")):
        with (
            pytest.raises(ValueError, match=r"^models/x cannot be read, it may be damaged or of another kind: "),
            reading("models/x"),
        ):
            raise error
    with pytest.raises(ValueError, match="^models/x has no y$"), reading("models/x"):
        raise ValueError("models/x has no y")
    with pytest.raises(FileNotFoundError), reading("models/x"):
        raise FileNotFoundError(2, "No such file", "z")


def test_what_is_not_there_is_told_with_the_nearest(tmp_path):
    from mllm_vision.data import load_records
    from mllm_vision.encoder import VisionEncoder
    from mllm_vision.vlm import load_vlm

    (tmp_path / "runs" / "encoder").mkdir(parents=True)
    (tmp_path / "runs" / "pairs.jsonl").write_text("{}")
    for look, name, near in (
        (VisionEncoder.from_pretrained, "runs/encodr", "runs/encoder"),
        (load_vlm, "rums/encoder", "runs"),
        (load_records, "runs/pairs.json1", "runs/pairs.jsonl"),
    ):
        with pytest.raises(FileNotFoundError) as raised:
            look(tmp_path / name)
        told = explain(raised.value)
        assert str(tmp_path / name) in told and f"the nearest there is '{tmp_path / near}'" in told
    with pytest.raises(FileNotFoundError, match=r"runs' contains encoder, pairs.jsonl"):
        VisionEncoder.from_pretrained(tmp_path / "runs" / "0123456789")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from mllm_vision.encoder import VisionEncoder

    made = tmp_path_factory.mktemp("models")
    VisionEncoder.from_backbone(tiny.tiny_vit(), tiny.tiny_image_processor("vit")).save_pretrained(made / "encoder")
    tokenizer = tiny.tiny_tokenizer(made / "llm")
    tiny.tiny_llama(len(tokenizer)).save_pretrained(made / "llm")
    return made


DAMAGE = {
    "weights cut short": ("model.safetensors", lambda data: data[: len(data) // 2]),
    "weights without header": ("model.safetensors", lambda data: b"\0" * 64),
    "config without its type": ("config.json", lambda data: json.dumps({"hidden_size": 3}).encode()),
    "config of another kind": ("config.json", lambda data: b"[1, 2]"),
    "config that is too deep": ("config.json", lambda data: b"[" * 100_000),
    "config with words for numbers": ("config.json", lambda data: data.replace(b'_size": 32', b'_size": "x"')),
    "tokenizer cut short": ("tokenizer.json", lambda data: data[:100]),
    "processor of another kind": ("preprocessor_config.json", lambda data: b'{"size": "x", "image_processor_type": 3}'),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("kind", ["encoder", "llm"])
def test_a_damaged_folder_is_one_line_that_names_it(name, kind, folders, tmp_path):
    import shutil

    from mllm_vision.encoder import VisionEncoder
    from mllm_vision.vlm import build_vlm

    file, change = DAMAGE[name]
    folder = shutil.copytree(folders / kind, tmp_path / "broken")
    if not (folder / file).is_file():
        return
    before = (folder / file).read_bytes()
    (folder / file).write_bytes(change(before))
    assert (folder / file).read_bytes() != before
    with pytest.raises((ValueError, OSError)) as raised:
        if kind == "encoder":
            VisionEncoder.from_pretrained(folder)
        else:
            build_vlm(VisionEncoder.from_pretrained(folders / "encoder"), folder, "llava")
    told = explain(raised.value)
    assert "broken" in told and "\n" not in told.strip() and len(told) < 1500


def test_an_ascii_terminal_ends_no_run(monkeypatch, capfd):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    run_recipe(lambda: print("a caption: 红色的圆, naïve"))
    stream.flush()
    assert stream.buffer.getvalue().startswith(b"a caption: \\u7ea2")


class Armed:
    """A pickle that leaves a file behind wherever it is loaded."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return (Path.touch, (self.place,))


def test_no_pickle_is_read(folders, tmp_path):
    """An armed one in the place of weights, beside them, in a checkpoint, and in data of every form."""
    import shutil
    import tarfile

    import numpy as np

    from mllm_vision.data import load_records
    from mllm_vision.encoder import DualEncoder, VisionEncoder
    from mllm_vision.vlm import build_vlm, load_vlm

    mark = tmp_path / "it was run"
    armed = pickle.dumps(Armed(mark))
    np.save(tmp_path / "a.npy", np.array([Armed(mark)], dtype=object), allow_pickle=True)
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "train.tar", "w") as archive:
        for number, (end, data) in enumerate(
            [
                ("pkl", armed),
                ("pickle", armed),
                ("pyd", armed),
                ("npy", (tmp_path / "a.npy").read_bytes()),
                ("pth", armed),
            ]
        ):
            for name, content in (
                (f"{number}.{end}", data),
                (f"{number}.txt", b"words"),
                (f"{number}.png", tiny.image_bytes(tiny.random_image(number))),
            ):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    records = load_records(tmp_path / "data" / "train.tar")
    assert [records[row] for row in range(len(records))]
    for name in ("train.pkl", "train.arrow", "train.parquet", "dataset.pickle"):
        (tmp_path / name).write_bytes(armed)
        with pytest.raises((ValueError, OSError)):
            load_records(tmp_path / name)
    for kind in ("encoder", "llm"):
        folder = shutil.copytree(folders / kind, tmp_path / kind)
        (folder / "model.safetensors").unlink()
        for name in ("pytorch_model.bin", "model.bin", "model.safetensors", "weights.pth"):
            (folder / name).write_bytes(armed)
            for load in (
                VisionEncoder.from_pretrained, DualEncoder.from_pretrained, load_vlm,
                lambda path: build_vlm(VisionEncoder.from_pretrained(folders / "encoder"), path, "llava"),
            ):  # fmt: skip
                with pytest.raises((ValueError, OSError)):
                    load(folder)
    assert not mark.exists()
    pickle.loads(armed)
    assert mark.exists(), "the pickle is armed"


def test_no_pickle_is_read_from_a_checkpoint(tmp_path):
    from training.test_trainer import arguments, llama, text_rows

    from mllm_vision.training.trainer.recipe_trainer import RecipeTrainer

    mark = tmp_path / "it was run"
    args = arguments(tmp_path / "run", max_steps=4, save_steps=2)
    RecipeTrainer(llama(), args, train_dataset=text_rows()).train()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        for folder in (tmp_path / "run").glob("checkpoint-*"):
            assert (folder / name).is_file()
            (folder / name).write_bytes(pickle.dumps(Armed(mark)))
        for seal in (tmp_path / "run").glob("checkpoint-*/complete.json"):
            seal.unlink()  # what the hashes would find first
        with contextlib.suppress(ValueError, OSError, pickle.UnpicklingError):
            again = arguments(tmp_path / "run", max_steps=6, save_steps=2, resume=True)
            RecipeTrainer(llama(), again, train_dataset=text_rows()).train()
        assert not mark.exists(), name


def test_a_config_imports_nothing_unasked(tmp_path, monkeypatch, capsys):
    (tmp_path / "guest.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = tmp_path / "shared.yaml"
    config.write_text("objective: guest:Method\n")
    words = ["--config", str(config), "--dataset_name", "x", "--output_dir", str(tmp_path / "run")]
    for recipe in ("pretrain", "pretrain_images"):
        with pytest.raises(ValueError, match=r"objective: guest:Method would import the module guest.*--allow_import"):
            _load(f"recipes/{recipe}.py").main(words)
    assert not (tmp_path / "ran").exists()
    assert peek_recipe("objective", argv=[*words, "--allow_import"]) == "guest:Method"
    assert peek_recipe("objective", argv=[*words, "--objective", "guest:Method"]) == "guest:Method"
    config.write_text("allow_import: true\nobjective: clip\nstreaming: true\n")
    with pytest.raises(ValueError, match="unknown key 'allow_import'"):
        _load("recipes/pretrain.py").main(words)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_warnings_as_errors_find_none_of_ours(folders, tmp_path):
    """PYTHONWARNINGS=error: a whole small run of stage one, from the command line."""
    tiny.write_pairs_parquet(tmp_path / "train.parquet", 40)
    words = [
        "--encoder", folders / "encoder", "--llm", folders / "llm", "--dataset_name", tmp_path / "train.parquet",
        "--output_dir", tmp_path / "run", "--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu",
        "--max_eval_samples", "4", "--sample_count", "1",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONWARNINGS": "error", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "align.py"), *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
