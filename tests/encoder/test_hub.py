"""The Hub: round trip over HTTP, refusals, uploads that break, the card, the script. One fresh process does it all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("hub_scenario.py")), str(tmp_path_factory.mktemp("hub"))],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, f"the scenario ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads(lines[0].removeprefix("RESULT "))


def test_uploads_exactly_what_save_pretrained_writes_and_a_card(result):
    assert result["exactly"]
    assert set(result["remote"]) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "lineage.json",
        "model.safetensors",
        "preprocessor_config.json",
        "recipe.yaml",
    }
    assert "/us/first/commit/" in result["address"]


def test_reads_back_the_same_tokens_and_lineage(result):
    assert result["same_tokens"] and result["lineage_back"]


def test_private_is_private(result):
    assert result["private"]
    for key in ("no_access", "no_access_without"):
        assert result[key]["kind"] in ("FileNotFoundError", "PermissionError"), result[key]
        assert "token" in result[key]["message"]


def test_a_revision_leaves_main_alone_and_remembers_its_selection(result):
    assert result["main_stays"] and result["second_same"]
    assert result["second_selection"] == [-1, "cls_patch"]
    assert result["message"] == "another one"
    assert result["second_lineage_gone"]
    assert result["no_revision"]["kind"] == "FileNotFoundError"
    assert "no revision 'third'" in result["no_revision"]["message"]


def test_a_repository_that_is_not_there(result):
    assert result["no_repository"]["kind"] == "FileNotFoundError"
    assert "us/none" in result["no_repository"]["message"]
    assert result["bad_id"]["kind"] == "ValueError"


def test_a_wrong_token_is_said_and_makes_nothing(result):
    for key, status in (("wrong_token", "401"), ("reader", "403")):
        assert result[key]["kind"] == "PermissionError"
        assert status in result[key]["message"] and "HF_TOKEN" in result[key]["message"]
    assert not result["stolen"]


@pytest.mark.parametrize("broken", ["put_0", "put_500", "batch_500", "verify_400", "commit_500", "commit_0"])
def test_a_broken_upload_is_said(result, broken):
    error = result[f"broken_{broken}"]
    assert error["kind"] == "ConnectionError", error
    assert "nothing of this upload is visible on main" in error["message"]


def test_a_broken_upload_leaves_nothing_half_visible(result):
    assert result["untouched"]
    assert result["loads_after"]


def test_a_broken_download_is_said(result):
    assert result["broken_load"]["kind"] in ("ConnectionError", "FileNotFoundError"), result["broken_load"]
    assert "us/fresh" in result["broken_load"]["message"]


def test_stale_lineage_goes_from_the_hub_with_the_weights_it_spoke_of(result):
    assert not result["stale_lineage"]
    assert result["trained_on"]


def test_the_card_tells_the_run(result):
    card = result["card"]
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: image-feature-extraction\n")
    header = yaml.safe_load(card.split("---\n")[1])
    (entry,) = header["model-index"][0]["results"]  # the Hub's own table of results
    assert header["tags"] == ["mllm_vision", "stage_zero"] and entry["dataset"]["split"] == "validation"
    assert entry["metrics"] == [{"type": "accuracy", "value": 0.95}]
    for words in (
        "| scenes | accuracy | 0.95 | 0.0625 | 0.11 |",  # beside its baselines
        "| scenes | r1 | 0.5 |  | 0.01 |",  # the chance of another metric is not this one's
        "| rows | 1234 |",
        "a red circle",
        "a | b",
        "| `learning_rate` | 0.001 |",
        "| **20** | 1.5 | 0.4 |",  # the best step
        "radford2021clip",
        "somebody2026method",  # what the run's method cites
        "torch 2.13.0",
        "python recipes/pretrain.py",
        "abcdef0123456789",
        "better than chance",
    ):
        assert words in card, words


def test_the_cards_lines_of_use_run(result):
    assert result["card_tokens"] == [1, 16, 32]
    assert result["vlm_said"]


def test_the_script_pushes_a_pair_and_a_vlm(result):
    assert "us/pair/commit/" in result["script_said"] and "us/vlm/commit/" in result["script_said"]
    assert "pipeline_tag: zero-shot-image-classification" in result["pair_card"]
    assert "pipeline_tag: image-text-to-text" in result["vlm_card"]
    assert {"model.safetensors", "processor_config.json", "tokenizer.json"} <= set(result["vlm_files"])
    assert result["pair_layer"] == -1
    assert result["vlm_tower_same"]
    assert result["own_same"]


def test_the_script_helps_with_a_run_folder_and_a_dry_run(result):
    assert result["script_run_folder"]["kind"] == "FileNotFoundError"
    assert result["script_run_folder"]["message"].endswith("encoder")
    assert not result["dry_run_made"]


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("check_wrong", "PermissionError", "401"),
        ("check_reader", "PermissionError", "may only read"),
        ("check_foreign", "PermissionError", "that of somebody, us, readers, and may not write to them/new"),
        ("check_name", "ValueError", "is not a Hub id"),
        ("check_offline", "ConnectionError", "HF_HUB_OFFLINE is set"),
        ("check_down", "ConnectionError", "us/new"),
    ],
)
def test_a_run_that_could_not_push_is_refused_before_it_trains(result, case, kind, words):
    assert result[case]["kind"] == kind, result[case]
    assert words in result[case]["message"] and "\n" not in result[case]["message"]
    if case != "check_name":
        assert "leave --push_to_hub out" in result[case]["message"]
    assert result["check_left"] == ["recipe.yaml"]


def test_a_push_that_fails_after_the_training_can_be_made_up_for(result):
    assert result["check_made"] and result["push_later"]
    assert result["push_failed"]["kind"] == "IncompleteRun"
    assert result["push_missing"]["step"] == "push of encoder to us/late" and "403" in result["push_missing"]["cause"]
