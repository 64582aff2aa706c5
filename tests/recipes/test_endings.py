"""After the last step, in every recipe: a run saves first, measures what it saved, and tells what failed."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from dry import _load

from mllm_vision.data import documents as language
from mllm_vision.data import load_records
from mllm_vision.encoder import DualEncoder, VisionEncoder
from mllm_vision.errors import IncompleteRun
from mllm_vision.evaluation import Geometry, KnnAccuracy, LabelledImages, LinearProbe, Retrieval, ZeroShot
from mllm_vision.evaluation.base import examine
from mllm_vision.evaluation.language.captions import Captioning
from mllm_vision.evaluation.language.question_answering import QuestionAnswering
from mllm_vision.hub.lineage import check_lineage, hash_weights
from mllm_vision.vlm import HeldOutLoss, load_vlm
from mllm_vision.vlm.conversation import load_stage_data

RECIPES = list(tiny_runs.ARTIFACTS)
EVALUATIONS = {
    "pretrain": {"retrieval", "zero_shot", "geometry"},
    "pretrain_images": {"knn", "probe", "geometry"},
    "finetune": {"test"},
    "align": {"captions", "captioning"},
    "instruct": {"conversations", "answers"},
    "language_model": {"heldout"},
}
WHOLE: dict[str, dict[str, Any]] = {  # how figures once came to be of other weights than those saved
    "pretrain": {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "load_best_model_at_end": "true", "metric_for_best_model": "retrieval_image_to_text_median_rank",
        "greater_is_better": "false",
    },
    "pretrain_images": {"eval_strategy": None, "evaluators": "knn", "max_steps": 4},
    "finetune": {"ema_decay": 0.6, "max_steps": 8},
    "language_model": {"eval_strategy": "steps", "eval_steps": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny_runs.write_data(tmp_path_factory.mktemp("data"))


def run(recipe: str, data: Path, folder: Path, **changed: Any) -> dict[str, Any]:
    """The record of a run, as far as it came."""
    _load(f"recipes/{recipe}.py").main(tiny_runs.words(recipe, data, folder, **changed))
    return json.loads((folder / "run.json").read_text())


# ---- every recorded figure is one of what lies on the disk -----------------------------------------------------


def pretrain(folder: Path, data: Path) -> dict[str, Any]:
    test, dual = load_records(str(data / "test.parquet")), DualEncoder.from_pretrained(folder / "dual")
    columns = {"image": "image", "caption": "captions", "label": "label"}
    evaluators = [
        Retrieval("retrieval", test, columns, distinct=True, limit=1000),
        ZeroShot("zero_shot", test, columns=columns),
        Geometry("geometry", test, columns, limit=1000),
    ]
    return {each.name: each(dual.eval(), 0) for each in evaluators}


def pretrain_images(folder: Path, data: Path) -> dict[str, Any]:
    train, test = (load_records(str(data / f"noise_{part}.parquet")) for part in ("train", "test"))
    labelled, encoder = LabelledImages(train, test), VisionEncoder.from_pretrained(folder / "encoder").eval()
    evaluators = [KnnAccuracy("knn", labelled, k=3), LinearProbe("probe", labelled), Geometry("geometry", test)]
    return {each.name: each(encoder, 0) for each in evaluators}


def finetune(folder: Path, data: Path) -> dict[str, Any]:
    """By transformers alone."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    test = load_records(str(data / "noise_test.parquet")).cast_column("image", __import__("datasets").Image())
    model = AutoModelForImageClassification.from_pretrained(folder / "classifier").eval()
    processor = AutoImageProcessor.from_pretrained(folder / "classifier")
    with torch.no_grad():
        guesses = model(**processor(list(test["image"]), return_tensors="pt")).logits.argmax(1)
    right = guesses == torch.tensor(list(test["label"]))
    return {"test": {"accuracy": right.float().mean().item(), "count": 48.0}}


