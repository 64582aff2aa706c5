"""A method and an evaluator are a file and one line in a registry each: a dummy of both, through recipe and script."""

from __future__ import annotations

import json
import sys

import pytest
import tiny
import torch
from dry import _load

from mllm_vision.evaluation import registry as evaluators
from mllm_vision.hub.card import model_card
from mllm_vision.objectives import registry as methods

METHOD = """
from dataclasses import dataclass, field
import torch
from mllm_vision.data.views.draws import View
from mllm_vision.data.views.views import ViewPolicy
from mllm_vision.objectives import ImageObjective, ObjectiveOutput

class Dummy(ImageObjective):
    views = ViewPolicy((View(scale=(0.5, 1.0)),) * 2, "a policy of its own")
    citation = "@article{dummy2026method,\\n  title = {Dummy},\\n  journal = {arXiv:2601.00001}\\n}"
    loss_parts = ("agreement",)

    @dataclass
    class Config:
        weight: float = field(default=1.0, metadata={"help": "Of the agreement."})

    def embed(self, views):
        return {"h": self.features(self.encoder, views)}

    def loss(self, embeddings):
        agreement = embeddings["h"].float().var(1).mean()
        return ObjectiveOutput(loss=self.config.weight * agreement, metrics={"agreement": agreement.detach()})

    def chance_loss(self, batch_size, positives=1.0):
        return 3.5
"""
EVALUATOR = """
from dataclasses import dataclass, field
from mllm_vision.evaluation.base import Evaluation, Evaluator, image_model

class Dummy(Evaluator):
    primary_metric = "patches"
    of_encoder = True

    @dataclass
    class Flags:
        times: int = field(default=1, metadata={"help": "Factor on the count."})

    @classmethod
    def from_flags(cls, name, records, flags, sources):
        made = cls(name)
        made.records, made.times = records, flags.times
        return made

    def evaluate(self, model):
        return Evaluation("patches", {"patches": float(self.times * image_model(model).num_tokens)})
"""
LABELLED = """
import torch
from mllm_vision.evaluation.base import Evaluation
from mllm_vision.evaluation.labelled.images import LabelledEvaluator

class Rows(LabelledEvaluator):
    @classmethod
    def of_images(cls, name, data, flags):
        return cls(name, data, raw_pixels=False)

    def measure(self, train, test):
        return Evaluation("accuracy", {"accuracy": float(len(train.rows) + len(test.rows))})
"""


@pytest.fixture
def dummies(tmp_path, monkeypatch):
    """Three files, one line each."""
    for name, code in (("dummy_method", METHOD), ("dummy_evaluator", EVALUATOR), ("dummy_labelled", LABELLED)):
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(methods.IMAGES, "dummy", "dummy_method:Dummy")
    monkeypatch.setitem(evaluators.EVALUATORS, "dummy", "dummy_evaluator:Dummy")
    monkeypatch.setitem(evaluators.LABELLED, "rows", "dummy_labelled:Rows")
    return tmp_path


def test_they_run_end_to_end(dummies, capsys):
    data = tiny.write_pairs_parquet(dummies / "data.parquet", n=16)
    sizes = "hidden_size=24,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,patch_size=8"
    words = f"""--objective dummy --weight 2 --dataset_name {data} --eval_dataset_name {data} --image_size 32
        --encoder vit --encoder_overrides {sizes} --max_steps 2 --per_device_train_batch_size 4
        --optim adamw_torch --use_cpu --learning_rate 1e-3 --knn_k 3 --evaluators rows --final_evaluators rows
        --disable_tqdm --logging_steps 1 --output_dir {dummies / "run"}"""
    _load("recipes/pretrain_images.py").main(words.split())
    record = json.loads((dummies / "run" / "run.json").read_text())
    assert record["method"] == {
        "chance_loss": 3.5, "loss_parts": ["agreement"], "citation": methods.load_objective("dummy").citation,
    }  # fmt: skip
    assert any("agreement" in entry for entry in record["history"])
    assert record["evaluations"]["rows"]["accuracy"] == 32
    assert "dummy2026method" in model_card(dummies / "run" / "encoder")
    output = dummies / "evaluation.json"
    _load("scripts/evaluate.py").main(
        ["--model", str(dummies / "run" / "encoder"), "--task", f"dummy={data}", "--times", "3", "--untrained",
         "--output", str(output)]
    )  # fmt: skip
    entry = json.loads(output.read_text())["evaluations"]["dummy"]
    assert entry["patches"] == entry["baselines"]["untrained"] == 3 * 16 and entry["task"] == "dummy"
    assert "patches" in capsys.readouterr().out


def test_names_follow_the_registries(dummies):
    assert "dummy" in methods.list_objectives("images") and "dummy" not in methods.list_objectives("image_text")
    assert "dummy" in evaluators.list_evaluators()
    with pytest.raises(ValueError, match="nearest known one is 'dummy'"):
        methods.load_objective("dumy")
    with pytest.raises(ValueError, match="nearest known one is 'rows'"):
        evaluators.load_evaluator("row")
    assert issubclass(methods.load_objective("dummy"), torch.nn.Module)
