"""What DDP and fp16 ask of every method and stage: a gradient for whatever trains, and skipped steps that are none."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from mllm_vision.modules.queue import FeatureQueue
from mllm_vision.training.callbacks.ema import WeightAverage
from mllm_vision.training.callbacks.progress import AfterStep
from mllm_vision.training.optim.muon import MuonAdamW

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cases
import methods_for_tests as methods
import pairs_for_tests as pairs


def without_gradient(model: nn.Module) -> list[str]:
    """Parameters that DDP would wait for until its time is out, with ddp_find_unused_parameters False."""
    return [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]


@pytest.mark.parametrize("method", [*methods.IMAGE_METHODS, "simclr of a ResNet", "vicreg of two encoders"])
def test_whatever_trains_has_a_gradient_in_every_step(method):
    name, _, of = method.partition(" of ")
    two = {"second_encoder": "vit", "second_encoder_overrides": {"hidden_size": 32, "num_hidden_layers": 1,
           "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}} if "two" in of else {}  # fmt: skip
    made = methods.objective(name, "resnet" if "ResNet" in of else "vit", **two)
    methods.tell_features(made)
    (batch,) = methods.batches(made, 1)
    made(**batch).loss.backward()
    assert not without_gradient(made)


@pytest.mark.parametrize("method", ["clip", "siglip", "itc"])
def test_whatever_of_a_pair_trains_has_a_gradient(method):
    made = pairs.make_objective(method).train()
    made(**pairs.pair_batches(1, 6)[0]).loss.backward()
    assert not without_gradient(made)


@pytest.mark.parametrize("how", ["connector", "connector language_model", "encoder connector language_model", "lora"])
@pytest.mark.parametrize("images", [True, False])
def test_whatever_of_a_stage_trains_has_a_gradient_with_images_and_without(how, images):
    from mllm_vision.vlm import freeze

    model, _ = cases._language_model()
    batch = cases._conversations(model, images=images)
    model = (
        freeze(model, ("encoder", "connector", "language_model=lora"), rank=2)
        if how == "lora"
        else freeze(model, how.split())
    )
    model.train()(**batch).loss.backward()
    assert not without_gradient(model)


def overflowing(parameters: list[nn.Parameter], made) -> AcceleratedOptimizer:
    """An optimizer after a step whose gradients were infinite."""
    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    made._step_supports_amp_scaling = False  # as `RecipeTrainer.create_optimizer` has it under fp16
    optimizer = AcceleratedOptimizer(made, scaler=scaler)
    scaler.scale(sum((value * float("inf")).sum() for value in parameters)).backward()
    optimizer.step()
    return optimizer


class Queued(nn.Module):
    """An objective that has put infinite rows aside for its queue."""

    def __init__(self):
        super().__init__()
        self.queue, self.moved = FeatureQueue(4, 2), 0

    def after_step(self, progress):
        self.queue.enqueue(torch.full((2, 2), float("inf")))
        self.moved += 1


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "fused muon": lambda p: MuonAdamW([{"params": p[:1], "muon": True}, {"params": p[1:]}], lr=0.1, fused=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_that_overflowed_moves_nothing(kind):
    weights = [nn.Parameter(torch.full((2, 3), 0.5)), nn.Parameter(torch.full((3,), 0.25))]
    objective, model = Queued(), nn.ParameterList(weights)
    average = WeightAverage(model, 0.9)
    state = SimpleNamespace(global_step=0, max_steps=10, epoch=0.0)
    average.on_train_begin(None, state, None)
    callback = AfterStep(objective)
    optimizer = overflowing(weights, OPTIMIZERS[kind](weights))
    state.global_step = 1
    callback.on_step_end(None, state, None, optimizer=optimizer)
    with torch.no_grad():
        model.register_buffer("running_mean", torch.tensor(float("inf")))
    average.on_step_end(None, state, None, optimizer=optimizer)
    assert [value.unique().tolist() for value in weights] == [[0.5], [0.25]]
    assert objective.moved == 0 and len(objective.queue) == 0

    for value in weights:  # and one that did not is a step
        value.grad = None
    optimizer.scaler.scale(sum(value.sum() for value in weights)).backward()
    optimizer.step()
    callback.on_step_end(None, state, None, optimizer=optimizer)
    assert objective.moved == 1 and not torch.equal(weights[0], torch.full((2, 3), 0.5))


def test_products_of_a_loss_are_fp32_where_tf32_is_allowed():
    """The switch is off inside and back where it was outside, also after an error."""
    from mllm_vision.functional.precision import full_fp32

    settings, before = torch.backends.mkldnn.matmul, torch.backends.mkldnn.matmul.fp32_precision
    try:
        for asked in ("tf32", "none", "ieee"):
            settings.fp32_precision = asked
            with pytest.raises(KeyError), full_fp32(torch.device("cpu")):
                assert settings.fp32_precision == "ieee" and not torch.is_autocast_enabled("cpu")
                raise KeyError
            assert settings.fp32_precision == asked
    finally:
        settings.fp32_precision = before
