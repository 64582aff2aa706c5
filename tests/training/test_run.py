"""The run folder and the lineage of what it leaves behind."""

from __future__ import annotations

import errno
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import yaml

from mllm_vision.errors import IncompleteRun
from mllm_vision.hub.lineage import LINEAGE_FILE, check_lineage, hash_parameters, hash_weights, read_lineage
from mllm_vision.training.recipe import summary
from mllm_vision.training.recipe.arguments import RecipeArguments
from mllm_vision.training.recipe.parser import run_recipe
from mllm_vision.training.recipe.run import Run


def arguments(folder: Path, **settings: Any) -> RecipeArguments:
    return RecipeArguments(**{"output_dir": str(folder), "use_cpu": True, **settings})


def make_run(folder: Path, **settings: Any) -> Run:
    return Run("stage_zero", arguments(folder, **settings), {"learning_rate": 0.1, "names": ["a"]}).start()


@pytest.fixture
def encoder(tmp_path: Path) -> tuple[Path, Any]:
    """An artifact of a finished run, and its model."""
    run, model = make_run(tmp_path / "first"), tiny.tiny_vit()
    path = run.save_artifact(model.save_pretrained, "encoder", "encoder")
    run.log(5, {"loss": 1.5})
    run.finish(evaluations={"zero_shot": {"accuracy": 0.9, "count": 100, "baselines": {"chance": 0.1}}})
    return path, model


# ---- folders -------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"already holds notes\.txt; --overwrite .* --resume") as refusal:
        make_run(tmp_path)
    assert str(tmp_path) in str(refusal.value)


def test_overwrite_removes_a_run_and_nothing_else(encoder: tuple[Path, Any], tmp_path: Path) -> None:
    folder = encoder[0].parent
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoint-5").mkdir()
    before, recipe = sorted(path.name for path in folder.iterdir()), (folder / "recipe.yaml").read_text()
    run = make_run(folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == before  # a flag may still be refused
    assert (folder / "recipe.yaml").read_text() == recipe
    run.begin()
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "recipe.yaml"]
    assert run.record["history"] == []
    run.log(1, {"loss": 1.0})
    run.begin()  # once
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "notes.txt", "recipe.yaml"]


def test_recipe_yaml_is_there_from_the_start(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    assert yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text()) == {"learning_rate": 0.1, "names": ["a"]}


def test_a_resumed_run_keeps_its_history_up_to_the_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    for step in (1, 2, 3, 4):
        run.log(step, {"loss": float(step)})
    with (tmp_path / "a" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')  # the process was killed here
    again = make_run(tmp_path / "a", resume=True)
    again.rewind(2)
    again.log(3, {"loss": 30.0})
    expected = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 30.0}]
    assert again.record["history"] == expected
    assert [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()] == expected


def test_only_numbers_are_logged_and_json_stays_json(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    run.log(1, {"loss": torch.tensor(2.0), "bad": float("nan"), "text": "no", "step": 9, "count": 3, "flag": True})
    assert run.record["history"] == [{"step": 1, "loss": 2.0, "bad": None, "count": 3.0}]
    run.finish(arrays={"similarity": torch.eye(2)})
    record = json.loads((tmp_path / "a" / "run.json").read_text(), parse_constant=pytest.fail)
    assert record["arrays"]["similarity"] == [[1.0, 0.0], [0.0, 1.0]]


def test_logging_that_fails_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "a")

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    run.log(1, {"loss": 1.0})
    assert run.record["history"] == [{"step": 1, "loss": 1.0}]


def test_run_json_holds_what_the_report_needs(encoder: tuple[Path, Any]) -> None:
    path, model = encoder
    record = json.loads((path.parent / "run.json").read_text())
    keys = (
        "schema kind name command started seconds machine versions recipe parents data modules history evaluations "
        "samples arrays bad_samples verdict artifacts missing"
    )
    assert set(record) == set(keys.split())
    (artifact,) = record["artifacts"]
    assert artifact == {"name": "encoder", "path": str(path), "kind": "encoder", "weights_sha256": hash_weights(model)}
    assert record["verdict"] == "zero_shot accuracy 0.9 against chance 0.1: better"
    assert record["versions"]["torch"] and record["machine"]["processes"] == 1


