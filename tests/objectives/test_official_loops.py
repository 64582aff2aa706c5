"""Ten steps of every method through the real trainer, against a plain loop written from the official code.

Equal weights, equal views, float64: losses and every weight agree to rounding, so that heads, loss, moving averages,
schedules, weight decay and the order of a step are those of tests/oracles/methods.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from oracles.methods import Start
from torch.utils.data import default_collate

from mllm_vision.encoder.build import build_backbone
from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.objectives import list_objectives, load_objective
from mllm_vision.training.arguments import RecipeArguments
from mllm_vision.training.trainer import ObjectiveTrainer

ROWS, BATCH, STEPS, SIZE = 16, 8, 10, 16
RESNET = {"hidden_sizes": [8], "depths": [1], "embedding_size": 8, "layer_type": "basic", "stem": "cifar"}
VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
HEAD = {"head_hidden": 12, "head_out": 10}

# encoder, fields of the method's Config, flags of the training (the method's own defaults stand otherwise)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "byol": ("resnet", HEAD | {"momentum": 0.9}, {"learning_rate": 8.0, "warmup_steps": 3, "weight_decay": 0.01}),
    "simsiam": ("resnet", HEAD | {"predictor_hidden": 6}, {"learning_rate": 2.0, "weight_decay": 0.01}),
}


def encoder(kind: str) -> VisionEncoder:
    """A tiny encoder whose outputs differ enough from image to image for BatchNorm to divide by."""
    if kind == "resnet":
        return VisionEncoder.from_backbone(*build_backbone("resnet", image_size=SIZE, **RESNET))
    made = tiny.tiny_dinov2 if kind == "dinov2" else tiny.tiny_vit
    sizes = {key: value for key, value in VIT.items() if kind == "vit" or key != "intermediate_size"}
    backbone = made(**sizes, image_size=SIZE, initializer_range=0.2)
    if kind == "vit":
        backbone.pooler = None
    return VisionEncoder.from_backbone(backbone, tiny.tiny_image_processor("vit", SIZE))


def rows(local: int = 0) -> list[dict[str, Any]]:
    """Fixed views of each image: the second a noisy copy of the first."""
    generator = torch.Generator().manual_seed(5)

    def draw(count: int, size: int) -> torch.Tensor:
        return torch.randn(ROWS, count, 3, size, size, generator=generator, dtype=torch.float64)

    views = draw(1, SIZE) + torch.cat([torch.zeros(ROWS, 1, 3, SIZE, SIZE), 0.5 * draw(1, SIZE)], dim=1)
    seeds = torch.randint(0, 2**40, (ROWS,), generator=generator)
    made = [{"views": views[i], "seeds": seeds[i], "index": i, "labels": (-1, 0, 1, 2)[i % 4]} for i in range(ROWS)]
    for row, crops in zip(made, draw(local, SIZE // 2), strict=True) if local else ():
        row["local_views"] = crops
    return made


def run_ours(name: str, folder: Any) -> tuple[Any, Start, list[dict], list[float], dict[str, Any]]:
    """The method's ten steps: (objective, its start, the batches in their order, losses, settings)."""
    kind, fields, flags = CASES[name]
    method = load_objective(name)
    torch.manual_seed(3)
    objective = method(encoder(kind), method.Config(**fields)).double().train()
    defaults = RecipeArguments.settle_defaults(flags, method.defaults_beside(None)) | flags
    arguments = RecipeArguments(
        output_dir=str(folder), use_cpu=True, num_train_epochs=STEPS * BATCH / ROWS, seed=1, save_strategy="no",
        per_device_train_batch_size=BATCH, disable_tqdm=True, logging_steps=100, **defaults,
    )  # fmt: skip
    batches: list[dict] = []
    losses: list[float] = []

    def keep(batch: Any) -> Any:
        batches.append({key: value.clone() for key, value in batch.items()})
        return batch

    data = rows(local=2 if "local_views" in objective.columns() else 0)
    trainer = ObjectiveTrainer(
        objective, arguments, train_dataset=data, data_collator=default_collate, make_views=keep,
        make_plain_views=lambda batch: {**batch, "views": batch["views"][:, :1]},
    )  # fmt: skip
    start = Start(copy.deepcopy(objective.encoder.backbone), copy.deepcopy(objective.state_dict()))
    compute = objective.loss

    def recording(embeddings: Any) -> Any:
        output = compute(embeddings)
        losses.append(output.loss.item())
        return output

    objective.loss = recording
    trainer.train()
    settings = {"rate": arguments.learning_rate, "warmup": arguments.get_warmup_steps(STEPS)}
    config = dataclasses.asdict(objective.config)
    return objective, start, batches, losses, {**defaults, **config, **settings, "width": objective.encoder.pooled_size}


@pytest.mark.parametrize("name", CASES)
def test_ten_steps(name, tmp_path):
    objective, start, batches, losses, given = run_ours(name, tmp_path)
    assert len(losses) == len(batches) == STEPS
    wanted_losses, wanted = importlib.import_module(f"oracles.methods.{name}").train(start, batches, given)
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-9, atol=1e-9)
    found = objective.state_dict()
    assert {key for key, value in found.items() if value.is_floating_point()} <= wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
    moved = [key for key in wanted if wanted[key].is_floating_point() and not torch.equal(found[key], start.state[key])]
    assert moved, "nothing moved: the loops agree about nothing"


def test_every_loop_is_of_a_method():
    assert set(CASES) <= set(list_objectives())
