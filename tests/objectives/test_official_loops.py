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
from pairs_for_tests import make_dual, pair_batches
from torch.utils.data import default_collate

from mllm_vision.encoder.build import build_backbone
from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.encoder.sources import is_convolutional
from mllm_vision.objectives import ImageObjective, list_objectives, load_objective
from mllm_vision.training.recipe.arguments import RecipeArguments
from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer

ROWS, BATCH, STEPS, SIZE = 16, 8, 10, 16
RESNET = {"hidden_sizes": [8], "depths": [1], "embedding_size": 8, "layer_type": "basic", "stem": "cifar"}
VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
HEAD = {"head_hidden": 12, "head_out": 10}

WARM = {"warmup_steps": 3}
DINO = {"head_hidden": 12, "head_bottleneck": 6, "out_dim": 14, "momentum": 0.9, "freeze_last_layer_epochs": 1.0}
DINO |= {"teacher_temperature_warmup_epochs": 3.0, "teacher_temperature": 0.3, "teacher_temperature_start": 0.1}
MOCO = {"dim": 10, "queue_size": 12, "momentum": 0.9, "batch_norm_groups": 2}
SGD = {"learning_rate": 0.5, "weight_decay": 0.01}
ADAM = {"learning_rate": 0.01, "weight_decay": 0.1}
CLIP = {"learning_rate": 0.01, "weight_decay": 0.2, "adam_beta2": 0.98, "adam_epsilon": 1e-6, "max_grad_norm": 1.0}

# encoder, fields of the method's Config, flags of the training (the method's own defaults stand otherwise)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "barlow_twins": ("resnet", HEAD, {"base_learning_rate": 200.0, "base_bias_learning_rate": 2.0} | WARM),
    "byol": ("resnet", HEAD | {"momentum": 0.9}, {"learning_rate": 8.0, "warmup_steps": 3, "weight_decay": 0.01}),
    "clip": ("pair", {}, CLIP | WARM),
    "contrastive": ("resnet", HEAD | {"margin": 3.0}, {"learning_rate": 0.05, "weight_decay": 0.01} | WARM),
    "dino": ("vit", DINO, ADAM | WARM | {"weight_decay_end": 0.4, "max_grad_norm": 0.05}),
    "dinov2": ("dinov2", DINO, ADAM | WARM | {"weight_decay_end": 0.4, "max_grad_norm": 0.5}),
    "itc": ("pair", {"queue_size": 20, "momentum": 0.9, "alpha_ramp_epochs": 2.0}, {"learning_rate": 0.01} | WARM),
    "mae": ("vit", {"decoder_width": 8, "decoder_layers": 1, "decoder_heads": 2, "mask_ratio": 0.7}, ADAM | WARM),
    "moco_v1": ("resnet", MOCO, SGD),
    "moco_v2": ("resnet", MOCO | {"head_hidden": 12}, SGD),
    "moco_v3": ("vit", HEAD | {"momentum": 0.9}, ADAM | WARM | {"adam_epsilon": 1e-4}),
    "moco_v3 of a resnet": ("resnet", HEAD | {"momentum": 0.9}, {"base_learning_rate": 200.0} | WARM),
    "pcl": ("resnet", MOCO | {"batch_norm_groups": 1, "num_clusters": [3, 4], "prototype_warmup_epochs": 1.0}, SGD),
    "siglip": ("siglip", {}, {"learning_rate": 0.01, "max_grad_norm": 1.0} | WARM),
    "simclr": ("resnet", HEAD, {"learning_rate": 8.0, "weight_decay": 0.01} | WARM),
    "simclr decoupled": ("resnet", HEAD | {"decoupled": True}, {"learning_rate": 8.0} | WARM),
    "simclr decoupled, weighted": (
        "resnet",
        HEAD | {"decoupled": True, "dcl_sigma": 0.5},
        {"learning_rate": 8.0} | WARM,
    ),
    "simsiam": ("resnet", HEAD | {"predictor_hidden": 6}, {"learning_rate": 2.0, "weight_decay": 0.01}),
    "supcon": ("resnet", HEAD, {"learning_rate": 0.5, "weight_decay": 0.01} | WARM),
    **{
        f"triplet {mining}": ("resnet", HEAD | {"mining": f"batch_{mining}"}, {"learning_rate": 0.5} | WARM)
        for mining in ("all", "hard", "semi_hard")
    },
    "vicreg": ("resnet", HEAD, {"learning_rate": 0.5, "weight_decay": 0.01} | WARM),
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


def build(name: str) -> Any:
    """The method around a tiny network, in float64."""
    kind, fields, _ = CASES[name]
    method = load_objective(name.partition(" ")[0])
    torch.manual_seed(3)
    if kind in ("pair", "siglip"):
        network = make_dual("siglip" if kind == "siglip" else "clip", bias=-10.0 if method.has_bias else None)
    else:
        network = encoder(kind)
    return method(network, method.Config(**fields)).double().train()