def test_the_command_is_kept_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["recipe.py", "--hub_token", "hf_a", "--hub-token=hf_b", "--templates", "a {}."])
    line = summary.command_line()
    assert "hf_" not in line and line.endswith(
        "recipe.py --hub_token REDACTED --hub-token=REDACTED --templates 'a {}.'"
    )


def test_data_is_described_without_decoding_images(tmp_path: Path) -> None:
    from datasets import load_dataset

    parquet = tiny.write_pairs_parquet(tmp_path / "p.parquet", n=5, captions_each=2)
    rows = load_dataset("parquet", data_files=str(parquet), split="train", cache_dir=str(tmp_path / "cache"))
    run = make_run(tmp_path / "a")
    run.describe_data("train", rows, {"image": "image", "caption": "captions"})
    described = run.record["data"]["train"]
    assert described["rows"] == 5 and described["fingerprint"] == rows._fingerprint
    assert [set(sample) for sample in described["samples"]] == [{"captions"}] * 3
    assert "a red circle" in described["samples"][0]["captions"]


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind='stage_nine' is not one of language_model, stage_zero"):
        Run("stage_nine", arguments(tmp_path / "a"), {})
    assert not (tmp_path / "a").exists()


def test_the_run_sets_the_seed(tmp_path: Path) -> None:
    make_run(tmp_path / "a", seed=3)
    first = torch.rand(2)
    make_run(tmp_path / "b", seed=3)
    assert torch.equal(first, torch.rand(2))


# ---- artifacts and lineage -----------------------------------------------------------------------------------