def stage(folder: Path, data: Path, name: str, **options: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
    model, processor = load_vlm(folder / "model")
    paths = (str(data / "train.parquet"), str(data / "test.parquet"))
    loaded = load_stage_data(model, processor, *paths, eval_rows=200, seed=42, **options)
    heldout = HeldOutLoss(name, loaded.evaluation, loaded.collator, 8)
    return model, processor, loaded, {name: examine(heldout, model).metrics}


def align(folder: Path, data: Path) -> dict[str, Any]:
    model, processor, loaded, found = stage(folder, data, "captions", roles=("image", "caption"))
    captioning = Captioning("captioning", loaded.eval_records, loaded.eval_columns, processor, limit=2)
    return found | {"captioning": captioning(model, 0)}


def instruct(folder: Path, data: Path) -> dict[str, Any]:
    model, processor, loaded, found = stage(folder, data, "conversations")
    asked = QuestionAnswering("answers", loaded.eval_records, loaded.eval_columns, processor, max_new_tokens=2)
    return found | {"answers": asked(model, 0)}


def language_model(folder: Path, data: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    documents = language.read_documents([str(data / "corpus.txt")])
    held = sorted(random.Random(42).sample(range(len(documents)), len(documents) // 10))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = language.encode_documents(tokenizer, [documents[place] for place in held], tokenizer.eos_token_id)
    blocks = language.PackedBlocks(ids, 16)
    return {
        "heldout": language.Perplexity(blocks, batch_size=8)(AutoModelForCausalLM.from_pretrained(folder / "model"))
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recorded_figure_is_of_what_was_saved(recipe, data, tmp_path):
    record = run(recipe, data, tmp_path, **WHOLE.get(recipe, {}))
    assert record["missing"] == [] and set(record["evaluations"]) == EVALUATIONS[recipe]
    again = globals()[recipe](tmp_path, data)
    step = WHOLE.get(recipe, {}).get("max_steps", 2)
    if "load_best_model_at_end" in WHOLE.get(recipe, {}):
        step = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["best_global_step"]
    for name, entry in record["evaluations"].items():
        figures = {key: value for key, value in entry.items() if isinstance(value, float)}
        for metric, value in again[name].items():
            assert figures[metric] == pytest.approx(value, rel=1e-3, abs=1e-5), (name, metric)
        assert entry["step"] == step
        assert entry["weights_sha256"] == hash_weights(tmp_path / entry["artifact"])
    for artifact in tiny_runs.ARTIFACTS[recipe]:
        assert check_lineage(tmp_path / artifact)["evaluations"] == record["evaluations"]


@pytest.mark.parametrize("recipe", ["align", "instruct"])
def test_a_run_of_one_step_ends_well(recipe, data, tmp_path):
    """With the recipe's own warm-up, whose first step has a rate of 0."""
    record = run(recipe, data, tmp_path, max_steps=1, warmup_steps=None, eval_dataset_name=None)
    assert record["missing"] == [] and not record.get("freeze_problems")
    assert [entry["name"] for entry in record["artifacts"]] == list(tiny_runs.ARTIFACTS[recipe])


# ---- each step after the training fails in turn ---------------------------------------------------------------


class Broken(RuntimeError):
    """What a broken step raises: no ValueError, no OSError."""


def fails(*args: Any, **kwargs: Any) -> Any:
    raise Broken("it broke")


def after_training_only(function: Any) -> Any:
    """`examine` that works before the training (step 0)."""

    def examined(evaluator: Any, model: Any, step: int = 0) -> Any:
        return fails() if step else function(evaluator, model, step)

    return examined


def saved_only(function: Any) -> Any:
    """`check_tokenizer` that passes the one just trained and not the saved one."""
    return lambda folder, documents: fails() if Path(folder).name == "model" else function(folder, documents)


def second_only(function: Any) -> Any:
    """`merge_adapters` that works while the model is saved."""
    calls: list[Any] = []

    def merged(model: Any) -> Any:
        calls.append(model)
        return function(model) if len(calls) == 1 else fails()

    return merged


STEPS = {
    "evaluation": ("mllm_vision.training.trainer.evaluating", "examine", after_training_only),
    "log": ("mllm_vision.training.trainer.evaluating.Evaluating", "_log_final", lambda _: fails),
    "continuations": ("mllm_vision.data.documents", "continuations", lambda _: fails),
    "tokenizer": ("mllm_vision.data.documents", "check_tokenizer", lambda check: saved_only(check)),
    "adapters": ("mllm_vision.vlm.export", "merge_adapters", lambda merge: second_only(merge)),
    "drawing": ("mllm_vision.evaluation.maps.views", "view_samples", lambda _: fails),
    "audit": ("mllm_vision.modules.audit.ModuleAudit", "close", lambda _: fails),
    "freeze audit": ("mllm_vision.vlm.freezing.FreezeProof", "close", lambda _: fails),
    "lineage": ("mllm_vision.training.recipe.run.Run", "_close_lineages", lambda _: fails),
    "card and push": ("mllm_vision.hub.push", "model_card", lambda _: fails),
}
NAMES = {  # of the steps in run.json
    "log": "log of the evaluation", "continuations": "sample continuations",
    "drawing": "drawing of the views", "audit": "audit of the parts", "freeze audit": "freeze audit",
    "lineage": "verdict and lineage", "tokenizer": "check of the saved tokenizer",
    "adapters": "merging of the adapters",
}  # fmt: skip
OWN = {"align": ["freeze audit"], "instruct": ["freeze audit", "adapters"],
       "language_model": ["continuations", "tokenizer"],
       "pretrain_images": ["drawing", "audit"], "pretrain": ["audit"], "finetune": ["audit"]}  # fmt: skip
SEVERE = ("audit", "freeze audit", "tokenizer")
CASES = [(recipe, step) for recipe in RECIPES for step in ("evaluation", *OWN[recipe])]
CASES += [("finetune", "log"), ("language_model", "lineage"), ("finetune", "card and push")]


class FakeHub:
    """As much of `HfApi` as a push needs before its card is drawn."""

    def __init__(self, token: Any = None) -> None:
        pass

    def whoami(self) -> dict[str, Any]:
        return {"name": "me", "orgs": []}

    def create_repo(self, repo_id: str, **settings: Any) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(repo_id=repo_id)


@pytest.mark.parametrize(("recipe", "step"), CASES, ids=lambda value: value.replace(" ", "_"))
def test_a_step_that_fails_takes_nothing_with_it(recipe, step, data, tmp_path, monkeypatch, capsys, caplog):
    place, attribute, broken = STEPS[step]
    parent, _, name = place.rpartition(".")
    owner = getattr(importlib.import_module(parent), name) if name[0].isupper() else importlib.import_module(place)
    monkeypatch.setattr(owner, attribute, broken(getattr(owner, attribute)))
    asked = {}
    if step == "card and push":
        monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
        monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
        asked = {"push_to_hub": "true", "hub_model_id": "me/eyes"}
    with pytest.raises(Broken if step in SEVERE else IncompleteRun):
        run(recipe, data, tmp_path, **asked)
    record = json.loads((tmp_path / "run.json").read_text())
    expected = {NAMES.get(step)}
    if step == "evaluation":
        expected = {f"evaluation of {name}" for name in EVALUATIONS[recipe]}
    if step == "card and push":
        expected = {"push of encoder to me/eyes", "push of classifier to me/eyes-classifier"}
    assert {entry["step"] for entry in record["missing"]} == expected
    told = capsys.readouterr().out
    for entry in record["missing"]:
        assert "it broke" in entry["cause"] and f"missing: {entry['step']}" in told
        assert f"{entry['step']} failed: " in caplog.text
    assert set(record["evaluations"]) == (set() if step == "evaluation" else EVALUATIONS[recipe])
    for artifact in tiny_runs.ARTIFACTS[recipe]:
        assert check_lineage(tmp_path / artifact)["weights_sha256"] == hash_weights(tmp_path / artifact)
    if step == "card and push":
        assert "python scripts/push_to_hub.py --model" in told and "--repo_id me/eyes-classifier" in told