def data(objective: Any) -> list[dict[str, Any]]:
    """Sixteen rows with the columns that the method takes."""
    if not isinstance(objective, ImageObjective):
        batch = pair_batches(1, ROWS)[0]
        batch["pixel_values"] = batch["pixel_values"].double()
        return [{key: value[row] for key, value in batch.items()} for row in range(ROWS)]
    made = rows(local=2 if "local_views" in objective.columns() else 0)
    return [{**row, "views": row["views"][: objective.least_views]} for row in made]


def run_ours(name: str, folder: Any) -> tuple[Any, Start, list[dict], list[float], dict[str, Any]]:
    """The method's ten steps: (objective, its start, the batches in their order, losses, settings)."""
    objective, flags = build(name), CASES[name][2]
    beside = (None, CASES[name][0]) if isinstance(objective, ImageObjective) else (None,)
    defaults = RecipeArguments.settle_defaults(flags, objective.defaults_beside(*beside)) | flags
    arguments = RecipeArguments(
        output_dir=str(folder), use_cpu=True, num_train_epochs=STEPS * BATCH / ROWS, seed=1, save_strategy="no",
        per_device_train_batch_size=BATCH, disable_tqdm=True, logging_steps=100, **defaults,
    )  # fmt: skip
    batches: list[dict] = []
    losses: list[float] = []

    def keep(batch: Any) -> Any:
        batches.append({key: value.clone() for key, value in batch.items()})
        if hasattr(objective, "masks"):
            batches[-1]["masks"] = objective.masks(batch["seeds"], 2)
        return batch

    rows = data(objective)
    trainer = ObjectiveTrainer(
        objective, arguments, train_dataset=rows, data_collator=default_collate, make_views=keep,
        make_plain_views=lambda batch: {**batch, "views": batch["views"][:, :1]},
    )  # fmt: skip
    network = objective.encoder.backbone if isinstance(objective, ImageObjective) else objective.dual
    start = Start(copy.deepcopy(network), copy.deepcopy(objective.state_dict()))
    compute = objective.loss

    def recording(embeddings: Any) -> Any:
        output = compute(embeddings)
        losses.append(output.loss.item())
        return output

    objective.loss = recording
    trainer.train()
    settings = {
        "rate": arguments.learning_rate, "bias_rate": arguments.bias_learning_rate, "rows": rows,
        "warmup": arguments.get_warmup_steps(STEPS), "steps_per_epoch": ROWS // BATCH, "patch_size": VIT["patch_size"],
        "image_size": SIZE, "width": objective.encoder.pooled_size,
    }  # fmt: skip
    return objective, start, batches, losses, {**defaults, **dataclasses.asdict(objective.config), **settings}


@pytest.mark.parametrize("name", CASES)
def test_ten_steps(name, tmp_path):
    objective, start, batches, losses, given = run_ours(name, tmp_path)
    assert len(losses) == len(batches) == STEPS
    wanted_losses, wanted = importlib.import_module(f"oracles.methods.{name.partition(' ')[0]}").train(
        start, batches, given
    )
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-9, atol=1e-9)
    found = objective.state_dict()
    # queues and clusters show in the losses
    left = ("queue.", "prototypes_", "concentration_", "alpha_share", "teacher.module.logit_scale")
    if name == "dinov2":  # balanced, not centred
        left += ("centring.", "patch_centring.")
    missed = [key for key, value in found.items() if value.is_floating_point() and not key.startswith(left)]
    assert not (missing := set(missed) - wanted.keys()), missing
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
    trained = [key for key, value in objective.named_parameters() if value.requires_grad]
    still = [key for key in trained if torch.equal(found[key], start.state[key])]
    assert not still, "these never moved, so the loops agree about nothing: " + ", ".join(still)


def test_only_built_resnets_of_some_methods_start_with_residual_blocks_of_zero(tmp_path):
    def zeros(name: str, vision: Any, **config: Any) -> int:
        made = load_objective(name)(vision, load_objective(name).Config(**HEAD, **config))
        norms = [module for module in made.encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        return sum(not norm.weight.any() for norm in norms)

    asked = ("simsiam", "barlow_twins", "vicreg", "moco_v3")
    assert [zeros(name, encoder("resnet")) for name in (*asked, "byol", "simclr")] == [1, 1, 1, 1, 0, 0]
    assert [zeros(name, encoder("resnet"), zero_init_residual=False) for name in asked] == [0] * 4
    encoder("resnet").save_pretrained(tmp_path / "encoder")
    (tmp_path / "empty").mkdir()
    found = [is_convolutional(name) for name in ("resnet", "vit", "clip", tmp_path / "encoder", tmp_path / "empty")]
    assert found == [True, False, False, True, False]
    assert zeros("simsiam", VisionEncoder.from_pretrained(tmp_path / "encoder")) == 0


def test_every_method_is_held_against_a_loop():
    assert {name.partition(" ")[0] for name in CASES} == set(list_objectives())