MODELS = {
    "vit": tiny.tiny_vit,  # written under older names than those in memory
    "dinov2": tiny.tiny_dinov2,
    "clip": tiny.tiny_clip,
    "siglip_vision": tiny.tiny_siglip_vision,
    "llama": lambda: tiny.tiny_llama(64),
    "tied": lambda: tiny.tiny_llama(64, tie_word_embeddings=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_directory_and_its_module_hash_alike(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    hashes = {hash_weights(model), hash_weights(tmp_path / "whole"), hash_weights(str(tmp_path / "sharded"))}
    assert len(hashes) == 1
    loaded = type(model).from_pretrained(tmp_path / "whole")
    assert hash_weights(loaded) in hashes
    with torch.no_grad():
        next(iter(loaded.parameters())).view(-1)[0] += 1e-3
    assert hash_weights(loaded) not in hashes


def test_a_hash_sees_name_type_and_shape() -> None:
    value = torch.arange(6, dtype=torch.float32)
    variants = [
        {"a": value},
        {"b": value},
        {"a": value.view(2, 3)},
        {"a": value.to(torch.bfloat16)},
        {"a": value.view(torch.int32)},
        {"a": value + 0.0, "c": torch.zeros(0)},
    ]
    assert len({hash_parameters(entry) for entry in variants}) == len(variants)
    assert hash_parameters({"a": value, "b": value}) == hash_parameters([("b", value.clone()), ("a", value)])


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.safetensors"):
        hash_weights(tmp_path)


def test_an_artifact_carries_recipe_and_lineage(encoder: tuple[Path, Any]) -> None:
    path, model = encoder
    lineage = check_lineage(path)
    assert lineage is not None and lineage["weights_sha256"] == hash_weights(model)
    assert lineage["kind"] == "encoder" and lineage["stage"] == "stage_zero" and lineage["seed"] == 42
    assert lineage["evaluations"]["zero_shot"]["accuracy"] == 0.9  # finish() brings it up to date
    assert lineage["steps"] == 5
    assert yaml.safe_load((path / "recipe.yaml").read_text())["learning_rate"] == 0.1


def test_a_chain_names_its_ancestors(encoder: tuple[Path, Any], tmp_path: Path) -> None:
    second = make_run(tmp_path / "second")
    second.inherit("encoder", str(encoder[0]))
    second.inherit("language_model", "someone/on-the-hub")
    path = second.save_artifact(tiny.tiny_llama(64).save_pretrained, "model", "vlm")
    third = make_run(tmp_path / "third")
    third.inherit("vlm", str(path))
    (parent,) = third.record["parents"]
    assert (parent["role"], parent["kind"], parent["path"]) == ("vlm", "vlm", str(path))
    assert [entry["path"] for entry in parent["parents"]] == [str(encoder[0]), "someone/on-the-hub"]
    assert parent["parents"][0]["weights_sha256"] == hash_weights(encoder[1])


def test_a_parent_that_changed_is_refused_with_both_hashes(encoder: tuple[Path, Any], tmp_path: Path) -> None:
    path, model = encoder
    before = hash_weights(path)
    with torch.no_grad():
        model.embeddings.cls_token += 1
    model.save_pretrained(path)
    with pytest.raises(ValueError, match="are not those") as refusal:
        make_run(tmp_path / "next").inherit("encoder", str(path))
    assert before in str(refusal.value) and hash_weights(model) in str(refusal.value)


def test_a_parent_without_lineage_is_taken_and_hashed(tmp_path: Path) -> None:
    model = tiny.tiny_clip_vision()
    model.save_pretrained(tmp_path / "plain")
    run = make_run(tmp_path / "next")
    run.inherit("encoder", str(tmp_path / "plain"))
    assert run.record["parents"][0]["weights_sha256"] == hash_weights(model)
    assert read_lineage(tmp_path / "plain") is None


def test_a_broken_lineage_file_is_named(tmp_path: Path) -> None:
    (tmp_path / LINEAGE_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"lineage\.json is not valid JSON"):
        read_lineage(tmp_path)


def test_a_full_disk_leaves_the_old_artifact(encoder: tuple[Path, Any], tmp_path: Path) -> None:
    path, model = encoder
    before = hash_weights(path)
    run = make_run(path.parent, resume=True)

    def save(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="free some space") as refusal:
        run.save_artifact(save, "encoder", "encoder")
    assert str(path) in str(refusal.value) and refusal.value.errno == errno.ENOSPC
    assert hash_weights(path) == before and check_lineage(path) is not None
    assert [entry.name for entry in path.parent.iterdir() if entry.name.startswith(".")] == []
    path = run.save_artifact(model.save_pretrained, "encoder", "encoder")  # and it can be written again
    assert check_lineage(path) is not None


# ---- the end -------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_in_a_step_has_told_which(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    run.save_artifact(tiny.tiny_vit().save_pretrained, "encoder", "encoder")

    def killed() -> None:
        (entry,) = json.loads((tmp_path / "a" / "run.json").read_text())["missing"]
        assert entry == {"step": "sampling", "cause": "the run ended during this step"}
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        run.after_training("sampling", killed)
    run.finish()
    assert json.loads((tmp_path / "a" / "run.json").read_text())["missing"] == []


def test_an_artifact_that_cannot_be_written_is_told_beside_those_that_were(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    run.save_artifact(tiny.tiny_vit().save_pretrained, "encoder", "encoder")
    with pytest.raises(TypeError):
        run.save_artifact(lambda folder: None + folder, "dual", "dual")  # type: ignore[operator]
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert [entry["step"] for entry in record["missing"]] == ["artifact dual"]
    assert [entry["name"] for entry in record["artifacts"]] == ["encoder"] and not (tmp_path / "a" / "dual").exists()


def test_what_is_severe_is_raised_as_it_is_once_all_is_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = make_run(tmp_path / "a")
    assert run.after_training("audit", lambda: 1 / 0, severe=True) is None
    assert run.after_training("sampling", lambda text: text + "!", "a") == "a!"
    run.after_training("drawing", lambda: [][0], remedy="draw it by hand")
    with pytest.raises(ZeroDivisionError):
        run.finish(samples=[{"a": 1}])
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert [entry["step"] for entry in record["missing"]] == ["audit", "drawing"] and record["samples"] == [{"a": 1}]
    assert "missing: drawing (IndexError: list index out of range); draw it by hand" in capsys.readouterr().out


def test_exit_code_three_says_trained_and_saved(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise IncompleteRun("trained and saved; failed: drawing (the table above says why)")

    with pytest.raises(SystemExit) as end:
        run_recipe(main)
    assert end.value.code == 3 and capsys.readouterr().err.startswith("error: trained and saved; failed: drawing")


# ---- the verdict ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "value", "baseline", "count", "word"),
    [
        ("accuracy", 0.52, 0.50, 100, "within noise"),
        ("accuracy", 0.52, 0.50, 100_000, "better"),
        ("accuracy", 0.40, 0.60, 200, "worse"),
        ("perplexity", 10.0, 20.0, None, "better"),
        ("perplexity", 20.0, 10.0, None, "worse"),
        ("loss", 1.0, 1.001, None, "within noise"),
    ],
)
def test_the_verdict(metric: str, value: float, baseline: float, count: int | None, word: str) -> None:
    assert summary.compare(metric, value, baseline, count) == word


def test_the_end_table_shows_baselines_beside_the_metric_they_are_for() -> None:
    record = {
        "kind": "stage_two",
        "name": "x",
        "seconds": 95,
        "verdict": "v",
        "artifacts": [],
        "evaluations": {
            "vqa": {"loss": 0.5, "accuracy": 0.8, "primary_metric": "accuracy", "baselines": {"majority": 0.3}}
        },
    }
    lines = summary.end_table(record).splitlines()
    assert any("accuracy" in line and "majority 0.3" in line for line in lines)
    assert not any("loss" in line and "majority" in line for line in lines)
    assert lines[-1] == "time: 1 min 35 s"


def test_the_end_table_says_what_was_left_out() -> None:
    refused = {"details": {"refused": {"the caption is empty": 2}}, "skipped": 2.0, "r1": 0.5, "baselines": {}}
    record = {
        "data": {
            "train": {"left_out": {"hidden files": 3}},
            "validation": {"left_out": {}, "refused": {"no image": 1}},
        },
        "bad_samples": {"count": 4, "reasons": {"the image is missing": 1, "it is cut": 3}},
        "evaluations": {"retrieval": refused, "knn": {"accuracy": 0.5, "skipped": 1.0, "baselines": {}}},
    }
    assert summary.left_out(record) == [
        "left out of train: 3 hidden files",
        "left out of validation: 1 no image",
        "bad samples skipped: 4 (3 it is cut, 1 the image is missing)",
        "left out of retrieval: 2 rows (2 the caption is empty)",
        "left out of knn: 1 rows",
    ]
    assert all(line in summary.end_table(record) for line in summary.left_out(record))


def test_a_push_that_fails_ends_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
) -> None:
    asked = []

    def refuse(path: Any, repo_id: str, **settings: Any) -> None:
        asked.append((Path(path).name, repo_id))
        raise PermissionError("wrong token")

    hub = SimpleNamespace(push_directory=refuse, prepare_repository=lambda repo_id, **settings: repo_id)
    monkeypatch.setitem(__import__("sys").modules, "mllm_vision.hub.push", hub)
    given = arguments(tmp_path / "a", push_to_hub=True, hub_model_id="me/eyes")
    run = Run("stage_zero", given, {}).start()
    assert given.push_to_hub is False  # the Trainer must not push every checkpoint
    run.save_artifact(tiny.tiny_vit().save_pretrained, "encoder", "encoder")
    run.save_artifact(tiny.tiny_vit().save_pretrained, "dual", "dual")
    with pytest.raises(IncompleteRun, match="push of encoder to me/eyes, push of dual to me/eyes-dual"):
        run.finish()
    assert asked == [("encoder", "me/eyes"), ("dual", "me/eyes-dual")]
    assert caplog.text.count("wrong token") == 2
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    entry = record["missing"][1]
    assert entry["step"] == "push of dual to me/eyes-dual" and entry["cause"] == "PermissionError: wrong token"
    assert entry["remedy"] in capsys.readouterr().out
    words = shlex.split(entry["remedy"].removeprefix("push it with: "))
    assert words[:4] == ["python", "scripts/push_to_hub.py", "--model", str(tmp_path / "a" / "dual")]
